"""Outlets: sinks that may fail, be full, and come back, while the collector goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import pyarrow as pa

from fastrecv.collector.union import Union
from fastrecv.sinks import JetStream, Sink, SinkFull, parsed
from fastrecv.sinks.urls import shown

__all__ = ["Outlet"]

_AGAIN = 5.0  # seconds until a sink that has failed is opened again


class Outlet:
    """Where record batches leave. url : of a sink (fastrecv.sinks.parsed); ValueError.

    sink : None while it has failed. sharded : whether it is one that keeps shards apart. taken, lost : rows that the
    sink has, and that nobody has, because it was full, had failed, or has failed with them.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.sink: Sink | None = parsed(url)
        self.sharded = isinstance(self.sink, JetStream)
        self._union = Union()
        self._again = 0.0
        self._log = logging.getLogger("fastrecv.collector")
        self.taken = self.lost = 0
        self._before: int | None = None  # what was lost before the sink failed

    def open(self) -> None:
        """OSError, ValueError: it cannot be opened."""
        assert self.sink is not None
        self.sink.open()

    def publish(self, parts: Mapping[int, Sequence[pa.RecordBatch]]) -> None:
        """Give rows to the sink, those of each shard at once. What it does not take is counted.

        Its patience is waited for once: where it has no room for a part it is not asked for those behind it.
        """
        rest = sum(len(record) for records in parts.values() for record in records)
        try:
            sink = self._opened()
            if sink is not None:
                for shard, records in parts.items():
                    joined = self._union.joined(*records)
                    taken = self._accepted(sink, joined, shard)
                    rest -= len(joined)
                    self.taken += len(joined) if taken else 0
                    self.lost += 0 if taken else len(joined)
        except SinkFull as error:
            self._log.error("%d rows are lost: %s", rest, error)
        except Exception as error:  # of whatever engine: a disk that is full will have room again
            self._fail(error)
        self.lost += rest

    def look(self) -> None:
        """Notice that the sink has failed with what it had taken, though nothing comes: a thread may be writing."""
        if self.sink is not None and self.sink.statistics().lost:
            try:
                self.sink.flush(0)
            except Exception as error:  # as above
                self._fail(error)

    def close(self, timeout: float) -> None:
        """Wait so many seconds for what the sink has taken, and let go of it."""
        self._tell()
        if (error := self._let_go(timeout)) is not None:
            self._log.error("%s: %s", shown(self._url), error)

    def _let_go(self, timeout: float) -> Exception | None:
        """Close the sink, and count what it has lost of what it had taken; what it says to that."""
        if self.sink is None:
            return None
        sink, self.sink = self.sink, None
        said = None
        try:
            sink.close(timeout)
        except Exception as error:  # as above
            said = error
        lost = sink.statistics().lost
        self.taken, self.lost = self.taken - lost, self.lost + lost
        return said

    def _accepted(self, sink: Sink, record: pa.RecordBatch, shard: int) -> bool:
        """Whether it has; where it refuses these rows alone it stays open."""
        try:
            sink.publish(record, shard)
        except (TypeError, ValueError) as error:
            self._log.error("%d rows are lost: %s", len(record), error)
            return False
        return True

    def _opened(self) -> Sink | None:
        if self.sink is None and time.monotonic() >= self._again:
            sink = parsed(self._url)
            sink.open()
            self.sink = sink
            self._tell()
        return self.sink

    def _tell(self) -> None:
        """Say how many rows were lost because the sink had failed."""
        if self._before is not None and self.lost > self._before:
            self._log.error("%d rows are lost: the sink had failed", self.lost - self._before)
            self._before = None

    def _fail(self, error: Exception) -> None:
        self._log.error("%s has failed, and is opened again in %g s: %s", shown(self._url), _AGAIN, error)
        self._again = time.monotonic() + _AGAIN
        self._tell()
        self._let_go(0)  # which says the same again
        self._before = self.lost
