"""Policies that read more than addresses, or none: payloads, QUIC, prefixes with slots of their own, CPUs, chance."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from fastrecv.balance import Balancer
from fastrecv.balance_explain import explain
from fastrecv.errors import StateError
from fastrecv.policies import Mapped, Policy, Sender
from tests.kernel.balancing import FAMILIES, balanced, families, homes, senders, taker, takers
from tests.kernel.steering import PORT, TCP, UDP, Stage, kinds

EXPLAINED = 12


def netflow(number: int) -> bytes:
    """The header of a NetFlow v9 export (RFC 3954, 5.1): its source id is at bytes 16 to 19."""
    return struct.pack("!HHIIII", 9, 1, number, number, number, number % 7) + b"flows"


def quic_long(number: int, length: int = 8) -> bytes:
    """A long header (RFC 9000, 17.2): form and type, version, length of the connection id, the id."""
    return struct.pack("!BIB", 0xC0, 1, length) + (number % 9).to_bytes(length) + b"rest"


def quic_short(number: int) -> bytes:
    """A short header (RFC 9000, 17.3.1): the connection id is the first that follows."""
    return b"\x40" + (number % 9).to_bytes(8) + b"rest"


def anything(number: int) -> bytes:
    draw = random.Random(number)
    return draw.randbytes(draw.randrange(40))


@families
@pytest.mark.parametrize(
    ("policy", "payload"),
    [
        ("payload[0:1]", anything),
        ("payload[16:4]", netflow),
        ("payload[16:4]", anything),
        ("payload[3:20]", anything),
        ("payload[65535:20]", anything),
        ("quic[8]", quic_long),
        ("quic[8]", quic_short),
        ("quic[8]", anything),
        ("quic[20]", quic_long),
    ],
)
def test_a_datagram_goes_by_the_bytes_that_the_policy_names(
    stage: Stage, family: str, policy: str, payload: Callable[[int], bytes]
) -> None:
    with Balancer(Policy.parse(policy, seed=11)) as balancer:
        balanced(stage, balancer, UDP, family, 4)
        asked = senders(family, 400, payload)
        found = takers(stage, asked)
        assert found == homes(balancer, asked)
        assert found[:EXPLAINED] == [explain(balancer, sender).taker for sender in asked[:EXPLAINED]]
        assert len(set(found)) > 1
        assert balancer.counters()[None]["unreadable"] == 0


def test_the_exporters_of_an_observation_domain_come_together(stage: Stage) -> None:
    with Balancer(Policy.parse("payload[16:4]")) as balancer:
        balanced(stage, balancer, UDP, "ipv4", 4)
        found = takers(stage, senders("ipv4", 350, netflow))
        assert all(len(set(found[domain::7])) == 1 for domain in range(7))


def test_long_and_short_headers_of_a_connection_come_together_and_other_lengths_go_by_source(stage: Stage) -> None:
    with Balancer(Policy.parse("quic[8]", seed=3)) as balancer:
        balanced(stage, balancer, UDP, "ipv4", 4)
        assert takers(stage, senders("ipv4", 90, quic_long)) == takers(stage, senders("ipv4", 90, quic_short))
        shorter = senders("ipv4", 90, lambda number: quic_long(number, 4))
        assert takers(stage, shorter) == takers(stage, [replace(each, payload=b"") for each in shorter])


@families
def test_a_syn_carries_no_payload_so_connections_go_by_their_source(stage: Stage, family: str) -> None:
    with Balancer(Policy.parse("payload[0:2]", seed=5)) as balancer:
        balanced(stage, balancer, TCP, family, 4)
        asked = senders(family, 40)
        by_source = [explain(balancer, replace(sender, payload=b"")).taker for sender in asked]
        assert [taker(stage, TCP, sender) for sender in asked] == by_source
        assert len(set(by_source)) > 1


@kinds
@families
def test_a_packet_goes_by_the_cpu_that_takes_it(stage: Stage, kind: int, family: str) -> None:
    """Over loopback that is the one that sends it."""
    before = os.sched_getaffinity(0)
    with Balancer(Policy("cpu")) as balancer:
        balanced(stage, balancer, kind, family, 2)
        (asked,) = senders(family, 1)
        try:
            for cpu in sorted(before):
                os.sched_setaffinity(0, {cpu})
                told = explain(balancer, replace(asked, cpu=cpu))
                assert told.taker == cpu % 2
                assert [taker(stage, kind, asked) for _ in range(5)] == [told.taker] * 5
        finally:
            os.sched_setaffinity(0, before)
        assert explain(balancer, asked) == (
            None, None, None, None, "it goes by the CPU that takes the packet, which was not given"
        )  # fmt: skip


@kinds
def test_chance_spreads_the_packets_of_one_sender_and_nobody_knows_whereto(stage: Stage, kind: int) -> None:
    with Balancer(Policy("random")) as balancer:
        balanced(stage, balancer, kind, "ipv4", 2)
        (asked,) = senders("ipv4", 1)
        told = explain(balancer, asked)
        assert told == (None, None, None, None, "every packet goes where chance sends it")
        found = [taker(stage, kind, asked) for _ in range(64)]
        assert 12 <= found.count(0) <= 52, "outside of that once in a million"
        assert found.count(0) + found.count(1) == 64


# Prefixes with slots of their own

PLACED = {
    "ipv4": {"198.51.100.0/24": 0, "198.51.100.32/27": 1, "198.51.100.40/29": 2, "198.51.100.150/32": 3},
    "ipv6": {"2001:db8:7::/120": 0, "2001:db8:7::20/123": 1, "2001:db8:7::28/125": 2, "2001:db8:7::96/128": 3},
}


@kinds
@families
@pytest.mark.parametrize("mapped", ["source", "destination"])
def test_the_longest_prefix_of_the_mapped_address_wins(stage: Stage, kind: int, family: str, mapped: Mapped) -> None:
    with Balancer(Policy("flow", mapped=mapped)) as balancer:
        balanced(stage, balancer, kind, family, 4)
        placed = {ip_network(prefix): slot for prefix, slot in PLACED["ipv6" if family == "ipv6" else "ipv4"].items()}
        for prefix, slot in placed.items():
            balancer.place(prefix, slot)
        assert balancer.places() == placed
        net = FAMILIES[family][1]
        asked = []
        for number, last in enumerate([1, 33, 39, 40, 47, 48, 63, 64, 149, 150, 151]):
            ends = [ip_address(net.format(last)), ip_address(net.format(200))]
            source, destination = ends if mapped == "source" else reversed(ends)
            asked.append(Sender(source, 20_000 + number, destination, PORT, b"?"))
        assert [taker(stage, kind, sender) for sender in asked] == [0, 1, 1, 2, 2, 1, 1, 0, 0, 3, 0]
        told = explain(balancer, asked[3])
        assert told.taker == 2
        assert f"its {mapped} is in {list(placed)[2]}, placed in slot 2" in told.reason
        assert [explain(balancer, sender).taker for sender in asked] == [0, 1, 1, 2, 2, 1, 1, 0, 0, 3, 0]


@families
@pytest.mark.parametrize("mapped", ["source", "destination"])
def test_whom_no_prefix_holds_goes_by_the_hash(stage: Stage, family: str, mapped: Mapped) -> None:
    with Balancer(Policy("source+port", mapped=mapped)) as balancer:
        balanced(stage, balancer, UDP, family, 4)
        asked = senders(family, 300)
        before = takers(stage, asked)
        assert before == homes(balancer, asked)
        name = "2001:db8:7::40/122" if family == "ipv6" else "198.51.100.64/26"
        if mapped == "destination":
            name = "2001:db8:7::80/123" if family == "ipv6" else "198.51.100.128/27"
        prefix = ip_network(name)
        balancer.place(prefix, 3)
        inside = [getattr(sender, mapped) in prefix for sender in asked]
        assert 0 < sum(inside) < len(asked)
        after = takers(stage, asked)
        assert after == [3 if placed else old for placed, old in zip(inside, before, strict=True)]
        balancer.unplace(prefix)
        assert takers(stage, asked) == before
        with pytest.raises(StateError, match=f"{prefix} has no slot of its own"):
            balancer.unplace(prefix)


@pytest.mark.parametrize("everywhere", ["::/0", "::/64", "::fffe:0:0/95"])
def test_a_prefix_of_ipv6_holds_no_sender_of_ipv4(stage: Stage, everywhere: str) -> None:
    """Though addresses of both are kept in one table, in which IPv4 has a place among those of IPv6."""
    with Balancer(Policy("source+port", mapped="source")) as balancer:
        balanced(stage, balancer, UDP, "dual", 4)
        asked = senders("dual", 60)
        before = takers(stage, asked)
        balancer.place(ip_network(everywhere), 2)
        assert takers(stage, asked) == before == [explain(balancer, sender).taker for sender in asked]
        balancer.place(ip_network("0.0.0.0/0"), 1)
        assert set(takers(stage, asked)) == {1}
        assert balancer.places() == {ip_network(everywhere): 2, ip_network("0.0.0.0/0"): 1}


def test_a_balancer_that_maps_nothing_takes_no_prefixes() -> None:
    with Balancer(Policy(), size=1) as balancer:
        everywhere = ip_network("::/0")
        with pytest.raises(StateError, match="this balancer maps no prefixes: create it with mapped source"):
            balancer.place(everywhere, 0)
        with pytest.raises(StateError, match="this balancer maps no prefixes: create it with mapped source"):
            balancer.unplace(everywhere)
        with pytest.raises(ValueError, match="slot 128: give 0 to 127"):
            balancer.place(ip_network("::/0"), 128)
