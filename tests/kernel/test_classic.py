"""Classic BPF attached by an ordinary user, against its twin in user space, on real traffic.

That classic BPF could not choose by addresses was held for long: here it does, for TCP and UDP, IPv4, IPv6, dual-stack.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from fastrecv.policies import Key, Policy, Sender
from tests.kernel.balancing import families, senders
from tests.kernel.groups import served_by_nobody, taker
from tests.kernel.steering import TCP, UDP, Stage, kinds

IP_OPTIONS, IPV6_DSTOPTS = 4, 59  # include/uapi/linux/in.h, in6.h
UDP_SEGMENT = 103  # include/uapi/linux/udp.h
NO_OPERATIONS = bytes([1, 1, 1, 0])  # RFC 791, 3.1
PADDING = bytes([0, 0, 1, 4, 0, 0, 0, 0])  # a header of destination options with nothing in it, RFC 8200, 4.6


@kinds
@families
@pytest.mark.parametrize("key", ["source", "source+port", "flow", "destination"])
def test_every_sender_comes_to_the_member_that_the_filter_names(stage: Stage, kind: int, family: str, key: Key) -> None:
    policy = Policy(key) if key == "destination" else Policy(key, prefix4=30, prefix6=126)
    made = served_by_nobody(stage, kind, family, policy, 5)
    asked = senders(family, 200)
    found = [taker(stage, kind, sender) for sender in asked]
    assert found == [made.index(sender) for sender in asked]
    assert set(found) == set(range(5))


@families
@pytest.mark.parametrize("text", ["payload[0:1]", "payload[2:5]", "payload[0:20]"])
def test_datagrams_go_by_their_payload_and_short_ones_by_their_source(stage: Stage, family: str, text: str) -> None:
    policy = Policy.parse(text)
    made = served_by_nobody(stage, UDP, family, policy, 5)
    asked = senders(family, 200, lambda number: os.urandom(number % 25))
    by_source = [sender for sender in asked if policy.key_of(sender.payload) is None]
    assert 0 < len(by_source) < 200
    found = [taker(stage, UDP, sender) for sender in asked]
    assert found == [made.index(sender) for sender in asked]
    assert set(found) == set(range(5))
    if len(by_source) > 50:
        assert {made.index(sender) for sender in by_source} == set(range(5)), "a load that failed gave 0"


@families
def test_a_syn_without_data_goes_by_its_source(stage: Stage, family: str) -> None:
    made = served_by_nobody(stage, TCP, family, Policy("payload", length=1), 5)
    asked = senders(family, 100, lambda number: bytes([number]))
    found = [taker(stage, TCP, sender) for sender in asked]
    assert found == [
        made.index(Sender(sender.source, sender.source_port, sender.destination, sender.destination_port))
        for sender in asked
    ]
    assert set(found) == set(range(5))


@kinds
def test_one_filter_tells_the_families_of_a_dual_stack_group_apart(stage: Stage, kind: int) -> None:
    made = served_by_nobody(stage, kind, "dual", Policy("flow"), 5)
    asked = [*senders("dual", 100), *senders("ipv6", 101)]
    assert [taker(stage, kind, sender) for sender in asked] == [made.index(sender) for sender in asked]


@kinds
def test_protocol_divides_ipv4_from_ipv6(stage: Stage, kind: int) -> None:
    made = served_by_nobody(stage, kind, "dual", Policy("protocol"), 2)
    for family, member in ("dual", 0), ("ipv6", 1):
        asked = senders(family, 20)
        assert {taker(stage, kind, sender) for sender in asked} == {member} == {made.index(sender) for sender in asked}


@kinds
def test_ports_are_found_behind_the_options_of_ipv4(stage: Stage, kind: int) -> None:
    made = served_by_nobody(stage, kind, "ipv4", Policy("flow"), 5)
    asked = senders("ipv4", 100)
    found = [taker(stage, kind, sender, [(socket.IPPROTO_IP, IP_OPTIONS, NO_OPERATIONS)]) for sender in asked]
    assert found == [made.index(sender) for sender in asked]


@kinds
def test_ports_behind_the_extension_headers_of_ipv6_count_as_0(stage: Stage, kind: int) -> None:
    made = served_by_nobody(stage, kind, "ipv6", Policy("flow"), 5)
    asked = senders("ipv6", 100)
    found = [taker(stage, kind, sender, [(socket.IPPROTO_IPV6, IPV6_DSTOPTS, PADDING)]) for sender in asked]
    assert found == [made.index(Sender(sender.source, 0, sender.destination, 0)) for sender in asked]
    assert found != [made.index(sender) for sender in asked]


@families
@pytest.mark.parametrize("text", ["flow", "payload[3000:4]"])
def test_fragments_are_put_together_first(stage: Stage, family: str, text: str) -> None:
    made = served_by_nobody(stage, UDP, family, Policy.parse(text), 5)
    with IPRoute() as net:
        net.link("set", index=1, mtu=1500)
    asked = senders(family, 60, lambda number: bytes(3000) + number.to_bytes(4))
    assert [taker(stage, UDP, sender) for sender in asked] == [made.index(sender) for sender in asked]
    kind = "Ip6" if family == "ipv6" else "Ip"
    assert reassembled(kind) == 60


def reassembled(kind: str) -> int:
    """Packets of the thread's namespace, by /proc/net/snmp and snmp6 (RFC 4293)."""
    if kind == "Ip6":
        lines = Path("/proc/thread-self/net/snmp6").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("Ip6ReasmOKs ")))
    names, values = (line.split() for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()[:2])
    return int(values[names.index("ReasmOKs")])


def test_a_train_goes_where_its_first_datagram_goes(stage: Stage) -> None:
    made = served_by_nobody(stage, UDP, "ipv4", Policy("payload", length=1), 5)
    (sender,) = senders("ipv4", 1, lambda number: b"abcdefgh")
    own = [made.index(Sender(sender.source, 1, sender.destination, 1, bytes([byte]))) for byte in sender.payload]
    assert len(set(own)) > 1
    assert taker(stage, UDP, sender, [(socket.IPPROTO_UDP, UDP_SEGMENT, 1)]) == own[0]
    rest = [stage.servers[str(own[0])].recv(9) for _ in sender.payload[1:]]
    assert b"".join(rest) == sender.payload[1:]


@pytest.fixture
def pinned() -> Iterator[set[int]]:
    """The CPUs that this thread may be on; it may go anywhere again after."""
    allowed = os.sched_getaffinity(0)
    yield allowed
    os.sched_setaffinity(0, allowed)


@kinds
@families
def test_cpu_is_the_one_that_takes_the_packet(stage: Stage, kind: int, family: str, pinned: set[int]) -> None:
    made = served_by_nobody(stage, kind, family, Policy("cpu"), max(pinned) + 2)
    for cpu in pinned:
        os.sched_setaffinity(0, {cpu})  # over loopback it is the sender's
        asked = [replace(sender, cpu=cpu) for sender in senders(family, 20)]
        assert {taker(stage, kind, sender) for sender in asked} == {made.index(sender) for sender in asked} == {cpu}


@kinds
@families
def test_random_spreads_one_sender_over_all(stage: Stage, kind: int, family: str) -> None:
    made = served_by_nobody(stage, kind, family, Policy("random"), 4)
    sender = senders(family, 1)[0]
    assert made.index(sender) is None
    found = Counter(taker(stage, kind, replace(sender, source_port=port)) for port in range(20_000, 20_200))
    assert len(found) == 4
    assert min(found.values()) > 20, "50 are expected, with a standard deviation of 6"
