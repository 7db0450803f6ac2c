"""How an XdpReceiver is set up: modes, queues, addresses, VLANs, other programs, and what is said of mistakes."""

from __future__ import annotations

import errno
import select
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any

import pytest

from fastrecv.bpf import Object, packaged
from fastrecv.errors import XdpError
from fastrecv.interfaces import Interface
from fastrecv.redirect import Redirect
from fastrecv.xdp import XdpReceiver
from fastrecv.xdp_options import XdpOptions
from tests.kernel.cable import PORT, VLAN, VLAN_FAR, VLAN_NEAR, Cable, laid, payloads
from tests.kernel.steering import Compile

pytestmark = pytest.mark.needs("AF_XDP in copy mode")


def test_a_foreign_program_stays_and_is_named(cable: Cable) -> None:
    for first, second in ((0, "auto"), (1 << 1, "copy"), (1 << 2, "generic")):
        with packaged("swallow") as swallow:
            program = swallow.load().programs["swallow"]
            with program.attach_xdp(cable.index, first) as link:
                with pytest.raises(XdpError, match=r"near0 has an XDP program already, swallow \(id \d+\)") as raised:
                    XdpReceiver("near0", PORT, mode=second)
                assert raised.value.errno == errno.EBUSY
                assert link.info.ifindex == cable.index
                cable.put(cable.datagram(b"swallowed"))
    with XdpReceiver("near0", PORT) as receiver:
        for mode in ("native", "generic", "auto"):
            with (
                Redirect("near0", PORT + 1) as redirect,
                pytest.raises(XdpError, match=r"already, redirect \(id \d+\)"),
            ):
                redirect.attach(mode)
        with pytest.raises(XdpError, match="another AF_XDP socket has this queue: close it"):
            XdpReceiver("near0", PORT + 1)
        with packaged("swallow") as swallow, pytest.raises(OSError, match="busy"):
            swallow.load().programs["swallow"].attach_xdp(cable.index)
        cable.put(cable.datagram(b"still there"))
        assert payloads(receiver, 1) == [b"still there"]


DISPATCHER = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
SEC("xdp")
int xdp_dispatcher(struct xdp_md *ctx)
{
	return XDP_PASS;
}
char LICENSE[] SEC("license") = "GPL";
"""


def test_a_dispatcher_of_libxdp_stays_and_it_is_said_how_to_unload_it(cable: Cable, compile_bpf: Compile) -> None:
    with Object(compile_bpf("dispatcher", DISPATCHER), "dispatcher") as dispatcher:
        program = dispatcher.load().programs["xdp_dispatcher"]
        with program.attach_xdp(cable.index) as link:
            with pytest.raises(XdpError, match=r"xdp_dispatcher \(id \d+\), and it stays: .*unload near0 --all"):
                XdpReceiver("near0", PORT)
            assert link.info.ifindex == cable.index
            assert Interface.named("near0").program == link.info.program_id


@pytest.mark.parametrize("mode", ["copy", "generic"])
def test_modes_can_be_forced(cable: Cable, mode: str) -> None:
    with XdpReceiver("near0", PORT, mode=mode) as receiver:
        assert receiver.mode == mode
        cable.put(cable.datagram(b"forced"))
        assert payloads(receiver, 1) == [b"forced"]
    with pytest.raises(XdpError, match="no zero-copy mode"):
        XdpReceiver("near0", PORT, mode="zero-copy")
    with XdpReceiver("near0", PORT) as receiver:
        assert receiver.mode == "copy"
        assert "zero-copy" in receiver.refused["zero-copy"]


def test_generic_mode_is_chosen_where_the_driver_has_no_other(cable: Cable) -> None:
    cable.far_net.link("set", index=cable.far_index, mtu=9000)
    cable.net.link("set", index=cable.index, mtu=9000)
    with XdpReceiver("near0", PORT) as receiver:
        assert receiver.mode == "generic"
        assert list(receiver.refused) == ["zero-copy", "copy"]
        assert "MTU of 9,000 is too large" in receiver.refused["copy"]
        cable.put(cable.datagram(b"x" * 3000))
        assert payloads(receiver, 1) == [b"x" * 3000]
        server = cable.server()
        cable.put(cable.datagram(b"y" * 5000))
        assert server.recv(9000) == b"y" * 5000
        assert receiver.statistics().passed["too_long"] == 1


def test_vlans_are_told_apart(cable: Cable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own addresses are those of untagged frames. Many a kernel is built without 802.1Q devices, so what
    rtnetlink says of one is put in here by hand."""
    told = Interface.addresses
    monkeypatch.setattr(Interface, "addresses", lambda self: {*told(self), (ip_address(VLAN_NEAR), VLAN)})
    tag = struct.pack("!HH", 0x8100, 3 << 13 | VLAN)
    with XdpReceiver("near0", PORT) as receiver:
        receiver._reader.place({VLAN: 77}, [])
        cable.put(cable.datagram(b"tagged", VLAN_FAR, to=VLAN_NEAR, tags=tag))
        batch = receiver.recv(2)
        assert bytes(batch[0]) == b"tagged"
        assert batch.destinations is not None
        assert batch.destinations["scope"][0] == 77
        cable.put(cable.datagram(b"priority", tags=struct.pack("!HH", 0x8100, 5 << 13)))
        assert payloads(receiver, 1) == [b"priority"]
        for wrong in (
            cable.datagram(b"untagged", VLAN_FAR, to=VLAN_NEAR),
            cable.datagram(b"other vlan", VLAN_FAR, to=VLAN_NEAR, tags=struct.pack("!HH", 0x8100, 8)),
            cable.datagram(b"tagged, for the other", tags=tag),
            cable.datagram(b"twice", tags=tag + tag),
            cable.datagram(b"of a provider", tags=struct.pack("!HH", 0x88A8, VLAN)),
        ):
            cable.put(wrong)
        assert payloads(receiver, 0) == []
        passed = receiver.statistics().passed
        assert (passed["other_address"], passed["nested_vlan"]) == (3, 2)


def test_addresses_that_come_later_count_from_a_refresh_on(cable: Cable) -> None:
    later = "192.0.2.77"
    with XdpReceiver("near0", PORT) as receiver:
        cable.net.addr("add", index=cable.index, address=later, prefixlen=24)
        frame = cable.datagram(b"later", to=later)
        cable.put(frame)
        assert payloads(receiver, 0) == []
        receiver.refresh()
        cable.put(frame)
        assert payloads(receiver, 1) == [b"later"]
        cable.net.addr("del", index=cable.index, address=later, prefixlen=24)
        receiver.refresh()
        cable.put(frame)
        cable.put(cable.datagram(b"ours"))
        assert payloads(receiver, 1) == [b"ours"]


SENDERS = range(4000, 4020)  # the kernel puts a flow into one of the veth's queues by its hash


def test_one_receiver_takes_what_comes_by_several_queues() -> None:
    with laid(queues=2) as cable, cable.near, XdpReceiver("near0", PORT, ring_size=64) as receiver:
        for turn in range(20):
            for sender in SENDERS:
                cable.put(cable.datagram(b"%d %d" % (turn, sender), sender=sender))
            assert set(payloads(receiver, 20)) == {b"%d %d" % (turn, sender) for sender in SENDERS}
        assert receiver.statistics().held == 0


def test_each_queue_may_have_a_receiver_of_its_own() -> None:
    with laid(queues=2) as cable, cable.near, Redirect("near0", PORT) as redirect:
        server = cable.server()
        with XdpReceiver.of(redirect, queues=[0]) as first, XdpReceiver.of(redirect, queues=[1]) as second:
            assert redirect.attach() == "native"
            for sender in SENDERS:
                cable.put(cable.datagram(b"%d" % sender, sender=sender))
            time.sleep(0.1)
            parts = [{int(data) for data, _ in each.recv(0).datagrams()} for each in (first, second)]
            assert parts[0]
            assert parts[1]
            assert sorted(parts[0] | parts[1]) == list(SENDERS)
            assert len(parts[0]) + len(parts[1]) == len(SENDERS)
            with pytest.raises(XdpError, match="another AF_XDP socket has this queue"):
                XdpReceiver.of(redirect, queues=[0])
            second.close()
            cable.put(cable.datagram(b"nobody's queue is the stack's", sender=min(parts[1])))
            assert server.recv(100) == b"nobody's queue is the stack's"
            assert first.statistics().passed["no_socket"] == 1
            forgotten = [XdpReceiver.of(redirect, queues=[1])]
            with pytest.warns(ResourceWarning, match="unclosed <XdpReceiver on near0 port 2055, copy>"):
                forgotten.clear()


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        (("near9", PORT), {}, "no interface 'near9' here: choose from lo, near0"),
        (("near0", 0), {}, "the port is 0: give numbers from 1 to 65535"),
        (("near0", []), {}, "no port: give one, or several"),
        (("near0", "2055"), {}, "the port is '2055': give numbers from 1 to 65535"),
        (("near0", None), {}, "the port is None: give numbers from 1 to 65535"),
        (("lo", PORT), {}, "interface lo has no Ethernet frames: AF_XDP takes nothing off it"),
        (("near0", [PORT, "x"]), {}, "the port is 'x'"),
        (("near0", PORT), {"addresses": ["192.0.2.9"]}, r"192.0.2.9 not on interface near0: ip address add"),
        (("near0", PORT), {"addresses": ["host"]}, "'host' does not appear to be"),
        (("near0", PORT), {"addresses": []}, r"addresses is \[\]: give a list of one or several, None for all"),
        (("near0", PORT), {"addresses": "192.0.2.1"}, "addresses is '192.0.2.1': give a list"),
        (("near0", PORT), {"queues": 0}, "queues is 0: give a list of their numbers, None for all"),
        (("near0", PORT), {"queues": [1]}, "interface near0 has no queue 1: give 0 to 0"),
        (("near0", PORT), {"queues": []}, "give each once"),
        (("near0", PORT), {"mode": "fast"}, "mode is 'fast': choose auto, zero-copy, copy, generic"),
        (("near0", PORT), {"batch_size": 0}, "batch_size is 0: give 1 to 1,024"),
        (("near0", PORT), {"ring_size": 100}, "ring_size is 100: give a power of two"),
        (("near0", PORT), {"frames": 8}, "frames is 8: give 2,048 to"),
        (("near0", PORT), {"frames": 1 << 20}, "2,147,483,648 bytes .* give fewer frames"),
        (("near0", PORT), {"frame_size": 1500}, "frame_size is 1500: give 2048 or 4096"),
        (("near0", PORT), {"checksums": "no"}, "checksums is 'no': choose trust, verify, partial"),
        (("near0", PORT), {"prefer_busy_poll": True}, "need busy_poll: give its microseconds"),
        (("near0", PORT), {"timestamps": 1}, "timestamps is 1: give True or False"),
        (("near0", PORT), {"gro": True}, "no option 'gro': choose from batch_size"),
    ],
)
def test_a_mistake_is_named(cable: Cable, arguments: Any, options: Any, error: str) -> None:
    with pytest.raises((ValueError, TypeError, OSError), match=error):
        XdpReceiver(*arguments, **options)


POLLING: list[XdpOptions] = [
    {"busy_poll": 20},
    {"busy_poll": 20, "prefer_busy_poll": True, "busy_poll_budget": 64},
    {"need_wakeup": False},
]


@pytest.mark.parametrize("options", POLLING)
def test_however_the_driver_is_driven_all_arrive(cable: Cable, options: XdpOptions) -> None:
    with XdpReceiver("near0", PORT, **options) as receiver:
        for number in range(500):
            cable.put(cable.datagram(b"%d" % number))
        assert payloads(receiver, 500) == [b"%d" % number for number in range(500)]


def test_an_interface_that_goes_is_said_to_everybody_and_each_time(cable: Cable) -> None:
    with XdpReceiver("near0", PORT) as receiver, ThreadPoolExecutor(3) as threads:
        assert receiver.redirect.attached
        waiting = [threads.submit(receiver.recv, 10) for _ in range(3)]
        polled = select.poll()
        polled.register(receiver.fileno(), select.POLLIN)
        cable.net.link("del", index=cable.index)
        for each in waiting:
            with pytest.raises(XdpError, match="the interface near0 is gone") as raised:
                each.result()
            assert raised.value.errno == errno.ENETDOWN
        with pytest.raises(XdpError, match="the interface near0 is gone"):
            receiver.recv_nowait()
        assert polled.poll(0) == []  # nobody turns round and round
        assert not receiver.redirect.attached


def test_an_event_loop_is_woken_when_the_interface_goes(cable: Cable) -> None:
    with XdpReceiver("near0", PORT) as receiver:
        polled = select.poll()
        polled.register(receiver.fileno(), select.POLLIN)
        assert polled.poll(0) == []
        cable.net.link("set", index=cable.index, mtu=1400)
        assert polled.poll(2000)
        assert not len(receiver.recv_nowait())  # another change
        cable.net.link("del", index=cable.index)
        assert polled.poll(2000)
        with pytest.raises(XdpError, match="the interface near0 is gone"):
            receiver.recv_nowait()


UDP_SEGMENT = 103  # include/uapi/linux/udp.h


@pytest.mark.parametrize(("mode", "size", "taken"), [("copy", 400, 3), ("copy", 1000, 3), ("generic", 550, 0)])
def test_a_train_is_divided_or_left_to_the_stack(cable: Cable, mode: str, size: int, taken: int) -> None:
    """Generic XDP gets it whole, and a frame of ours would hold it."""
    parts = [letter * size for letter in (b"a", b"b", b"c")]
    client, server = cable.client(), cable.server()
    with XdpReceiver("near0", PORT, mode=mode) as receiver:
        client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
        client.send(b"".join(parts))
        assert payloads(receiver, taken) == parts[:taken]
        assert [server.recv(9000) for _ in parts[taken:]] == parts[taken:]
