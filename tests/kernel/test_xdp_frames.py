"""Which frames AF_XDP takes: what it takes is what the stack would have given, and the stack still gets the others."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrecv.xdp import XdpReceiver
from tests.kernel.cable import FAR, FAR6, NEAR, NEAR6, PORT, Cable, checksum, laid, packet, udp

pytestmark = pytest.mark.needs("AF_XDP in copy mode")

LAST = 9999  # the port of what is sent last
TAG = struct.pack("!HH", 0x8100, 0)
Datagram = tuple[bytes, tuple[Any, ...]]


class Twins:
    """Two cables that are sent the same: at one the stack alone receives, at the other AF_XDP before it."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.plain, self.crossed = (stack.enter_context(laid()) for _ in range(2))
        for cable in (self.plain, self.crossed):
            with cable.near:  # whoever asks for AF_XDP is not asking the routes
                for name in ("all", "default", "near0"):
                    Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text("0\n")
        self.servers = {cable: [cable.server(NEAR), cable.server(NEAR6)] for cable in (self.plain, self.crossed)}
        self.last = {cable: cable.server(NEAR, LAST) for cable in (self.plain, self.crossed)}
        with self.crossed.near:
            self.receiver = stack.enter_context(XdpReceiver("near0", PORT, checksums="verify"))

    def received(self, tails: list[bytes]) -> tuple[list[Datagram], list[Datagram], list[Datagram]]:
        """What becomes of frames, given from their Ethernet type on: (by the stack alone, by AF_XDP, by the stack
        behind it)."""
        for cable in (self.plain, self.crossed):
            for tail in tails:
                cable.put(cable.mac + cable.far_mac + tail)
            cable.put(cable.datagram(b"last", port=LAST))
            assert cable.datagram(b"")[:12] == cable.mac + cable.far_mac
            while self.last[cable].recv(9000) != b"last":
                pass  # a frame that was changed to go there
        taken: list[Datagram] = []
        while len(batch := self.receiver.recv(0)):
            for data, source in batch.datagrams():
                assert isinstance(source, tuple)
                taken.append((data, source[:2]))
        return self._queued(self.plain), sorted(taken), self._queued(self.crossed)

    def _queued(self, cable: Cable) -> list[Datagram]:
        found = []
        for server in self.servers[cable]:
            server.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    data, source = server.recvfrom(9000)
                    found.append((data, source[:2]))
        return sorted(found)


@pytest.fixture
def twins() -> Iterator[Twins]:
    with contextlib.ExitStack() as stack:
        yield Twins(stack)


def ip4(body: bytes, **changes: Any) -> bytes:
    return b"\x08\x00" + packet(FAR, NEAR, body, **changes)


def ip6(body: bytes, protocol: int = 17) -> bytes:
    return b"\x86\xdd" + packet(FAR6, NEAR6, body, protocol)


GOOD4, GOOD6 = udp(FAR, NEAR, 4000, PORT, b"payload"), udp(FAR6, NEAR6, 4000, PORT, b"payload")
LONG = udp(FAR, NEAR, 4000, PORT, bytes(range(200)) * 2)
EXTENSION = struct.pack("!BB6x", 17, 0)  # options of the destination, padded: RFC 8200, 4.6
NO_SUM6 = GOOD6[:6] + bytes(2) + GOOD6[8:]
WRONG_SUM = bytes([*packet(FAR, NEAR, GOOD4)[:10], 0xAB, 0xCD, *packet(FAR, NEAR, GOOD4)[12:]])

# what it is: frames, why they go on, and what the stack makes of them
PASSED: dict[str, tuple[list[bytes], str, list[bytes]]] = {
    "fragments": ([ip4(LONG[:200], fragment=0x2000), ip4(LONG[200:], fragment=25)], "fragment", [LONG[8:]]),
    "a first fragment alone": ([ip4(LONG[:104], fragment=0x2000)], "fragment", []),
    "IPv4 options": ([ip4(GOOD4, options=b"\x01" * 4)], "options", [b"payload"]),
    "an extension header": ([ip6(EXTENSION + GOOD6, 60)], "options", [b"payload"]),
    "IPv6 fragment, atomic": ([ip6(struct.pack("!BBHI", 17, 0, 0, 7) + GOOD6, 44)], "fragment", [b"payload"]),
    "a datagram shorter than its packet": (
        [ip4(udp(FAR, NEAR, 4000, PORT, b"pay") + b"load")], "length", [b"pay"]
    ),
    "a datagram longer than its packet": ([ip4(udp(FAR, NEAR, 1, PORT, b"payload", length=99))], "length", []),
    "a packet longer than its frame": ([ip4(GOOD4)[:-3]], "length", []),
    "half a header": ([ip4(GOOD4)[:15], ip4(GOOD4)[:26], ip6(GOOD6)[:30], ip6(GOOD6)[:46]], "length", []),
    "a wrong sum of the header": ([b"\x08\x00" + WRONG_SUM], "header_sum", []),
    "no sum over IPv6": ([ip6(NO_SUM6)], "no_checksum", []),
    "nobody's source": (
        [
            b"\x08\x00" + packet(source, NEAR, udp(source, NEAR, 1, PORT, b"?"))
            for source in ("127.0.0.1", "224.0.0.1", "255.255.255.255", NEAR)
        ],
        "source", [],
    ),
    "nobody's source, IPv6": (
        [b"\x86\xdd" + packet(source, NEAR6, udp(source, NEAR6, 1, PORT, b"?")) for source in ("::1", "ff02::1")],
        "source", [],
    ),
    "TCP": ([ip4(struct.pack("!HHIIBBHHH", 1, PORT, 0, 0, 5 << 4, 4, 0, 0, 0), protocol=6)], "other_protocol", []),
    "another address": ([b"\x08\x00" + packet(FAR, "192.0.2.3", udp(FAR, "192.0.2.3", 1, PORT, b"?"))],
                        "other_address", []),
    "a broadcast": ([b"\x08\x00" + packet(FAR, "192.0.2.255", udp(FAR, "192.0.2.255", 1, PORT, b"?"))],
                    "other_address", []),
}  # fmt: skip


@pytest.mark.parametrize("what", PASSED)
def test_what_cannot_be_judged_is_the_stacks(twins: Twins, what: str) -> None:
    frames, reason, payloads = PASSED[what]
    before = twins.receiver.statistics().passed[reason]
    alone, taken, behind = twins.received(frames)
    assert taken == []
    assert [data for data, _ in behind] == payloads
    assert alone == behind
    assert twins.receiver.statistics().passed[reason] - before == len(frames)


@pytest.mark.parametrize("tail", [ip4(GOOD4), ip6(GOOD6), TAG + ip4(GOOD4), TAG + ip6(GOOD6), ip4(GOOD4) + b"padding"])
def test_a_whole_datagram_is_taken(twins: Twins, tail: bytes) -> None:
    alone, taken, behind = twins.received([tail])
    assert taken == alone == [(b"payload", (FAR6 if b"\x86\xdd" in tail[:6] else FAR, 4000))]
    assert behind == []


@pytest.mark.parametrize("source", ["198.51.100.1", "198.51.100.127"])
def test_nobody_sends_from_an_address_of_the_host(twins: Twins, source: str) -> None:
    """The stack drops these as martians (RFC 1812, 5.3.7), by its routes; a broadcast's address it lets through."""
    for cable in (twins.plain, twins.crossed):
        cable.net.addr("add", index=1, address="198.51.100.1", prefixlen=25)
        cable.net.link("set", index=1, state="up")
    with twins.crossed.near:
        twins.receiver.refresh()
    tail = b"\x08\x00" + packet(source, NEAR, udp(source, NEAR, 1, PORT, b"?"))
    own = source == "198.51.100.1"
    alone, taken, behind = twins.received([tail, ip4(GOOD4)])
    assert [data for data, _ in taken] == ([] if own else [b"?"]) + [b"payload"]
    assert alone == taken
    assert behind == []
    assert twins.receiver.statistics().martian == own


def frame(draw: st.DrawFn) -> bytes:
    """From the Ethernet type on: a datagram of which some bytes were changed, cut off or added."""
    source, to = draw(st.sampled_from([(FAR, NEAR), (FAR6, NEAR6)]))
    payload = draw(st.binary(max_size=40))
    port = draw(st.sampled_from([PORT, PORT, PORT, 4739]))
    tail = bytearray((b"\x08\x00" if source == FAR else b"\x86\xdd")
                     + packet(source, to, udp(source, to, 4000, port, payload)))  # fmt: skip
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, min(70, len(tail) - 1)))
        tail[at] = draw(st.one_of(st.integers(0, 255), st.just(tail[at] ^ 1 << draw(st.integers(0, 7)))))
    if source == FAR and draw(st.booleans()) and (size := 4 * (tail[2] & 15)) >= 20 and len(tail) > size + 2:
        tail[12:14] = bytes(2)
        tail[12:14] = struct.pack("!H", checksum(bytes(tail[2 : 2 + size])))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        tail[:0] = draw(st.sampled_from([TAG, TAG, struct.pack("!HH", 0x8100, 9), struct.pack("!HH", 0x88A8, 0)]))
    if draw(st.booleans()):
        del tail[draw(st.integers(2, len(tail))) :]
    return bytes(tail + draw(st.binary(max_size=20)))


FRAMES = st.lists(st.composite(frame)(), min_size=1, max_size=30)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tails=FRAMES)
def test_every_row_is_what_the_stack_would_have_given(twins: Twins, tails: list[bytes]) -> None:
    alone, taken, behind = twins.received(tails)
    assert sorted(taken + behind) == alone
    assert twins.receiver.statistics().unreadable == 0


def test_a_mixture_arrives_whole_and_is_counted_to_the_last_frame(twins: Twins) -> None:
    rng = random.Random(7)
    before = twins.receiver.statistics()
    wanted, foreign = 0, 0
    for _ in range(100):
        tails = []
        for _ in range(60):
            data = rng.randbytes(rng.randrange(1400))
            kind = rng.randrange(5)
            source, to = ((FAR, NEAR), (FAR6, NEAR6))[kind % 2]
            body = udp(source, to, rng.randrange(1024, 65536), PORT if kind < 4 else 4739, data)
            tails.append((b"\x86\xdd" if kind % 2 else b"\x08\x00") + packet(source, to, body))
            wanted, foreign = wanted + (kind < 4), foreign + (kind == 4)
        alone, taken, behind = twins.received(tails)
        assert taken == alone
        assert behind == []
    after = twins.receiver.statistics()
    assert after.datagrams - before.datagrams == wanted
    assert after.passed["other_port"] - before.passed["other_port"] == foreign + 100  # and the last of each round
    assert after.kernel.dropped == before.kernel.dropped == 0


OTHERS = {
    "echo": ip4(struct.pack("!BBHHH", 8, 0, checksum(struct.pack("!BBHHH", 8, 0, 0, 1, 1)), 1, 1), protocol=1),
    "segment": PASSED["TCP"][0][0],
    "first": ip4(LONG[:200], fragment=0x2000),
    "second": ip4(LONG[200:], fragment=25),
    "foreign": ip4(udp(FAR, NEAR, 4000, 4739, b"foreign")),
    "foreign6": ip6(udp(FAR6, NEAR6, 4000, 4739, b"foreign")),
    "arp": b"\x08\x06" + struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2) + bytes(20),
}


def counters() -> dict[str, int]:
    """Of this thread's namespace: what its stack has been given."""
    found: dict[str, int] = {}
    lines = Path("/proc/thread-self/net/snmp").read_text().split("\n")
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        protocol, *columns = names.split()
        found |= {protocol + name: int(value) for name, value in zip(columns, values.split()[1:], strict=True)}
    for line in Path("/proc/thread-self/net/snmp6").read_text().split("\n"):
        if line.startswith("Udp6"):
            found[line.split()[0]] = int(line.split()[1])
    return found


@pytest.mark.proof
def test_ten_million_datagrams_among_others_arrive_whole_and_the_others_at_the_stack() -> None:
    """Sizes mixed, IPv4 and IPv6; the frames of a round are made once, and sent again and again."""
    rng = random.Random(3)
    rounds, wanted = 2800, 3600
    with laid() as cable, cable.near, XdpReceiver("near0", PORT, ring_size=8192, batch_size=1024) as receiver:
        server = cable.server(NEAR, 4739)
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0806)) as arps:  # ETH_P_ARP
            datagrams = [rng.randbytes(rng.randrange(rng.choice([8, 100, 1400]))) for _ in range(wanted)]
            frames = [
                cable.datagram(data, rng.choice([FAR, FAR6]), sender=rng.randrange(1, 65536)) for data in datagrams
            ]
            ethernet = cable.mac + cable.far_mac
            for number, tail in enumerate(OTHERS.values()):
                frames.insert(rng.randrange(wanted * number // 7, wanted * (number + 1) // 7), ethernet + tail)
            whole = b"".join(datagrams)
            before, arrived = counters(), 0
            for _ in range(rounds):
                for frame in frames:
                    cable.put(frame)
                parts: list[bytes] = []
                while sum(len(part) for part in parts) < len(whole) and len(batch := receiver.recv(2)):
                    arrived += len(batch)
                    parts.append(batch.packed()[0].tobytes())
                    del batch
                assert b"".join(parts) == whole
                arps.settimeout(2)
                assert len(arps.recv(100)) == 28
        server.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while server.recv(100) == b"foreign":
                pass  # the stack counts what is read
        after = counters()
        statistics = receiver.statistics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert arrived == statistics.datagrams == rounds * wanted > 10_000_000
    assert statistics.kernel.dropped == statistics.bad_checksum == statistics.unreadable == 0
    assert statistics.passed["fragment"] == 2 * rounds
    assert statistics.passed["other_port"] == 2 * rounds
    assert grown["Icmp:InEchos"] == grown["Tcp:InSegs"] == grown["Ip:ReasmOKs"] == rounds
    assert grown["Udp:InDatagrams"] + grown["Udp:RcvbufErrors"] == rounds
    assert grown["Udp:NoPorts"] == rounds  # the fragments, put together: this port has no socket
    assert grown["Udp6NoPorts"] == rounds
