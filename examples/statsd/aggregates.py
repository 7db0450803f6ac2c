"""A statsd server: counters, gauges, timers and sets, summed up; a killed worker loses nothing that it has counted.

    export STATSD_SINK=jsonl:- STATSD_EVERY=10
    fastrecv run -b 0.0.0.0:8125 -w 2 aggregates:Aggregates
    python -c 'import statsd; statsd.StatsClient().incr("hits")'

Every STATSD_EVERY seconds (default 10), and when it stops, each worker gives its sink (fastrecv.sinks.parsed) a row
for every metric that it has heard of since, and for every gauge: since, until, series, number, name, kind, and what
the kind says (kinds.py). What is not written yet goes from worker to worker. After a kill the last rows may be written
once more, under the same series and number, with what has come since: the last of a name counts.

A sender's metrics are with one worker, so counters of workers add up, and sets are of one worker's senders. Needs what
`fastrecv run` needs (fastrecv[cli]).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from datetime import UTC, datetime

import msgspec
from kinds import Counter, Gauge, Kind, Members, Sample, Timer, made, samples

from fastrecv import Batch, sinks

__all__ = ["Aggregates"]

MOST = 50_000  # metrics of a worker, since senders are easily forged; samples of all further ones are refused
ROOM = 1_000_000  # members of sets and buckets of timers; where they are so many, samples of these are refused
FORGOTTEN = 3600.0  # seconds of silence until a gauge is
PATIENCE = 5.0  # seconds for what was written to be where it is going
REFUSED = "statsd.refused"
"""A counter of our own: lines that are none, or were one too many."""

Key = tuple[str, str]


class Kept(msgspec.Struct, array_like=True):
    """A metric. heard : when, as time.time() has it."""

    name: str
    kind: str
    heard: float
    metric: Kind


class State(msgspec.Struct, array_like=True):
    """What the next worker is to know. metrics : each an encoded Kept."""

    series: str
    number: int
    since: float
    metrics: list[msgspec.Raw]


class Aggregates:
    """Of one worker, and of those who come after it."""

    def __init__(self) -> None:
        self._every = _seconds(os.environ.get("STATSD_EVERY", "10"))
        try:
            self._sink = sinks.parsed(os.environ.get("STATSD_SINK", ""))
        except ValueError as error:
            raise ValueError(f"STATSD_SINK: {error}") from None
        self._series, self._number, self._since = secrets.token_hex(4), 0, time.time()
        self._metrics: dict[Key, Kept] = {}
        self._encoded: dict[Key, msgspec.Raw] = {}
        self._changed = False
        self._size = 0  # of sets and timers

    async def start(self) -> None:
        self._sink.open()
        self._writing = asyncio.create_task(self._write_again_and_again())

    def handle(self, batch: Batch) -> None:
        now = time.time()
        touched: dict[Key, Kept] = {}
        for datagram, _ in batch.datagrams():
            for sample in samples(datagram):
                key = self._take(sample)
                touched[key] = self._metrics[key]
        for key, kept in touched.items():
            kept.heard = now
            self._encode(key, kept)

    def _take(self, sample: Sample | None) -> Key:
        """Count a sample; which metric has got it, the one of refused lines where it is none."""
        if sample is not None and self._counted(sample):
            return sample.kind, sample.name
        kept = self._metrics.setdefault(("c", REFUSED), Kept(REFUSED, "c", 0.0, Counter()))
        kept.metric.take("1", 1)
        return "c", REFUSED

    def _counted(self, sample: Sample) -> bool:
        key = sample.kind, sample.name
        kept = self._metrics.get(key)
        if kept is None:
            metric = made(sample.kind)
            if metric is None or len(self._metrics) >= MOST:
                return False
            kept = Kept(sample.name, sample.kind, 0.0, metric)
        before = _size(kept.metric)
        if before is not None and self._size >= ROOM:
            return False
        try:
            kept.metric.take(sample.value, sample.weight)
        except (ValueError, OverflowError):
            return False
        self._size += (_size(kept.metric) or 0) - (before or 0)
        self._metrics[key] = kept
        return True

    def _encode(self, key: Key, kept: Kept) -> None:
        """A snapshot is taken after every batch, so only those are encoded of which something has come."""
        self._encoded[key] = msgspec.Raw(msgspec.msgpack.encode(kept))
        self._changed = True

    def snapshot(self) -> bytes | None:
        """All that is not written yet, after every batch with a sample: for less a killed worker would lose some.

        It costs a copy of what all metrics have together, some 55 bytes a counter with a short name, as many as
        there are; sets and timers are the long ones, and encoded anew where a sample of theirs has come.
        """
        if not self._changed:
            return None
        self._changed = False
        return msgspec.msgpack.encode(State(self._series, self._number, self._since, list(self._encoded.values())))

    def restore(self, data: bytes) -> None:
        state = msgspec.msgpack.decode(data, type=State)
        self._series, self._number, self._since = state.series, state.number, state.since
        for raw in state.metrics:
            kept = msgspec.msgpack.decode(raw, type=Kept)
            self._metrics[kept.kind, kept.name] = kept
            self._size += _size(kept.metric) or 0
            self._encode((kept.kind, kept.name), kept)

    async def stop(self) -> None:
        self._writing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._writing
        try:
            self._write()
        finally:
            self._sink.close()

    # What is written

    async def _write_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            try:
                self._write()
            except Exception as error:  # a full disk will have room again: what was counted stays until then
                logging.getLogger("aggregates").error("nothing can be written: %s", error)

    def _write(self) -> None:
        """Give the sink what was counted since the last time, and begin anew."""
        now = time.time()
        rows = [self._row(kept, now) for kept in self._metrics.values()]
        if rows:
            self._sink.publish(rows)
            self._sink.flush(PATIENCE)
            self._number += 1
        self._since = now
        for key, kept in list(self._metrics.items()):
            if not isinstance(kept.metric, Gauge) or kept.heard < now - FORGOTTEN:
                del self._metrics[key], self._encoded[key]
                self._size -= _size(kept.metric) or 0
                self._changed = True

    def _row(self, kept: Kept, now: float) -> dict[str, object]:
        return {
            "since": _moment(self._since), "until": _moment(now), "series": self._series, "number": self._number,
            "name": kept.name, "kind": kept.kind, **kept.metric.row(max(now - self._since, 0.001)),
        }  # fmt: skip


def _size(metric: Kind) -> int | None:
    """Of what grows with its samples; None: it does not."""
    return metric.size if isinstance(metric, Timer | Members) else None


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) <= 86400:
            return seconds
    raise ValueError(f"STATSD_EVERY is {text!r}: give seconds, more than 0, at most 86400")
