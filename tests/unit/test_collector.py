"""The collector's handler without a supervisor: what it keeps, what it sums up, and what it does when a sink fails."""

from __future__ import annotations

import asyncio
import json
import os
import time
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fastrecv.cli.main import run
from fastrecv.collector import aggregate as aggregating
from fastrecv.collector import handler as handling
from fastrecv.collector import outlet, union
from fastrecv.collector.aggregate import Aggregation
from fastrecv.collector.decoder import Decoder
from fastrecv.collector.handler import Collector
from fastrecv.collector.outlet import Outlet
from fastrecv.collector.settings import SHARDING, VARIABLE, CollectorSettings
from fastrecv.collector.union import Union
from fastrecv.policies import Sender
from fastrecv.sinks import BaseSink, Shards, SinkFull, SinkStatistics
from fastrecv.sinks.interface import Data
from fastrecv.sinks.spool import Spool
from fastrecv.workers.handlers import HandlerError, load
from tests.unit.flow_datagrams import (
    IPFIX,
    NETFLOW9,
    OCTETS,
    Taken,
    a_set,
    batch,
    record5,
    sent,
    sent5,
    template,
    templates,
)

DATAGRAM = sent(NETFLOW9, 1, templates(NETFLOW9, template(256, [(OCTETS, 4)])), a_set(256, (1500).to_bytes(4)))
NEXT = sent(NETFLOW9, 2, a_set(256, (40).to_bytes(4)))
SOURCES = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "198.51.100.7"]
AFTER = sent(NETFLOW9, 4, a_set(256, (50).to_bytes(4)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, "")  # put back at the end
    CollectorSettings(
        sink=f"jsonl:{tmp_path}/flows", exporters=f"jsonl:{tmp_path}/exporters", window=3600, flush=0.01
    ).give()
    return tmp_path


class Clock:
    """In place of the module: the time is what it is told to be."""

    def __init__(self, now: float) -> None:
        self.now, self.monotonic = now, time.monotonic

    def time(self) -> float:
        return self.now


class Stopwatch:
    """The same, for who asks how much time has passed."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def life(*datagrams: bytes, kept: bytes | None = None, killed: bool = False) -> bytes:
    """A collector that takes these, a batch each, and stops, or is killed when they are written; its last state."""
    one = Collector()
    await one.start()
    if kept is not None:
        one.restore(kept)
    for datagram in datagrams:
        one.handle(batch(datagram))
        kept = one.snapshot() or kept
        assert one.snapshot() is None
    if killed:
        while one._decoder.pending:
            await asyncio.sleep(0.01)
        one._ticking.cancel()
        one._flows.close(1)
        assert one._exporters is not None
        one._exporters.close(1)
    else:
        await one.stop()
        kept = one.snapshot()
    assert kept is not None
    return kept


def test_templates_counts_and_sequences_go_to_the_next(folder: Path) -> None:
    kept = asyncio.run(life(DATAGRAM, killed=True))
    kept = asyncio.run(life(NEXT, kept=kept))
    asyncio.run(life(AFTER, kept=kept))
    assert [row["octetDeltaCount"] for row in lines(folder / "flows")] == [1500, 40, 50]
    counted = [(row["datagrams"], row["flows"], row["octets"], row["lost"]) for row in lines(folder / "exporters")]
    assert counted == [(2, 2, 1540, 0), (1, 1, 50, 1)]


def test_a_state_that_is_older_than_the_last_batch_makes_no_losses_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handling, "_EVERY_BATCH", 0)
    kept = asyncio.run(life(DATAGRAM, killed=True))
    asyncio.run(life(AFTER, kept=kept))
    (row,) = lines(folder / "exporters")
    assert (row["datagrams"], row["flows"], row["lost"]) == (2, 2, 0)


def test_a_window_ends_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CollectorSettings(
        sink=f"jsonl:{folder}/flows", exporters=f"jsonl:{folder}/exporters", window=0.1, flush=0.01,
        aggregate=("exporterAddress",),
    ).give()  # fmt: skip

    async def live() -> None:
        one = Collector()
        await one.start()
        one.handle(batch(DATAGRAM, NEXT))
        while not (lines(folder / "exporters") and lines(folder / "flows")):
            await asyncio.sleep(0.01)
        assert [row["octetDeltaCount"] for row in lines(folder / "flows")] == [1540]
        await one.stop()

    asyncio.run(live())
    assert len(lines(folder / "exporters")) == 1, "a window in which nothing came has no row"


def test_without_a_flush_the_sink_has_a_batch_before_it_counts_as_handled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    CollectorSettings(sink=f"nats://127.0.0.1:9/flows?spool={tmp_path}", flush=0, shards=8).give()

    async def live() -> None:
        one = Collector()
        await one.start()
        assert one._flows.sink is not None
        for number, source in enumerate(SOURCES, 1):
            one.handle(batch(DATAGRAM, source=source))
            assert one._flows.sink.statistics()[:2] == (number, number)
        one._ticking.cancel()
        one._flows.close(0)

    asyncio.run(live())
    (orphan,) = Spool.orphans(tmp_path / "flows", 1 << 30)
    messages = [orphan.read() for _ in SOURCES]
    assert [(message.shard, pa.ipc.open_stream(message.data).read_all().column("exporterAddress").to_pylist())
            for message in messages if message is not None] == [
        (bucket % 8, [source]) for source, bucket in zip(SOURCES, map(bucket_of, SOURCES), strict=True)
    ]  # fmt: skip
    orphan.close()


def test_what_fails_once_does_not_end_the_looks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    finish, failed = Decoder.finish, list[pa.RecordBatch]()

    def without_memory(decoder: Decoder, raw: pa.RecordBatch) -> pa.RecordBatch:
        if not failed:
            failed.append(raw)
            raise MemoryError
        return finish(decoder, raw)

    async def live() -> None:
        one = Collector()
        await one.start()
        one.handle(batch(DATAGRAM))
        while not failed:
            await asyncio.sleep(0.01)
        one.handle(batch(NEXT))
        while not lines(folder / "flows"):
            await asyncio.sleep(0.01)
        await one.stop()

    monkeypatch.setattr(Decoder, "finish", without_memory)
    asyncio.run(live())
    assert [row["octetDeltaCount"] for row in lines(folder / "flows")] == [40]
    assert caplog.messages == ["rows are lost: MemoryError"]


def test_sums_of_those_who_go_on_are_theirs_when_others_are_forgotten(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handling, "time", clock := Clock(3600.0))
    CollectorSettings(sink=f"jsonl:{folder}/flows", aggregate=("exporterAddress",), flush=80000, window=3600).give()

    async def live() -> None:
        one = Collector()
        await one.start()
        one._leave(one._decoder.take(batch(DATAGRAM, source="192.0.2.1"), 3600.0))
        one._leave(one._decoder.take(batch(DATAGRAM, NEXT, source="192.0.2.2"), 10799.0))
        one._leave(one._decoder.take(batch(AFTER, source="192.0.2.2"), 10800.0))  # after the end, before the look
        clock.now = 10800.1
        one._look()
        assert len(one._decoder.exporters) == 1
        await one.stop()

    asyncio.run(live())
    found = {(row["flowStartMilliseconds"][11:16], row["exporterAddress"], row["octetDeltaCount"])
             for row in lines(folder / "flows")}  # fmt: skip
    assert found == {("01:00", "192.0.2.1", 1500), ("02:00", "192.0.2.2", 1540), ("03:00", "192.0.2.2", 50)}


def test_a_sink_that_fails_costs_rows_that_are_counted_and_is_opened_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet, "_AGAIN", 0.0)
    (tmp_path / "flows").symlink_to("/dev/full")
    one = Outlet(f"jsonl:{tmp_path}/flows")
    one.open()
    record = pa.record_batch({"x": [1, 2]})
    one.publish({0: [record]})
    assert (one.taken, one.lost) == (0, 2)
    (tmp_path / "flows").unlink()
    one.publish({0: [record]})
    one.close(1)
    assert (one.taken, one.lost) == (2, 2)
    assert lines(tmp_path / "flows") == [{"x": 1}, {"x": 2}]
    assert "flows' has failed, and is opened again in 0 s: [Errno 28] No space left on device" in caplog.messages[0]
    (tmp_path / "flows").unlink()
    (tmp_path / "flows").mkdir()
    with pytest.raises(IsADirectoryError):
        Outlet(f"jsonl:{tmp_path}/flows").open()
    assert caplog.messages[-1] == "2 rows are lost: the sink had failed"


def test_a_sink_without_room_costs_rows_that_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    one = Outlet(f"jsonl:{tmp_path}/pipe?patience=0")
    one.open()
    record = pa.record_batch({"x": ["y" * 1000] * 6000})
    for _ in range(3):
        one.publish({0: [record]})
    assert (one.taken, one.lost) == (6000, 12000)
    assert "6000 rows are lost: " in caplog.messages[0]
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        one.sink.flush(0)  # type: ignore[union-attr]
    one.close(0)


def test_rows_that_a_sink_refuses_cost_no_others_and_its_password_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = Outlet(f"nats://user:sec%2Fret@127.0.0.1:9/flows?spool={tmp_path}")
    one.open()
    one.publish({0: [pa.record_batch({"x": [b"y" * 2_000_000]})]})
    one.publish({0: [pa.record_batch({"x": [b"y"]}), pa.record_batch({"x": [b"z"]})]})
    assert (one.taken, one.lost) == (2, 1)
    assert one.sink is not None
    assert one.sink.statistics().published == 1
    one.close(0)
    assert any(said.startswith("1 rows are lost: a row of 2000") for said in caplog.messages)
    assert "'nats://...@127.0.0.1:9/flows?spool=" in caplog.messages[-1]
    assert "%2Fret" not in caplog.text


def test_rows_of_many_templates_have_one_schema_and_made_up_names_are_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(union, "MOST_UNNAMED", 2)
    found, one = Taken(), Union()
    records = []
    for number, fields in enumerate(
        [[(8, 4)], [(27, 16)], [(9001, 1), (9002, 1), (9003, 1)], [(8, 4), (4, 8)], [(4, 1)]]
    ):
        data = bytes(sum(length for _, length in fields))
        datagram = sent(IPFIX, number, templates(IPFIX, template(256, fields)), a_set(256, data))
        list(found.decoder.take(batch(datagram)))
        records += [one.joined(found.decoder.finish(raw)) for raw in found.decoder.flush()]
    assert one.schema.names[4:] == ["sourceIPv4Address", "sourceIPv6Address", "ie9001", "ie9002", "protocolIdentifier"]
    assert one.left_out == 1
    assert caplog.messages == ["2 columns have names that are not IANA's: further ones are left out"]
    assert records[-1].schema == records[-2].schema == one.schema
    assert records[-1].schema.field("protocolIdentifier").type == pa.uint64()
    rows = [row for record in records for row in record.to_pylist()]
    assert one.joined(*records).to_pylist() == [{name: row.get(name) for name in one.schema.names} for row in rows]
    assert [row.get("sourceIPv4Address") for row in rows] == ["0.0.0.0", None, None, "0.0.0.0", None]  # noqa: S104
    assert [row.get("protocolIdentifier") for row in rows] == [None, None, None, 0, 0]


def test_forged_columns_go_after_an_hour_and_those_that_somebody_has_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(union, "time", clock := Stopwatch())
    monkeypatch.setattr(union, "MOST_UNNAMED", 20)
    one = Union()

    def own(first: int) -> pa.RecordBatch:
        """What two honest exporters have together, of which one says little."""
        return one.joined(*(pa.record_batch({"octetDeltaCount": [first], name: [1]}) for name in ("ie9", "vlanId")))

    names = own(0).schema.names
    assert names == ["octetDeltaCount", "ie9", "vlanId"]
    forged = [pa.record_batch({f"ie{9000 + number}": [b"x"], "sourceIPv4Address": ["::"]}) for number in range(30)]
    one.joined(*forged)
    assert len(own(1).schema) == 3 + 19 + 1
    assert one.left_out == 11
    clock.now = union.FORGOTTEN
    busy = pa.record_batch({"octetDeltaCount": [2]})
    assert len(own(2).schema) == 3 + 19 + 1, "an hour has not passed"
    clock.now += 1
    assert one.joined(busy).schema.names == names, "what was there in this hour stays, in its order"
    assert own(3).schema.names == names
    assert one.joined(*forged[:19]).schema.names[3:5] == ["ie9000", "sourceIPv4Address"]
    assert one.left_out == 11, "there is room for other names again"
    clock.now *= 3
    assert one.joined(busy).to_pylist() == [{"octetDeltaCount": 2}]


def summed(keys: list[str], *datagrams: bytes) -> list[dict[str, Any]]:
    decoder, one = Decoder(), Aggregation(keys, 60.0)
    list(decoder.take(batch(*datagrams), 1000.0))
    for raw in decoder.flush():
        assert not list(one.add(decoder.by_address(raw)))
    rows = [row for raw in one.close() for row in decoder.finish(raw).to_pylist()]
    assert not list(one.close())
    return rows


def test_flows_with_the_same_keys_are_one_row_and_a_key_that_they_lack_is_null() -> None:
    four = templates(IPFIX, template(256, [(8, 4), (1, 4), (2, 4)]), template(257, [(27, 16), (1, 8)]))
    told = a_set(256, *(bytes([10, 0, 0, host, 0, 0, 0, 9, 0, 0, 0, 2]) for host in (1, 2, 1)))
    rows = summed(["sourceIPv4Address", "sourceIPv6Address"], sent(IPFIX, 0, four, told, a_set(257, bytes(24))))
    found = {
        (row["sourceIPv4Address"], row["sourceIPv6Address"]): (
            row["deltaFlowCount"], row["octetDeltaCount"], row["packetDeltaCount"])
        for row in rows
    }  # fmt: skip
    assert found == {("10.0.0.1", None): (2, 18, 4), ("10.0.0.2", None): (1, 9, 2), (None, "::"): (1, 0, None)}
    assert [(row["flowStartMilliseconds"].timestamp(), row["flowEndMilliseconds"].timestamp()) for row in rows] == [
        (960, 1020)] * 3  # fmt: skip


def test_an_exporter_is_one_whatever_its_domains_and_versions() -> None:
    five = [sent5(0, record5(1, 10), engine=engine) for engine in (1, 2)]
    (row,) = summed(["exporterAddress"], *five, DATAGRAM)
    assert (row["exporterAddress"], row["deltaFlowCount"], row["octetDeltaCount"]) == ("192.0.2.1", 3, 1520)
    assert len(summed(["exporterAddress", "observationDomainId"], *five, DATAGRAM)) == 3


def test_a_row_is_of_the_window_in_which_it_came_however_late_anybody_looks() -> None:
    decoder, one = Decoder(), Aggregation(["exporterAddress"], 1.0)
    for now in (100.2, 100.9, 101.1, 104.3):
        list(decoder.take(batch(DATAGRAM), now))
    for raw in decoder.flush():
        assert not list(one.add(raw))
    over = [row for raw in one.close(104.9) for row in raw.to_pylist()]
    over += [row for raw in one.close() for row in raw.to_pylist()]
    found = [(row["flowStartMilliseconds"].timestamp(), row["deltaFlowCount"]) for row in over]
    assert found == [(100, 2), (101, 1), (104, 1)]
    list(decoder.take(batch(DATAGRAM), 104.9))
    for raw in decoder.flush():
        assert not list(one.add(raw))
    assert not list(one.close(104.99))
    assert len(list(one.close(105.0))) == 1


def test_a_window_with_too_many_rows_gives_them_away_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregating, "MOST_GROUPS", 100)
    monkeypatch.setattr(aggregating, "_MERGE", 10)
    decoder, one = Decoder(), Aggregation(["sourceIPv4Address"], 60.0)
    plain, early = templates(IPFIX, template(256, [(8, 4)])), []
    for number in range(10):
        told = a_set(256, *((1000 * number + host).to_bytes(4) for host in range(50)))
        list(decoder.take(batch(sent(IPFIX, 0, plain, told)), 1000.0))
        early += [len(rows) for raw in decoder.flush() for rows in one.add(raw)]
    late = [len(rows) for rows in one.close()]
    assert early
    assert max(early) <= 200
    assert sum(early) + sum(late) == 500


def bucket_of(source: str) -> int:
    found = SHARDING.bucket(Sender(ip_address(source), 1, ip_address("192.0.2.9"), 2))
    assert found is not None
    return found


def sharded(*aggregate: str) -> dict[int, list[dict[str, Any]]]:
    """The rows of four exporters by shard, each of which has sent a flow of as many octets as its place says."""
    decoder = Decoder(Shards(SHARDING, 8))
    for place, source in enumerate(SOURCES):
        list(decoder.take(batch(sent5(0, record5(1, place)), source=source), 1000.0))
    raws = list(decoder.flush())
    if aggregate:
        one = Aggregation(aggregate, 60.0)
        assert not [early for raw in raws for early in one.add(decoder.by_address(raw))]
        raws = list(one.close())
    return {shard: decoder.finish(part).to_pylist() for raw in raws for shard, part in decoder.split(raw)}


def test_rows_are_of_the_shard_of_their_exporters_address_and_sums_of_many_exporters_of_the_first() -> None:
    expected: dict[int, list[int]] = {}
    for place, source in enumerate(SOURCES):
        expected.setdefault(bucket_of(source) % 8, []).append(place)
    assert len(expected) > 1
    for keys in ([], ["exporterAddress"], ["protocolIdentifier", "exporterAddress"]):
        found = sharded(*keys)
        assert {shard: [row["octetDeltaCount"] for row in rows] for shard, rows in found.items()} == expected
        assert [row["exporterAddress"] for shard in sorted(found) for row in found[shard]] == [
            SOURCES[place] for shard in sorted(expected) for place in expected[shard]
        ]
    assert {
        shard: [row["octetDeltaCount"] for row in rows] for shard, rows in sharded("protocolIdentifier").items()
    } == {0: [6]}


def test_few_rows_take_the_addresses_of_their_own_exporters_along_only() -> None:
    decoder = Decoder()
    for source in SOURCES:
        list(decoder.take(batch(sent5(0, record5(1, 1)), source=source)))
    (raw,) = decoder.flush()
    column = decoder.finish(raw.slice(2, 1)).column("exporterAddress")
    assert (column.to_pylist(), column.dictionary.to_pylist()) == ([SOURCES[2]], [SOURCES[2]])


class Choosy(BaseSink):
    """Refuses rows of shard 1, and has no room from shard 3 on."""

    def __init__(self) -> None:
        super().__init__(0)
        self.asked: list[int] = []

    def open(self) -> None:
        self._opening()

    def publish(self, data: Data, shard: int = 0) -> None:
        self.asked.append(shard)
        if shard == 1:
            raise ValueError("a row is too long")
        if shard >= 3:
            raise SinkFull("there is no room")

    def flush(self, timeout: float | None = None) -> None: ...

    def close(self, timeout: float | None = None) -> None:
        self._closed = True

    def statistics(self) -> SinkStatistics:
        return SinkStatistics()


def test_a_part_that_is_refused_costs_no_others_and_a_full_sink_is_waited_for_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Choosy()
    monkeypatch.setattr(outlet, "parsed", lambda _url: sink)
    one = Outlet("choosy:")
    one.open()
    rows = pa.record_batch({"x": [1, 2]})
    one.publish({0: [rows], 1: [rows], 2: [rows, rows], 3: [rows], 4: [rows]})
    assert (one.taken, one.lost, sink.asked) == (6, 6, [0, 1, 2, 3])
    assert caplog.messages == ["2 rows are lost: a row is too long", "4 rows are lost: there is no room"]
    one.publish({0: [rows]})
    assert one.taken == 8
    one.close(0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Missing option '--sink'"),
        (("--sink", "parqet:/x"), "'parqet:/x' is no sink, did you mean 'parquet'?"),
        (("--sink", "jsonl:-", "--exporters", "x"), "'--exporters': 'x' is no sink"),
        (("--sink", "jsonl:-", "--aggregate", "sourceIPv4Adress"), "did you mean 'sourceIPv4Address'?"),
        (("--sink", "jsonl:-", "--aggregate", "octetDeltaCount"), "'octetDeltaCount' is no key"),
        (("--sink", "jsonl:-", "--aggregate", "protocolIdentifier,protocolIdentifier"), "a key is named twice"),
        (("--sink", "jsonl:-", "--window", "0"), "'--window'"),
        (("--sink", "jsonl:-", "--flush", "nan"), "'--flush'"),
        (("--sink", "jsonl:-", "--flush", "0.001"), "'--flush': 0.001: give 0, or 0.01 seconds or more"),
        (("--sink", "nats://h/flows?spool=/x", "--shards", "3"), "3 shards: give a power of two up to 4096"),
        (("--sink", "nats://h/flows?spool=/x", "--shards", "0"), "0 shards: give a power of two up to 4096"),
        (("--sink", "jsonl:-", "--shards", "8"), "8 shards are for sinks with subjects, nats: or tls:, not 'jsonl:-'"),
        (("--sink", "jsonl:-", "-b", "tcp:127.0.0.1:2055"), "flows come over UDP: leave tcp: out"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert run(["collect", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_sinks_stand_in_the_environment_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv("FASTRECV_SINK", "nats://jane:s3cret@localhost/flows?spool=/tmp/x")
    monkeypatch.setenv("FASTRECV_EXPORTERS", "jsonl:-")
    assert run(["collect", "-b", "127.0.0.1:2055", "--check"]) == 0
    printed = capsys.readouterr().out
    assert "s3cret" not in printed
    assert [line.split() for line in printed.splitlines()[1:6]] == [
        ["sink", "nats://...@localhost/flows?spool=/tmp/x", "FASTRECV_SINK"],
        ["aggregate", "-", "default"],
        ["window", "60.0", "default"],
        ["exporters", "jsonl:-", "FASTRECV_EXPORTERS"],
        ["flush", "1.0", "default"],
    ]
    assert CollectorSettings.given().sink.startswith("nats://jane:s3cret@")
    assert CollectorSettings.given().exporters == "jsonl:-"
    monkeypatch.setenv("FASTRECV_SINK", "none")
    assert run(["collect", "-b", "127.0.0.1:2055"]) == 2
    assert "'none' is no sink" in capsys.readouterr().err


def test_check_says_as_json_what_options_have_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    words = ["--sink", "jsonl:-", "--aggregate", "exporterAddress,protocolIdentifier", "--window", "5"]
    assert run(["collect", "-b", "127.0.0.1:2055", *words, "--check", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said)[:5] == ["sink", "aggregate", "window", "exporters", "flush"]
    assert said["sink"] == {"value": "jsonl:-", "source": "--sink"}
    assert said["exporters"] == {"value": None, "source": "default"}
    assert said["aggregate"] == {"value": "exporterAddress,protocolIdentifier", "source": "--aggregate"}
    assert said["window"] == {"value": 5.0, "source": "--window"}
    assert said["bind"] == {"value": "127.0.0.1:2055", "source": "--bind"}


def test_connections_are_refused_whoever_asks_for_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    file = tmp_path / "collector.toml"
    file.write_text('bind = "tcp:127.0.0.1:2055"\n')
    assert run(["collect", "--sink", "jsonl:-", "--config", str(file)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"fastrecv collect: {file}: bind: flows come over UDP: leave tcp: out")
    monkeypatch.setenv("FASTRECV_BIND", "tcp:127.0.0.1:2055")
    assert run(["collect", "--sink", "jsonl:-"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("fastrecv collect: FASTRECV_BIND: flows come over UDP: leave tcp: out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "FASTRECV_COLLECTOR is not set: start the collector with `fastrecv collect`"),
        ("{}", "FASTRECV_COLLECTOR: Object missing required field `sink`"),
        ('{"sink": "jsonl:-", "window": 0}', "window is 0.0: give seconds, more than 0, at most 86400"),
        ('{"sink": "jsonl:-", "flush": -1}', "flush is -1.0: give seconds, 0 to 86400"),
        ('{"sink": "nothing"}', "'nothing' is no sink"),
    ],
)
def test_a_handler_without_settings_says_so(text: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if text is not None:
        monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(HandlerError, match="cannot be made: ValueError: ") as caught:
        load("fastrecv.collector.handler:Collector")
    assert message in str(caught.value)
