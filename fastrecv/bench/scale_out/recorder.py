"""The handler of the hosts: it publishes every batch by shards, and then writes down what it has published.

What stands in its record is what it has acknowledged: publish() has returned for it. A file a process, named after it,
in the folder that FOLDER names; rows of NUMBERED. A second file has one number: how many of its messages the engine had
already.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fastrecv import Batch, sinks
from fastrecv.bench.numbered import NUMBERED
from fastrecv.bench.scale_out.addresses import PREFIX, SERVERS, STREAM
from fastrecv.bench.scale_out.exporters import DATAGRAM, numbered
from fastrecv.bench.survive_recorder import FOLDER, ROWS
from fastrecv.policies import Policy
from fastrecv.sinks import Shards

__all__ = ["HANDLER", "REMOVED", "SHARDS", "SINK", "Recorder", "sink_url"]

HANDLER = f"{__name__}:Recorder"
REMOVED = ".removed"
SINK, SHARDS = "FASTRECV_SINK", "FASTRECV_SHARDS"
"""In the environment: the sink, as text, and how many shards there are."""
_CLOSING = 25.0
"""Seconds to publish what is in the spool: less than a worker has to stop in."""
_POLICY = Policy("source", seed=1)
"""Of every host the same: so an exporter keeps its shard, whichever host it comes to."""


def sink_url(spool: Path) -> str:
    """The sink of one host."""
    return f"nats://{','.join(SERVERS)}/{PREFIX}?stream={STREAM}&spool={spool}"


class Recorder:
    """Needs no privilege."""

    def start(self) -> None:
        self._shards = Shards(_POLICY, int(os.environ[SHARDS]))
        path = Path(os.environ[FOLDER]) / f"{os.getpid()}{ROWS}"
        self._undo = contextlib.ExitStack()
        self._removed = os.open(path.with_suffix(REMOVED), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._undo.callback(os.close, self._removed)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        self._undo.callback(os.close, self._fd)
        self._sink = sinks.parsed(os.environ[SINK])
        self._sink.open()
        self._undo.callback(self._note_removed)
        self._undo.callback(self._sink.close, _CLOSING)

    def handle(self, batch: Batch) -> None:
        for shard, part in self._shards.split(batch):
            self._sink.publish(part.select(["payload"]), shard)
        rows = numbered(batch.records(DATAGRAM))
        assert rows.dtype == NUMBERED
        os.write(self._fd, rows.tobytes())
        self._note_removed()

    def _note_removed(self) -> None:
        """How many messages the engine had already, and has removed by their ids."""
        os.pwrite(self._removed, self._sink.statistics().duplicates.to_bytes(8, "little"), 0)

    def stop(self) -> None:
        self._undo.close()
