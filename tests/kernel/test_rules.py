"""The dispatcher's program against a plain reference: the kernel's verdict over random rule sets and packets."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrecv import steering_tables
from fastrecv.bpf import Object, packaged
from fastrecv.rules import MAX_ALTERNATIVES, MEMBERS, Binding, RuleSetError, compile_rules, destinations_of

SK_DROP, SK_PASS = 0, 1
PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
KINDS = {socket.IPPROTO_TCP: socket.SOCK_STREAM, socket.IPPROTO_UDP: socket.SOCK_DGRAM}
Sockets = dict[tuple[str | None, int, int], socket.socket]


@pytest.fixture(scope="module")
def sockets() -> Iterator[Sockets]:
    """A socket for every label, family and protocol."""
    made: Sockets = {}
    with contextlib.ExitStack() as stack:
        for label in ("a", "b", "c"):
            for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
                for protocol, kind in KINDS.items():
                    sock = stack.enter_context(socket.socket(family, kind))
                    sock.bind((host, 0))
                    if kind == socket.SOCK_STREAM:
                        sock.listen()
                    made[label, family, protocol] = sock
        yield made


@contextlib.contextmanager
def loaded(bindings: list[Binding], sockets: Sockets) -> Iterator[Object]:
    numbers = {name: number for number, name in enumerate(destinations_of(bindings))}
    with packaged("lookup") as lookup:
        lookup.maps["sockets"].max_entries = MEMBERS * max(len(numbers), 1)
        lookup.maps["counts"].max_entries = max(len(numbers), 1)
        compile_rules(bindings, numbers).load(lookup)
        for name, number in numbers.items():
            if name in sockets:
                lookup.maps["sockets"].update([number * MEMBERS], [sockets[name].fileno()])
        yield lookup


def ask(lookup: Object, protocol: int, source: str, destination: str, port: int) -> tuple[int, int]:
    """The verdict on a packet, and the cookie of the socket that gets it.

    Test runs have no interface: the kernel refuses a context with an ingress_ifindex.
    """
    family = socket.AF_INET6 if ":" in destination else socket.AF_INET
    remote, local = ip_address(source).packed, ip_address(destination).packed
    in4, in6 = (4, 0) if family == socket.AF_INET else (0, 16)
    context = struct.pack(  # struct bpf_sk_lookup, include/uapi/linux/bpf.h
        "=QII4s16s2sH4s16sII4x", 0, family, protocol, remote[:in4], remote[:in6], struct.pack("!H", 4242), 0,
        local[:in4], local[:in6], port, 0,
    )  # fmt: skip
    run = lookup.programs["lookup"].run(context=context)
    return run.verdict, int(struct.unpack_from("=Q", run.context)[0])


def cookie(sock: socket.socket) -> int:
    return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, 57, 8))[0])  # SO_COOKIE


Packet = tuple[str, str, str, int]  # protocol, source, destination, port


def expected(bindings: list[Binding], sockets: Sockets, packet: Packet) -> tuple[int, int]:
    """What the documentation says, done the slow way."""
    protocol, source, destination, port = packet
    to, sender = ip_address(destination), ip_address(source)
    matching = [
        binding
        for binding in bindings
        if binding.protocol in (protocol, "any")
        and to in binding.prefix
        and binding.ports[0] <= port <= binding.ports[1]
        and (binding.source is None or sender in binding.source)
        and binding.interface == 0
    ]
    if not matching:
        return SK_PASS, 0
    first = min(matching, key=lambda binding: binding.precedence)
    if first.label is None:
        return SK_DROP, 0
    family = socket.AF_INET if to.version == 4 else socket.AF_INET6
    sock = sockets.get((first.label, family, PROTOCOLS[protocol]))
    if sock is None:
        return SK_PASS if first.on_miss == "pass" else SK_DROP, 0
    return SK_PASS, cookie(sock)


# Few addresses and ports, so that prefixes nest, ranges overlap and packets hit.
ADDRESSES: dict[int, list[IPv4Address | IPv6Address]] = {
    4: [IPv4Address(text) for text in ("10.1.2.3", "10.1.2.128", "10.1.128.0", "198.51.100.1")],
    6: [IPv6Address(text) for text in ("2001:db8::1", "2001:db8::8000:0:0:1", "2001:db8:0:1::", "8000::")],
}
LENGTHS = {4: [0, 8, 15, 16, 17, 23, 24, 25, 31, 32], 6: [0, 16, 32, 48, 63, 64, 65, 127, 128]}
PORTS = [0, 53, 80, 443, 65535]


@st.composite
def prefixes(draw: st.DrawFn, version: int) -> Any:
    length = draw(st.sampled_from(LENGTHS[version]))
    return ip_network((draw(st.sampled_from(ADDRESSES[version])), length), strict=False)


@st.composite
def a_binding(draw: st.DrawFn, conditional: bool = True) -> Binding:
    version = draw(st.sampled_from([4, 6]))
    first, last = sorted([draw(st.sampled_from(PORTS)), draw(st.sampled_from(PORTS))])
    ports = draw(st.sampled_from([(first, first), (first, last), (0, 65535)]))
    return Binding(
        draw(st.sampled_from(["tcp", "udp", "any"])), draw(prefixes(version)), ports,
        draw(st.sampled_from(["a", "b", "c", "nobody", None])),
        draw(st.one_of(st.none(), prefixes(version))) if conditional else None,
        draw(st.sampled_from([0, 0, 0, 1, 2])) if conditional else 0, draw(st.sampled_from(["drop", "pass"])),
    )  # fmt: skip


@st.composite
def crowds(draw: st.DrawFn) -> list[Binding]:
    """Many prefixes of one version on the same ports, more than trees are made of for IPv4, and a few bindings more."""
    version = draw(st.sampled_from([4, 6]))
    nested = [ip_network((address, length), strict=False) for address in ADDRESSES[version]
              for length in range(0, ADDRESSES[version][0].max_prefixlen + 1, 3)]  # fmt: skip
    left_out = draw(st.integers(0, 6))
    labels = draw(st.lists(st.sampled_from(["a", "b", "c", "nobody", None]), min_size=1, max_size=5))
    misses: list[Any] = draw(st.lists(st.sampled_from(["drop", "pass"]), min_size=1, max_size=3))
    crowd = [
        Binding("any", network, (53, 443), labels[place % len(labels)], on_miss=misses[place % len(misses)])
        for place, network in enumerate(dict.fromkeys(nested))
        if place % 7 != left_out
    ]
    return crowd + draw(st.lists(a_binding(conditional=draw(st.booleans())), max_size=6))


@st.composite
def a_packet(draw: st.DrawFn) -> Packet:
    near = st.sampled_from(ADDRESSES[draw(st.sampled_from([4, 6]))]).map(str)
    return draw(st.sampled_from(["tcp", "udp"])), draw(near), draw(near), draw(st.sampled_from([*PORTS, 54]))


roominess = pytest.mark.parametrize("roomy", [0, 32], ids=["trees-for-few", "tables-for-all"])
cases = given(
    bindings=st.lists(a_binding(), max_size=25) | st.lists(a_binding(conditional=False), max_size=25) | crowds(),
    packets=st.lists(a_packet(), min_size=10, max_size=10),
)


def assert_decided(sockets: Sockets, roomy: int, bindings: list[Binding], packets: list[Packet]) -> None:
    unique = {(b.protocol, b.prefix, b.ports, b.source, b.interface): b for b in bindings}
    chosen = list(unique.values())
    with mock.patch.object(steering_tables, "_ROOMY", roomy), loaded(chosen, sockets) as lookup:
        for packet in packets:
            protocol, source, destination, port = packet
            found = ask(lookup, PROTOCOLS[protocol], source, destination, port)
            assert found == expected(chosen, sockets, packet), packet


@roominess
@cases
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_kernel_decides_as_documented(
    sockets: Sockets, roomy: int, bindings: list[Binding], packets: list[Packet]
) -> None:
    assert_decided(sockets, roomy, bindings, packets)


@pytest.mark.proof
@roominess
@cases
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_kernel_decides_as_documented_in_thousands_of_rule_sets(
    sockets: Sockets, roomy: int, bindings: list[Binding], packets: list[Packet]
) -> None:
    assert_decided(sockets, roomy, bindings, packets)


def test_where_the_longest_prefix_does_not_apply_the_next_one_wins(sockets: Sockets) -> None:
    bindings = [
        Binding("udp", ip_network("10.0.0.0/8"), (0, 65535), "a"),
        Binding("udp", ip_network("10.1.0.0/16"), (0, 65535), "b", source=ip_network("192.0.2.0/24")),
        Binding("udp", ip_network("10.1.2.0/24"), (53, 53), "c", source=ip_network("192.0.2.128/25")),
        Binding("udp", ip_network("10.1.2.0/24"), (53, 53), "c", interface=7),
    ]
    with loaded(bindings, sockets) as lookup:
        for source, port, label in (("192.0.2.200", 53, "c"), ("192.0.2.1", 53, "b"), ("192.0.2.200", 54, "b"),
                                    ("198.51.100.1", 53, "a")):  # fmt: skip
            verdict = ask(lookup, socket.IPPROTO_UDP, source, "10.1.2.3", port)
            assert verdict == (SK_PASS, cookie(sockets[label, socket.AF_INET, socket.IPPROTO_UDP]))


def test_beside_a_long_ipv6_prefix_the_one_that_covers_it_wins(sockets: Sockets) -> None:
    bindings = [
        Binding("udp", ip_network("2001:db8::/32"), (53, 53), "a"),
        Binding("udp", ip_network("2001:db8::8/125"), (53, 53), "b"),
        Binding("udp", ip_network("2001:db9::8/125"), (53, 53), "b"),
    ]
    with loaded(bindings, sockets) as lookup:
        for host, label in (("2001:db8::7", "a"), ("2001:db8::8", "b"), ("2001:db8::f", "b"), ("2001:db8::10", "a"),
                            ("2001:db9::8", "b"), ("2001:db9::10", None)):  # fmt: skip
            due = cookie(sockets[label, socket.AF_INET6, socket.IPPROTO_UDP]) if label else 0
            assert ask(lookup, socket.IPPROTO_UDP, "2001:db8::1", host, 53) == (SK_PASS, due), host


@pytest.mark.parametrize(("on_miss", "verdict"), [("drop", SK_DROP), ("pass", SK_PASS)])
def test_a_binding_without_a_socket_drops_or_passes(sockets: Sockets, on_miss: Any, verdict: int) -> None:
    binding = Binding("tcp", ip_network("192.0.2.0/24"), (80, 80), "nobody", on_miss=on_miss)
    with loaded([binding], sockets) as lookup:
        assert ask(lookup, socket.IPPROTO_TCP, "198.51.100.1", "192.0.2.9", 80) == (verdict, 0)
        assert not lookup.maps["counts"].lookup([0]).view(np.uint64).any(), "a test run is no packet"


def test_many_prefixes_are_all_found(sockets: Sockets) -> None:
    rng = np.random.default_rng(1)
    drawn = zip(rng.integers(0, 1 << 32, 3000).tolist(), rng.integers(12, 33, 3000).tolist(), strict=True)
    networks = sorted({ip_network((address, length), strict=False) for address, length in drawn})
    bindings = [Binding("udp", network, (9, 9), "abc"[number % 3]) for number, network in enumerate(networks)]
    with loaded(bindings, sockets) as lookup:
        for number in rng.integers(0, len(bindings), 300).tolist():
            network = networks[number]
            address = str(network[int(rng.integers(network.num_addresses))])
            due = expected(bindings, sockets, ("udp", "192.0.2.1", address, 9))
            assert ask(lookup, socket.IPPROTO_UDP, "192.0.2.1", address, 9) == due


def test_what_cannot_be_told_apart_is_refused() -> None:
    net = ip_network("192.0.2.0/24")
    with pytest.raises(RuleSetError, match=r"tcp 192\.0\.2\.0/24 port 80 is bound twice, to a and to b"):
        compile_rules([Binding("tcp", net, (80, 80), "a"), Binding("tcp", net, (80, 80), "b")], {})
    many = [Binding("tcp", net, (80, 80), "a", interface=number) for number in range(1, MAX_ALTERNATIVES + 2)]
    with pytest.raises(RuleSetError, match="33 bindings by source or interface apply to one port, 32 can be told"):
        compile_rules(many, {})
    with pytest.raises(RuleSetError, match="ports 5-4: give 0 to 65535"):
        Binding("tcp", net, (5, 4), "a")
    with pytest.raises(RuleSetError, match="are of different IP versions"):
        Binding("tcp", net, (5, 5), "a", source=ip_network("::/0"))


@pytest.mark.parametrize(("prefix", "anywhere"), [("192.0.2.0/24", "0.0.0.0/0"), ("2001:db8::/32", "::/0")])
def test_a_source_that_is_any_is_none_in_particular(prefix: str, anywhere: str) -> None:
    plain = Binding("tcp", ip_network(prefix), (80, 80), "a")
    found = Binding("tcp", ip_network(prefix), (80, 80), "a", source=ip_network(anywhere))
    assert (found, found.source) == (plain, None)
