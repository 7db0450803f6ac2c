"""The floods: every packet well-formed, every packet counted, every program in charge of them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastrecv.bench.floods import (
    DESTINATIONS,
    FIRST_SOURCE_PORT,
    FLOODS,
    XDP_DROP,
    XDP_PASS,
    Counter,
    Flood,
    Source,
    open_sink,
)
from fastrecv.bench.lab import Lab, quick_grace_periods
from fastrecv.bench.programs import PROGRAMS, selects
from fastrecv.policies import Sender

pytestmark = pytest.mark.alone  # expedites RCU on the whole host


@pytest.fixture
def lab() -> Iterator[Lab]:
    with quick_grace_periods(), Lab() as opened:
        yield opened


@pytest.fixture(params=list(FLOODS))
def flood(request: pytest.FixtureRequest) -> Flood:
    return FLOODS[request.param]


def ones_complement(data: bytes) -> int:
    """RFC 1071, word by word in network order: written apart from the code under test."""
    total = 0
    for (word,) in struct.iter_unpack("!H", data + b"\0" * (len(data) % 2)):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


def assert_well_formed(flood: Flood, data: bytes, port_at: int, sender: Sender) -> None:
    network, transport = data[14:port_at], data[port_at:]
    source, destination = sender.source.packed, sender.destination.packed
    if flood.family == socket.AF_INET:
        assert network[0] == 0x45
        assert struct.unpack("!H", network[2:4])[0] == len(data) - 14
        assert ones_complement(network) == 0xFFFF
        assert network[12:20] == source + destination
    else:
        assert struct.unpack("!H", network[4:6])[0] == len(transport)
        assert network[8:40] == source + destination
    pseudo = source + destination + struct.pack("!II", len(transport), flood.protocol)
    assert ones_complement(pseudo + transport) == 0xFFFF
    assert struct.unpack("!HH", transport[:4]) == (sender.source_port, sender.destination_port)
    header = 8 if flood.protocol == socket.IPPROTO_UDP else 20
    assert transport[header:] == sender.payload


@pytest.mark.parametrize("spread", [False, True], ids=["constant", "spread"])
def test_every_frame_is_well_formed(lab: Lab, flood: Flood, spread: bool) -> None:
    if spread:
        payload = bytes(8) if flood.protocol == socket.IPPROTO_UDP else b""
        flood = replace(flood, spread=True, payload=payload, port=4711)
    with Source(flood, lab, 10_000) as source:
        frame, port_at, sum_at, _ = flood.frame(lab)
        size = len(frame)
        written = [slice(port_at, port_at + 2), slice(sum_at, sum_at + 2)]
        if spread and flood.family == socket.AF_INET:
            written += [slice(24, 26), slice(28, 30), slice(32, 34)]
        elif spread:
            written += [slice(36, 38), slice(52, 54)]
        program = source._object.programs["flood"]
        for number in range(2000):
            data = bytearray(program.run(bytes(frame), room=size).data)
            assert_well_formed(flood, bytes(data), port_at, flood.sender(number))
            for place in written:  # what the stack did with a page it gives back must not matter: spoil it
                data[place] = b"\x5a\xa5"
            frame = bytes(data)
    assert len({flood.sender(number) for number in range(10_000)}) == 10_000
    assert len({flood.sender(number).source for number in range(10_000)}) == (10_000 if spread else 1)
    assert len({flood.sender(number).destination for number in range(10_000)}) == (DESTINATIONS if spread else 1)


@pytest.mark.parametrize("name", list(FLOODS))
def test_a_spread_flood_is_taken_whole_on_every_port_it_is_aimed_at(lab: Lab, name: str) -> None:
    """No packet is lost between its addresses and the counter: neither for a checksum nor for want of a route."""
    flood = replace(FLOODS[name], spread=True, payload=bytes(8) if "udp" in name else b"")
    lab.open_to_many()
    with ExitStack() as stack:
        source = stack.enter_context(Source(flood, lab, 5000))
        counter = stack.enter_context(Counter(lab, flood.counter))
        for port in (4711, 4712):
            stack.enter_context(open_sink(replace(flood, port=port), lab))
            with lab.host:
                before = counter.read()
                assert source.aimed(port).deliver(5000) == 5000
                assert counter.read() - before == 5000


def test_the_sources_take_turns(lab: Lab) -> None:
    flood = FLOODS["udp4"]
    with Source(flood, lab, 3) as source:
        frame, port_at, *_ = flood.frame(lab)
        program = source._object.programs["flood"]
        seen = [struct.unpack_from("!H", program.run(frame, room=64).data, port_at)[0] for _ in range(7)]
    assert [port - FIRST_SOURCE_PORT for port in seen] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("packets", [1, 64, 10_000])
def test_what_is_injected_is_counted_exactly(lab: Lab, flood: Flood, packets: int) -> None:
    with open_sink(flood, lab), Source(flood, lab, 10_000) as source, Counter(lab, flood.counter) as counter, lab.host:
        before = counter.read()
        assert source.send(XDP_PASS, packets) > 0
        assert counter.read() - before == packets
        assert source.frames == packets
        source.send(XDP_DROP, packets)
        assert counter.read() - before == packets  # the harness never reaches the stack
        assert source.frames == 2 * packets


@pytest.mark.parametrize("name", ["udp4", "udp6"])
def test_no_datagram_is_refused_for_its_checksum(lab: Lab, name: str) -> None:
    flood = FLOODS[name]
    counters = {"udp4": ("snmp", "Udp", "InCsumErrors"), "udp6": ("snmp6", "", "Udp6InCsumErrors")}
    with (
        open_sink(flood, lab),
        Source(flood, lab, 60_000) as source,
        Counter(lab, counters[name]) as wrong,
        Counter(lab, flood.counter) as dropped,
        lab.host,
    ):
        source.send(XDP_PASS, 60_000)
        assert (wrong.read(), dropped.read()) == (0, 60_000)


def test_a_listener_never_accepts_and_answers_with_cookies(lab: Lab) -> None:
    flood = FLOODS["syn4"]
    with open_sink(flood, lab) as sink, Source(flood, lab, 100) as source, lab.host:
        assert Path("/proc/sys/net/ipv4/tcp_syncookies").read_text() == "2\n"
        source.send(XDP_PASS, 100)
        table = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
        assert len(table) == 1  # the listener alone: no request socket was kept
        sink.setblocking(False)
        with pytest.raises(BlockingIOError):
            sink.accept()


@pytest.mark.parametrize("name", list(PROGRAMS))
@pytest.mark.parametrize("entries", [1, 1000])
def test_every_program_assigns_the_sink(lab: Lab, flood: Flood, name: str, entries: int) -> None:
    with open_sink(flood, lab) as sink, PROGRAMS[name].open(flood, sink, entries, 1) as program, lab.host:
        assert selects(program, flood, sink)
        with Source(flood, lab, 10_000) as source, Counter(lab, flood.counter) as counter:
            with program.attach_netns(lab.host.fd):
                source.send(XDP_PASS, 1000)
            assert counter.read() == 1000


def test_a_program_that_leaves_the_packets_alone_is_found_out(lab: Lab) -> None:
    flood = FLOODS["udp4"]
    with open_sink(flood, lab) as sink, PROGRAMS["letter"].open(flood, sink, 10, 1) as program:
        assert program.owner is not None
        prefixes = program.owner.maps["prefixes4"]
        prefixes.delete(prefixes.items()[0])
        assert not selects(program, flood, sink)


def test_letters_rule_set_is_what_was_drawn(lab: Lab) -> None:
    flood = FLOODS["udp4"]
    with open_sink(flood, lab) as sink, PROGRAMS["letter"].open(flood, sink, 500, 7) as program:
        assert program.owner is not None
        keys, values = program.owner.maps["prefixes4"].items()
    assert len(keys) == 500
    assert not values.any()
    assert ((keys["length"] >= 16) & (keys["length"] <= 24)).all()
    own = keys[(keys["address"] == [192, 0, 2, 0]).all(axis=1)]
    assert own["length"].tolist() == [24]
    assert len(np.unique(keys)) == 500
