"""Datagrams of NetFlow and IPFIX for the example collector: as RFC 3954 and RFC 7011 have them, and as nobody has."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import collector
import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from collector import Collector
from flows import IPFIX, MOST_FIELDS, MOST_TEMPLATES, NETFLOW5, NETFLOW9, OCTETS, PACKETS, VARIABLE, Exporter, key
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrecv import Batch
from fastrecv.sockets import endpoints
from fastrecv.workers.handlers import HandlerError, load

SOURCE = 77
ADDRESS = ip_address("::ffff:192.0.2.1").packed
ENTERPRISE = 0x8000 | OCTETS  # octets of an enterprise are its own affair


def sent(version: int, sequence: int, *sets: bytes) -> bytes:
    data = b"".join(sets)
    if version == NETFLOW9:
        return struct.pack("!HHIIII", 9, len(sets), 1, 2, sequence, SOURCE) + data
    return struct.pack("!HHIII", 10, 16 + len(data), 2, sequence, SOURCE) + data


def a_set(number: int, *contents: bytes, padding: int = 0) -> bytes:
    data = b"".join(contents) + bytes(padding)
    return struct.pack("!HH", number, 4 + len(data)) + data


def template(name: int, fields: Sequence[tuple[int, int]]) -> bytes:
    return struct.pack("!HH", name, len(fields)) + specifiers(fields)


def specifiers(fields: Sequence[tuple[int, int]]) -> bytes:
    return b"".join(
        struct.pack("!HH", element, length) + (b"corp" if element & 0x8000 else b"") for element, length in fields
    )


def options(version: int, name: int, scope: Sequence[tuple[int, int]], fields: Sequence[tuple[int, int]]) -> bytes:
    both = specifiers(scope) + specifiers(fields)
    if version == NETFLOW9:
        return struct.pack("!HHH", name, 4 * len(scope), 4 * len(fields)) + both
    return struct.pack("!HHH", name, len(scope) + len(fields), len(scope)) + both


def templates(version: int, *contents: bytes, padding: int = 0) -> bytes:
    return a_set({NETFLOW9: 0, IPFIX: 2}[version], *contents, padding=padding)


def options_templates(version: int, *contents: bytes) -> bytes:
    return a_set({NETFLOW9: 1, IPFIX: 3}[version], *contents)


def taken(*datagrams: bytes) -> Exporter:
    version, source = key(memoryview(datagrams[0]))
    exporter = Exporter(ADDRESS, version, source)
    for datagram in datagrams:
        exporter.take(memoryview(datagram))
    return exporter


def counts(exporter: Exporter) -> tuple[int, int, int, int]:
    return exporter.flows, exporter.octets, exporter.packets, exporter.malformed


both = pytest.mark.parametrize("version", [NETFLOW9, IPFIX])


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], bytes, tuple[int, int, int]]:
    """A version, fields, records of them, and what these say: flows, octets, packets."""
    version = draw(st.sampled_from([NETFLOW9, IPFIX]))
    others = st.tuples(st.sampled_from([4, 7, 8, 12, 27, 300]), st.integers(1, 20))
    if version == IPFIX:
        others |= st.tuples(st.sampled_from([82, 313, ENTERPRISE]), st.integers(1, 9) | st.just(VARIABLE))
    fields = draw(st.lists(others, min_size=1, max_size=6))
    fields.insert(draw(st.integers(0, len(fields))), (OCTETS, draw(st.integers(1, 8))))
    if draw(st.booleans()):
        fields.insert(draw(st.integers(0, len(fields))), (PACKETS, draw(st.integers(1, 8))))
    data, sums = b"", {OCTETS: 0, PACKETS: 0}
    records = draw(st.integers(1, 12))
    for _ in range(records):
        for element, length in fields:
            low, high = (0, 300) if length == VARIABLE else (length, length)
            value = draw(st.binary(min_size=low, max_size=high))
            if element in sums:
                sums[element] += int.from_bytes(value)
            if length == VARIABLE:
                data += bytes([len(value)]) if len(value) < 255 else struct.pack("!BH", 255, len(value))
            data += value
    return version, fields, data, (records, sums[OCTETS] % 2**64, sums[PACKETS] % 2**64)


@settings(max_examples=150, deadline=None)
@given(data_sets(), st.data())
def test_any_fields_of_any_length_are_summed_and_whatever_is_cut_off_or_changed_raises_nothing(
    of: tuple[int, list[tuple[int, int]], bytes, tuple[int, int, int]], data: st.DataObject
) -> None:
    version, fields, records, expected = of
    learnt, told = templates(version, template(256, fields)), a_set(256, records)
    first, second = sent(version, 1, learnt), sent(version, 2, told)
    assert counts(taken(first, second)) == (*expected, 0)
    assert counts(taken(sent(version, 1, learnt, told))) == (*expected, 0)
    cut = data.draw(st.integers(0, len(second) - 1))
    exporter = taken(first, second[:cut])
    assert exporter.malformed == (0 if version == NETFLOW9 and cut == 20 else 1)
    changed = bytearray(data.draw(st.sampled_from([first, second])))
    changed[data.draw(st.integers(2, len(changed) - 1))] = data.draw(st.integers(0, 255))
    assert taken(first, bytes(changed), second).datagrams == 3


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([NETFLOW5, NETFLOW9, IPFIX]), st.lists(st.binary(max_size=200), min_size=1))
def test_noise_raises_nothing(version: int, noise: list[bytes]) -> None:
    exporter = Exporter(ADDRESS, version, 0)
    for data in noise:
        exporter.take(memoryview(version.to_bytes(2) + data))
    assert exporter.datagrams == len(noise)


def record5(packets: int, octets: int) -> bytes:
    return bytes(16) + struct.pack("!II", packets, octets) + bytes(24)


def sent5(sequence: int, *records: bytes) -> bytes:
    return struct.pack("!HHIIIIBBH", 5, len(records), 1, 2, 3, sequence, 1, 4, 0) + b"".join(records)


def test_version_5() -> None:
    first, second = sent5(0, record5(1, 40), record5(2**32 - 1, 2**32 - 1)), sent5(7, record5(3, 100))
    exporter = taken(first, second, second[:-1], second + b"0", sent5(8))
    assert (exporter.version, exporter.source) == (5, 0x0104)
    assert counts(exporter) == (3, 2**32 + 139, 2**32 + 3, 3)
    assert exporter.lost == 5


@both
def test_templates_are_of_a_source_and_data_without_one_is_counted(version: int) -> None:
    data = a_set(300, bytes([7, 7]))
    exporter = taken(sent(version, 0, data, data))
    assert (exporter.unknown, exporter.flows, exporter.malformed) == (2, 0, 0)
    exporter.take(memoryview(sent(version, 1, templates(version, template(300, [(OCTETS, 1)])), data)))
    assert counts(exporter) == (2, 14, 0, 0)
    exporter.take(memoryview(sent(version, 2, templates(version, template(300, [(PACKETS, 2)])), data)))
    assert counts(exporter) == (3, 14, 0x0707, 0)  # a template may change


@both
def test_options_are_no_flows(version: int) -> None:
    exporter = taken(
        sent(
            version, 0,
            options_templates(version, options(version, 400, [(OCTETS, 4)], [(OCTETS, 4), (41, 8)])),
            templates(version, template(401, [(OCTETS, 4)])),
            a_set(400, bytes(16), bytes(16)),
            a_set(401, (9).to_bytes(4)),
        ),
    )  # fmt: skip
    assert counts(exporter) == (1, 9, 0, 0)
    assert (exporter.unknown, exporter.lost) == (0, 0)
    assert exporter.due == (1 if version == NETFLOW9 else 3)


@both
def test_padding_is_no_record(version: int) -> None:
    fields = [(OCTETS, 4), (27, 1)]
    exporter = taken(
        sent(version, 0, templates(version, template(256, fields), padding=3), a_set(256, bytes(5), padding=3))
    )
    assert counts(exporter) == (1, 0, 0, 0)


def test_templates_are_withdrawn() -> None:
    plain = templates(IPFIX, template(256, [(OCTETS, 1)]), template(257, [(OCTETS, 1)]))
    special = options_templates(IPFIX, options(IPFIX, 258, [(149, 4)], [(41, 4)]))
    for withdrawn, left in (
        (templates(IPFIX, template(257, [])), {256, 258}),
        (templates(IPFIX, template(999, [])), {256, 257, 258}),
        (templates(IPFIX, template(258, [])), {256, 257, 258}),  # that is one of options
        (options_templates(IPFIX, template(258, [])), {256, 257}),
        (templates(IPFIX, template(2, [])), {258}),
        (options_templates(IPFIX, template(3, [])), {256, 257}),
    ):
        exporter = taken(sent(IPFIX, 0, plain, special), sent(IPFIX, 0, withdrawn))
        assert (set(exporter.templates), exporter.malformed, exporter.lost) == (left, 0, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        templates(NETFLOW9, template(255, [(OCTETS, 4)])),
        templates(NETFLOW9, template(256, [])),
        templates(NETFLOW9, template(256, [(OCTETS, 0)])),
        templates(NETFLOW9, template(256, [(OCTETS, 4)] * (MOST_FIELDS + 1))),
        templates(NETFLOW9, *(template(256 + name, [(OCTETS, 4)]) for name in range(MOST_TEMPLATES + 1))),
        templates(NETFLOW9, template(256, [(OCTETS, 4)] * 3)[:-1]),
        options_templates(NETFLOW9, b"\1\0\0\4"),
        a_set(256),
        a_set(200, bytes(8)),
        struct.pack("!HH", 256, 3),
        struct.pack("!HH", 256, 9),
        b"\0",
    ],
)
def test_what_is_malformed(wrong: bytes) -> None:
    good = templates(NETFLOW9, template(256, [(OCTETS, 4)]))
    assert taken(sent(NETFLOW9, 0, good), sent(NETFLOW9, 1, wrong)).malformed == 1
    assert taken(sent(NETFLOW9, 0, good)).malformed == 0


def test_gaps_in_sequence_numbers_are_losses() -> None:
    def lost(version: int, *numbers: int, records: int = 3) -> int:
        plain = templates(version, template(256, [(OCTETS, 1)]))
        return taken(*(sent(version, number, plain, a_set(256, bytes(records))) for number in numbers)).lost

    assert lost(NETFLOW9, 5, 6, 9, 10) == 2
    assert lost(NETFLOW9, 2**32 - 1, 0, 1) == 0
    assert lost(NETFLOW9, 2**32 - 2, 1) == 2
    assert lost(NETFLOW9, 5000, 0, 1, 2) == 0  # it has begun anew
    assert lost(NETFLOW9, 2**31 + 5, 0, 1) == 0
    assert lost(IPFIX, 0, 3, 9, 12) == 3
    assert lost(IPFIX, 2**32 - 3, 0, 3) == 0


def test_gaps_of_an_exporter_that_counts_the_datagram_itself_in() -> None:
    plain = templates(IPFIX, template(256, [(OCTETS, 1)]))
    datagrams = [sent(IPFIX, sequence, plain, a_set(256, bytes(records)))
                 for sequence, records in ((24, 24), (56, 32), (88, 32), (100, 12))]  # fmt: skip
    assert taken(*datagrams).lost == 0
    assert taken(*datagrams[:1], *datagrams[2:]).lost == 40  # of 32: by its own first number 24 were to come


def test_after_records_that_nobody_could_count_no_loss_is_made_up() -> None:
    plain = templates(IPFIX, template(256, [(OCTETS, 1)]))
    assert taken(sent(IPFIX, 0, plain), sent(IPFIX, 0, a_set(999, b"?")), sent(IPFIX, 7, plain)).lost == 0


# The handler


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLOWS_FOLDER", str(tmp_path))
    return tmp_path


def batch(*datagrams: bytes, source: str = "192.0.2.1") -> Batch:
    return Batch.of(datagrams, endpoints([(source, 4711)] * len(datagrams)))


def read(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


DATAGRAM = sent(NETFLOW9, 1, templates(NETFLOW9, template(256, [(OCTETS, 4)])), a_set(256, (1500).to_bytes(4)))
NEXT = sent(NETFLOW9, 2, a_set(256, (40).to_bytes(4)))


def test_state_goes_to_the_next_and_a_file_is_written_again_where_a_kill_came_between(folder: Path) -> None:
    first = Collector()
    first.handle(batch(DATAGRAM))
    kept = first.snapshot()
    assert kept is not None
    assert first.snapshot() is None
    first._write()  # and is killed
    assert [row["octets"] for row in read(folder)] == [1500]

    second = Collector()
    second.restore(kept)
    second.handle(batch(NEXT))
    second._write()
    assert [(row["flows"], row["octets"], row["lost"]) for row in read(folder)] == [(2, 1540, 0)]
    kept = second.snapshot()
    assert kept is not None

    third = Collector()
    third.restore(kept)
    third.handle(batch(NEXT))
    third._write()
    assert [(row["flows"], row["octets"], row["exporter"], row["source"]) for row in read(folder)] == [
        (2, 1540, "192.0.2.1", SOURCE), (1, 40, "192.0.2.1", SOURCE)]  # fmt: skip
    assert not list(folder.glob("*.part"))


def test_a_state_that_is_none_changes_nothing(folder: Path) -> None:
    one = Collector()
    for data in (b"nonsense", b"", msgspec.msgpack.encode({"series": "x"})):
        with pytest.raises(msgspec.DecodeError):
            one.restore(data)
    one.handle(batch(DATAGRAM))
    one._write()
    assert len(read(folder)) == 1


def test_a_full_disk_loses_no_counts(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def live() -> None:
        one = Collector()
        one._every = 0.01
        one._folder = folder / "absent"
        await one.start()
        one.handle(batch(DATAGRAM))
        while not caplog.messages:
            await asyncio.sleep(0.01)
        one._folder = folder
        while not read(folder):
            await asyncio.sleep(0.01)
        await one.stop()

    asyncio.run(live())
    assert f"nothing can be written to {folder / 'absent'}: " in caplog.messages[0]
    assert [row["octets"] for row in read(folder)] == [1500]


def test_forged_exporters_are_counted_as_one_and_silent_ones_forgotten(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "MOST", 3)
    one = Collector()
    for host in range(1, 6):
        one.handle(batch(DATAGRAM, DATAGRAM, source=f"192.0.2.{host}"))
    one._write()
    rows = {row["exporter"]: (row["datagrams"], row["flows"], row["malformed"]) for row in read(folder)}
    assert rows == {f"192.0.2.{host}": (2, 2, 0) for host in (1, 2, 3)} | {"::": (4, 0, 4)}
    monkeypatch.setattr(collector, "FORGOTTEN", -1.0)
    one._write()
    assert one._exporters == {}
    kept = one.snapshot()
    assert kept is not None
    assert msgspec.msgpack.decode(kept)["exporters"] == []


def test_addresses_are_those_of_the_family(folder: Path) -> None:
    one = Collector()
    one.handle(batch(DATAGRAM, source="2001:db8::1"))
    one.handle(batch(DATAGRAM))
    one._write()
    assert [row["exporter"] for row in read(folder)] == ["2001:db8::1", "192.0.2.1"]
    (table,) = map(pq.read_table, folder.glob("*.parquet"))
    assert table.schema.equals(collector.SCHEMA)
    assert np.all(table["until"].to_numpy() > table["since"].to_numpy())


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FLOWS_FOLDER": ""}, "FLOWS_FOLDER is '': set it to a folder that user "),
        ({"FLOWS_FOLDER": "/nonexistent"}, "FLOWS_FOLDER is '/nonexistent': set it to a folder"),
        ({"FLOWS_EVERY": "often"}, "FLOWS_EVERY is 'often': give seconds, more than 0, at most 86400"),
        ({"FLOWS_EVERY": "nan"}, "FLOWS_EVERY is 'nan'"),
        ({"FLOWS_EVERY": "0"}, "FLOWS_EVERY is '0'"),
    ],
)
def test_wrong_variables(
    variables: dict[str, str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HandlerError, match="'collector:Collector' cannot be made: ValueError: ") as caught:
        load("collector:Collector")
    assert message in str(caught.value)
