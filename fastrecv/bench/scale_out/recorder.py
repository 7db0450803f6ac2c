"""The handler of the hosts: that of `fastrecv collect`, which beside it writes down what it has acknowledged.

That is what it has returned for: with --flush 0 all records of a batch are in the sink's spool by then. So nobody has
to believe the collector's own counts. A file a process, named after it, in the folder that FOLDER names; rows of
NUMBERED. A second file has one number: how many of its messages the engine had already, and has removed by their ids.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from fastrecv import Batch
from fastrecv.bench.numbered import NUMBERED
from fastrecv.bench.scale_out.addresses import PREFIX, SERVERS, SHARDS, STREAM
from fastrecv.bench.scale_out.exporters import DATAGRAM, numbered
from fastrecv.bench.survive_recorder import FOLDER, ROWS
from fastrecv.collector.handler import Collector
from fastrecv.collector.settings import VARIABLE, CollectorSettings

__all__ = ["HANDLER", "REMOVED", "Recorder", "environment"]

HANDLER = f"{__name__}:Recorder"
REMOVED = ".removed"


def environment(folder: Path, spool: Path) -> dict[str, str]:
    """What the collector of a host is told, as `fastrecv collect --shards --flush 0 --sink` would, and its records."""
    sink = f"nats://{','.join(SERVERS)}/{PREFIX}?stream={STREAM}&spool={spool}"
    settings = CollectorSettings(sink=sink, shards=SHARDS, flush=0)
    return {VARIABLE: msgspec.json.encode(settings).decode(), FOLDER: str(folder)}


class Recorder(Collector):
    """Needs no privilege."""

    async def start(self) -> None:
        path = Path(os.environ[FOLDER]) / f"{os.getpid()}{ROWS}"
        self._undo = contextlib.ExitStack()
        self._removed = self._opened(path.with_suffix(REMOVED))
        self._rows = self._opened(path, os.O_APPEND)
        await super().start()
        sink = self._flows.sink
        assert sink is not None
        self._sink = sink

    def _opened(self, path: Path, flags: int = 0) -> int:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o666)
        self._undo.callback(os.close, fd)
        return fd

    def handle(self, batch: Batch) -> None:
        super().handle(batch)
        rows = numbered(batch.records(DATAGRAM))
        assert rows.dtype == NUMBERED
        os.write(self._rows, rows.tobytes())
        self._note_removed()

    def _note_removed(self) -> None:
        os.pwrite(self._removed, self._sink.statistics().duplicates.to_bytes(8, "little"), 0)

    async def stop(self) -> None:
        with self._undo:
            await super().stop()
            self._note_removed()
