"""The handler of `fastrecv collect`: what a worker does with the datagrams of its exporters."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Iterable

import msgspec
import numpy as np
import pyarrow as pa

from fastrecv import Batch
from fastrecv._flow import EXPORTER
from fastrecv.collector.aggregate import Aggregation
from fastrecv.collector.decoder import Decoder
from fastrecv.collector.exporters import rows
from fastrecv.collector.outlet import Outlet
from fastrecv.collector.settings import CollectorSettings

__all__ = ["Collector"]

_ROWS = 1 << 16  # that are gathered until they are given to the sink
_EVERY_BATCH = 256  # exporters and templates, up to which the state is kept after every batch
_PAUSE = 10  # where they are more: between two times this often the time that one takes
_LAST = 10.0  # seconds that sinks have at the end


class _State(msgspec.Struct, array_like=True):
    """What the next worker is to know. exact : nothing has come since but what the last batch may have brought."""

    exact: bool
    since: float
    reported: bytes
    decoder: bytes


class Collector:
    """Of one worker, and of those who come after it (fastrecv.workers.handlers).

    Templates, sequence numbers and counts outlive a worker that is killed; flows that no sink has yet do not: those of
    the last `flush` seconds, and what a sink holds back itself. ValueError: the settings make no sense.
    """

    def __init__(self) -> None:
        self._settings = settings = CollectorSettings.given()
        self._decoder = Decoder()
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
        if self._decoder.pending >= _ROWS:
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
            await asyncio.sleep(min(self._settings.flush, window - now % window))
            self._leave(self._decoder.flush())
            if time.time() // window > self._since // window:
                self._end_windows()
                for raw in self._decoder.forget():
                    self._publish(raw)
                self._reported = self._decoder.exporters.table()

    def _leave(self, raws: Iterable[pa.RecordBatch]) -> None:
        for raw in raws:
            if self._aggregation is None:
                self._publish(raw)
                continue
            for row in self._aggregation.add(raw):
                self._publish(row)

    def _publish(self, raw: pa.RecordBatch) -> None:
        self._flows.publish(self._decoder.finish(raw))

    def _end_windows(self) -> None:
        """Nothing is gathered: the window's rows leave, and what exporters have sent."""
        if self._aggregation is not None:
            for row in self._aggregation.close():
                self._publish(row)
        now, table = time.time(), self._decoder.exporters.table()
        if self._exporters is not None:
            counts = rows(table, self._reported, self._since, now)
            if len(counts):
                self._exporters.publish(counts)
        self._since, self._reported, self._changed = now, table, True
