"""The handler of `fastrecv collect`: what a worker does with the datagrams of its exporters."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator

import msgspec
import numpy as np
import pyarrow as pa

from fastrecv import Batch
from fastrecv._flow import EXPORTER
from fastrecv.collector.aggregate import Aggregation
from fastrecv.collector.decoder import Decoder
from fastrecv.collector.exporters import rows
from fastrecv.collector.outlet import Outlet
from fastrecv.collector.settings import SHARDING, CollectorSettings
from fastrecv.sinks import Shards

__all__ = ["Collector"]

_LOG = logging.getLogger("fastrecv.collector")
_ROWS = 1 << 16  # that are gathered until they are given to the sink
_EVERY_BATCH = 256  # exporters and templates, up to which the state is kept after every batch
_PAUSE = 10  # where they are more: between two times this often the time that one takes
_LAST = 10.0  # seconds that sinks have at the end
_LOOK = 1.0  # seconds until a sink is looked at, where nothing waits for it


class _State(msgspec.Struct, array_like=True):
    """What the next worker is to know. exact : nothing has come since but what the last batch may have brought."""

    exact: bool
    since: float
    reported: bytes
    decoder: bytes


class Collector:
    """Of one worker, and of those who come after it (fastrecv.workers.handlers).

    Templates, sequence numbers and counts outlive a worker that is killed; flows that no sink has yet do not: those of
    the last `flush` seconds, and what a sink holds back itself. Where `flush` is 0 the sink has all flows of a batch
    before handle() returns, and so before it counts as handled. ValueError: the settings make no sense.
    """

    def __init__(self) -> None:
        self._settings = settings = CollectorSettings.given()
        self._decoder = Decoder(Shards(SHARDING, settings.shards) if settings.shards > 1 else None)
        self._aggregation = Aggregation(settings.aggregate, settings.window) if settings.aggregate else None
        self._flows = Outlet(settings.sink)
        self._exporters = None if settings.exporters is None else Outlet(settings.exporters)
        self._reported = self._decoder.exporters.table()
        self._since = time.time()
        self._changed = self._ended = False
        self._again = 0.0

    async def start(self) -> None:
        self._flows.open()
        if self._exporters is not None:
            self._exporters.open()
        gc.freeze()  # what was imported is no garbage, and would be looked through again and again
        self._ticking = asyncio.create_task(self._tick())

    def handle(self, batch: Batch) -> None:
        self._changed = True
        self._leave(self._decoder.take(batch))
        if self._decoder.pending >= (_ROWS if self._settings.flush else 1):
            self._leave(self._decoder.flush())

    async def stop(self) -> None:
        self._ticking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._ticking
        self._leave(self._decoder.flush())
        self._end_windows()
        self._ended = self._changed = True
        self._flows.close(_LAST)
        if self._exporters is not None:
            self._exporters.close(_LAST)

    # State

    def snapshot(self) -> bytes | None:
        began = time.monotonic()
        exact = self._ended or max(len(self._decoder.exporters), self._decoder.known) <= _EVERY_BATCH
        if not self._changed or not (exact or began >= self._again):
            return None
        state = msgspec.msgpack.encode(
            _State(exact, self._since, self._reported.tobytes(), self._decoder.snapshot())
        )  # fmt: skip
        self._changed, self._again = False, time.monotonic() + _PAUSE * (time.monotonic() - began)
        return state

    def restore(self, data: bytes) -> None:
        state = msgspec.msgpack.decode(data, type=_State)
        self._decoder.restore(state.decoder, state.exact)
        self._since, self._reported = state.since, np.frombuffer(state.reported, EXPORTER)
        self._changed = True

    # What leaves

    async def _tick(self) -> None:
        window = self._settings.window
        while True:
            now = time.time()
            await asyncio.sleep(min(self._settings.flush or _LOOK, window - now % window))
            try:
                self._look()
            except Exception as error:  # no memory, say, for what somebody has sent: the next look is to come
                _LOG.error("rows are lost: %s", str(error) or type(error).__name__)

    def _look(self) -> None:
        window, now = self._settings.window, time.time()
        self._leave(self._decoder.flush())
        self._flows.look()
        if self._exporters is not None:
            self._exporters.look()
        if now // window != self._since // window:  # a clock may be set back, too
            self._end_windows(now)
            if self._aggregation is not None and self._decoder.silent(now):
                self._publish(self._flows, self._aggregation.close())  # sums are by the numbers that exporters have now
            self._leave(self._decoder.forget(now))
            self._reported = self._decoder.exporters.table()

    def _leave(self, raws: Iterable[pa.RecordBatch]) -> None:
        """Rows of flows, raw, or the sums of them, go to the sink: of all templates together."""
        self._publish(self._flows, raws if self._aggregation is None else self._summed(self._aggregation, raws))

    def _summed(self, aggregation: Aggregation, raws: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for raw in raws:
            yield from aggregation.add(self._decoder.by_address(raw))

    def _publish(self, outlet: Outlet, raws: Iterable[pa.RecordBatch]) -> None:
        ready: defaultdict[int, list[pa.RecordBatch]] = defaultdict(list)  # by shard
        rows = 0
        for raw in raws:
            rows += len(raw)
            for shard, part in self._decoder.split(raw) if outlet.sharded else [(0, raw)]:
                ready[shard].append(self._decoder.finish(part))
            if rows >= _ROWS:
                outlet.publish(ready)
                ready.clear()
                rows = 0
        if ready:
            outlet.publish(ready)

    def _end_windows(self, now: float | None = None) -> None:
        """Nothing is gathered: the rows of windows that are over by now leave, and what exporters have sent."""
        if self._aggregation is not None:
            self._publish(self._flows, self._aggregation.close(now))
        now, table = time.time(), self._decoder.exporters.table()
        if self._exporters is not None:
            counts = rows(table, self._reported, self._since, now)
            if len(counts):
                self._publish(self._exporters, [counts])
        self._since, self._reported, self._changed = now, table, True
