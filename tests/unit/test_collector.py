"""The collector's handler without a supervisor: what it keeps, and what leaves when a window or a life ends."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pyarrow as pa
import pytest

from fastrecv.collector import handler as handling
from fastrecv.collector.decoder import Decoder
from fastrecv.collector.handler import Collector
from fastrecv.collector.settings import VARIABLE, CollectorSettings
from fastrecv.sinks.spool import Spool
from fastrecv.workers.handlers import HandlerError, load
from tests.unit.collecting import DATAGRAM, SOURCES, bucket_of, lines
from tests.unit.flow_datagrams import (
    NETFLOW9,
    a_set,
    batch,
    sent,
)

NEXT = sent(NETFLOW9, 2, a_set(256, (40).to_bytes(4)))
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
