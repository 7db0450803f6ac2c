"""What the kernel knows of a packet, as classic BPF says it: each with packets whose value is known."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from pyroute2 import IPRoute

from fastrecv.classic import Filter
from fastrecv.netns import Namespace
from fastrecv.policies import Policy
from tests.kernel.balancing import families, senders
from tests.kernel.groups import serve, served_by_nobody, taken, taker
from tests.kernel.steering import PORT, UDP, Stage, kinds

SIZE = 7
NEAR, FAR = "192.0.2.1", "192.0.2.2"
SOL_PACKET, PACKET_QDISC_BYPASS = 263, 20  # include/linux/socket.h, uapi/linux/if_packet.h


@kinds
@families
def test_mark_is_that_of_the_packet(stage: Stage, kind: int, family: str) -> None:
    served_by_nobody(stage, kind, family, Policy("mark"), SIZE)
    for mark in (0, 1, 6, 7, 1 << 31):
        marked = [(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", mark))]
        assert {taker(stage, kind, sender, marked) for sender in senders(family, 10)} == {mark % SIZE}


@kinds
@families
def test_loopback_is_interface_1_and_its_packets_are_of_no_queue_and_no_vlan(
    stage: Stage, kind: int, family: str
) -> None:
    members = serve(stage, kind, family, SIZE)
    for policy, member in (Policy("interface"), 1), (Policy("queue"), 0), (Policy("vlan"), 0):
        Filter(policy, SIZE).attach(members[0])
        assert {taker(stage, kind, sender) for sender in senders(family, 10)} == {member}


@kinds
@families
def test_rxhash_over_loopback_is_a_connected_senders(stage: Stage, kind: int, family: str) -> None:
    served_by_nobody(stage, kind, family, Policy("rxhash"), 4)
    assert {taker(stage, kind, sender) for sender in senders(family, 100)} == set(range(4))


@pytest.mark.parametrize("family", ["ipv4", "dual"])
def test_rxhash_is_0_where_nobody_made_one(stage: Stage, family: str) -> None:
    served_by_nobody(stage, UDP, family, Policy("rxhash"), 4)
    for sender in senders(family, 50):
        with stage.bind(UDP, str(sender.source), sender.source_port) as client:
            client.sendto(b"?", (str(sender.destination), PORT))
            assert taken(stage, UDP) == 0


@dataclass
class Wire:
    """A veth of four queues whose near end is in the stage's namespace; `far` sends frames into it."""

    index: int
    addresses: bytes  # of Ethernet: the near end's, the far one's
    far: socket.socket

    def send(self, tag: int | None = None) -> None:
        """UDP without a checksum (RFC 768) in IPv4 (RFC 791), perhaps behind an 802.1Q tag."""
        ends = socket.inet_aton(FAR) + socket.inet_aton(NEAR)
        header = struct.pack("!BBHIBBH", 0x45, 0, 20 + 8 + 1, 0, 64, 17, 0) + ends
        folded = sum(struct.unpack("!10H", header))
        folded = (folded & 0xFFFF) + (folded >> 16)
        header = header[:10] + struct.pack("!H", ~folded & 0xFFFF) + header[12:]
        tagged = b"" if tag is None else struct.pack("!HH", 0x8100, tag)
        datagram = struct.pack("!4H", 4000, PORT, 9, 0) + b"?"
        self.far.send(self.addresses + tagged + struct.pack("!H", 0x0800) + header + datagram)


@pytest.fixture
def wire(stage: Stage) -> Iterator[Wire]:
    queues = {"num_tx_queues": 4, "num_rx_queues": 4}
    with contextlib.closing(Namespace()) as beyond, contextlib.ExitStack() as stack:
        with beyond:
            far_net = stack.enter_context(IPRoute())
        net = stack.enter_context(IPRoute())
        peer = {"ifname": "far", "net_ns_fd": beyond.fd, **queues}
        net.link("add", ifname="near", kind="veth", peer=peer, **queues)
        (near,), (far,) = net.get_links(ifname="near"), far_net.get_links(ifname="far")
        net.addr("add", index=near["index"], address=NEAR, prefixlen=24)
        net.link("set", index=near["index"], state="up")
        far_net.link("set", index=far["index"], state="up")
        with beyond:
            sending = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        sending.bind(("far", 0))
        sending.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)  # then the queue is the number of the CPU
        macs = (bytes.fromhex(link.get("address").replace(":", "")) for link in (near, far))
        yield Wire(near["index"], b"".join(macs), sending)


def test_a_device_has_its_index_and_of_a_vlans_tag_nothing_is_left(stage: Stage, wire: Wire) -> None:
    members = serve(stage, UDP, "ipv4", SIZE)
    priority = 0xA000  # 5, and VLAN 0: such a frame is the device's own (IEEE 802.1Q)
    assert priority % SIZE != 0
    for policy, tag, member in (
        (Policy("interface"), None, wire.index % SIZE),
        (Policy("protocol"), priority, 0x0800 % SIZE),
        (Policy("mark"), None, 0),
        (Policy("vlan"), priority, 0),
    ):
        Filter(policy, SIZE).attach(members[0])
        wire.send(tag)
        assert taken(stage, UDP) == member, policy


def test_queue_is_the_one_that_the_packet_came_by(stage: Stage, wire: Wire) -> None:
    Filter(Policy("queue"), SIZE).attach(serve(stage, UDP, "ipv4", SIZE)[0])
    allowed = os.sched_getaffinity(0)
    try:
        for cpu in allowed:
            os.sched_setaffinity(0, {cpu})
            wire.send()
            assert taken(stage, UDP) == cpu % 4
    finally:
        os.sched_setaffinity(0, allowed)
