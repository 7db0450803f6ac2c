"""The handler of the outage bench: what comes goes into a sink, by shard, and twenty times a second it says how it is.

A file a process, in the folder that FOLDER names: a JSON object a line, of the sink's statistics and the moment.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from fastrecv.policies import Policy
from fastrecv.sinks import JsonLines, Shards, parsed

__all__ = ["FOLDER", "HANDLER", "SEED", "SHARDS", "SINK", "STATISTICS", "Publisher"]

FOLDER, SINK, SHARDS = "FASTRECV_OUTAGE_FOLDER", "FASTRECV_OUTAGE_SINK", "FASTRECV_OUTAGE_SHARDS"
HANDLER = f"{__name__}:Publisher"
STATISTICS = ".statistics"
SEED = 1
_EVERY = 0.05  # seconds
_LINGER, _LONG = 0.01, 512  # seconds that the queue has for filling where a batch is not long: few messages cost less
_CLOSING = 20.0  # seconds


class Publisher:
    """Needs no privilege."""

    def start(self) -> None:
        self._shards = Shards(Policy("source", seed=SEED), int(os.environ[SHARDS]))
        self._sink = parsed(os.environ[SINK])
        self._sink.open()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="fastrecv-outage")
        self._thread.start()

    def handle(self, batch: Any) -> None:
        for shard, part in self._shards.split(batch):
            self._sink.publish(part, shard)
        if len(batch) < _LONG:
            time.sleep(_LINGER)

    def stop(self) -> None:
        try:
            self._sink.close(_CLOSING)
        finally:
            self._ended.set()
            self._thread.join()

    def _tell(self) -> None:
        with JsonLines(Path(os.environ[FOLDER]) / f"{os.getpid()}{STATISTICS}") as lines:
            ended = False
            while not ended:
                ended = self._ended.wait(_EVERY)
                lines.publish([{"at": time.monotonic(), **self._sink.statistics()._asdict()}])
