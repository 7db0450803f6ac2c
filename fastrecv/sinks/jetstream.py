"""NATS JetStream as a sink: at least once, in order by subject, over a spool on disk while the engine is away."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fastrecv.errors import SinkFull
from fastrecv.sinks import engine
from fastrecv.sinks.base import BaseSink
from fastrecv.sinks.delivery import Delivery
from fastrecv.sinks.engine import Access
from fastrecv.sinks.interface import Data, SinkStatistics
from fastrecv.sinks.records import pyarrow, record_batch
from fastrecv.sinks.spool import Message, Spool

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Full", "JetStream"]

Full = Literal["block", "drop-oldest"]
_MESSAGE = 1_000_000  # bytes: nats-server's max_payload is 1 MiB unless configured, headers included
_LEAST_SPOOL = 16 << 20  # bytes: some messages
_SUBJECT = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_SERVER = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:(?P<port>\d{1,5}))?")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_LEFT = 10.0  # seconds for which nobody has written to a spool: a successor would have taken it over at once


class JetStream(BaseSink):
    """Each batch is a message, an Arrow IPC stream, to the subject PREFIX.SHARD; a long one several messages.

    access : the servers and the credentials. prefix : of subjects, words with dots between. spool : a folder, where
    each process makes one of its own below PREFIX. stream : of this name; made, of PREFIX.>, where it is missing, and
    asked for with each message; None leaves it to the servers which stream takes the subjects. spool_size : bytes that
    this process may have on disk, with what it has taken over. full : what publish() does when there is no room:
    "block", wait and then raise SinkFull, or "drop-oldest", give up the oldest segment, a sixteenth of it. window :
    messages that are on their way at once. patience : seconds that publish() waits.

    publish() writes to the spool, always, and returns: what it has returned for a SIGKILL does not lose (but the crash
    of the host may: nothing is fsynced). Who opens the same spool and prefix later takes over what dead processes have
    left and sends it first. Order is kept within a subject, for one process and those that follow it one after the
    other; give each of several processes a spool of its own where the order of a dead one and its successor matters.
    Delivery is at least once: see fastrecv.sinks.delivery for what the stream removes.

    A subject has one message on its way at a time, so a round trip is what bounds it: more shards, or longer batches.
    """

    def __init__(
        self, access: Access, prefix: str, spool: str | os.PathLike[str], *, stream: str | None = None,
        spool_size: int = 1 << 30, full: Full = "block", window: int = 256, patience: float = 5.0,
    ) -> None:  # fmt: skip
        super().__init__(patience)
        if not access.servers:
            raise ValueError("no servers: give host or host:port")
        for server in access.servers:
            found = _SERVER.fullmatch(server)
            if found is None or int(found["port"] or 1) not in range(1, 65536):
                raise ValueError(f"server {server!r}: give host, host:port or [address]:port")
        if not _SUBJECT.fullmatch(prefix):
            raise ValueError(f"prefix {prefix!r}: give words of letters, digits, - and _ with dots between")
        if stream is not None and not _NAME.fullmatch(stream):
            raise ValueError(f"stream {stream!r}: give letters, digits, - and _")
        if spool_size < _LEAST_SPOOL:
            raise ValueError(f"a spool of {spool_size} bytes: give {_LEAST_SPOOL >> 20}M or more")
        if full not in get_args(Full):
            raise ValueError(f"full {full!r}: give {' or '.join(get_args(Full))}")
        if not 1 <= window <= 65536:
            raise ValueError(f"a window of {window}: give 1 to 65536 messages")
        self._access, self._prefix, self._stream, self._window = access, prefix, stream, window
        self._parent, self._limit, self._full = Path(spool) / prefix, spool_size, full
        self._lock = threading.Condition()
        self._spools: list[Spool] = []  # those of dead processes first; the last is our own
        self._rows = self._published = self._adopted = self._acknowledged = 0
        self._dropped = self._duplicates = self._torn = self._reconnects = 0
        self._idle = False  # the thread has seen that there is nothing more
        self._started = False
        self._delivery: Delivery

    def open(self) -> None:
        self._opening()
        pyarrow()
        engine.present(self._access.nkey is not None)
        context = self._access.context()
        self._spools = [Spool.new(self._parent, self._limit)]
        self._delivery = Delivery(self, self._access, context, self._prefix, self._stream, self._window)
        self._delivery.start()

    def publish(self, data: Data, shard: int = 0) -> None:
        self._check(shard)
        record = record_batch(data)
        if not len(record):
            return
        messages = [(shard, part) for part in _messages(record)]
        deadline = time.monotonic() + self.patience
        with self._lock:
            while not self._spools[-1].append(messages, self._elsewhere()):
                if self._full == "drop-oldest" and self._waiting():
                    self._drop()
                elif not self._lock.wait(max(deadline - time.monotonic(), 0)) and time.monotonic() >= deadline:
                    raise SinkFull(f"the spool {self._parent} is full: {self._trouble()}")
            self._rows += len(record)
            self._published += len(messages)
            idle, self._idle = self._idle, False
        if idle:
            self._delivery.wake()

    def flush(self, timeout: float | None = None) -> None:
        self._check()
        with self._lock:
            if not self._lock.wait_for(lambda: not self._waiting(), timeout):
                raise TimeoutError(f"{self._waiting()} messages wait in {self._parent}: {self._trouble()}")

    def close(self, timeout: float | None = None) -> None:
        if self._closed or not self._opened:
            return
        try:
            if self._spools:  # else open() has failed
                self.flush(timeout)
        finally:
            self._closed = True
            if self._spools:
                self._delivery.stop()
            for spool in self._spools:
                spool.close()

    def statistics(self) -> SinkStatistics:
        with self._lock:
            return SinkStatistics(
                self._rows, self._published, self._adopted, self._acknowledged, self._waiting(), self._dropped,
                self._duplicates, self._torn, self._reconnects, sum(spool.size for spool in self._spools),
            )  # fmt: skip

    # For the delivery, in its thread

    def adopt(self) -> None:
        """As delivery.Source has it. What was left only just now is its successor's, unless this is it."""
        since = time.time() - _LEFT if self._started else None
        self._started = True
        for spool in Spool.orphans(self._parent, self._limit, since):
            with self._lock:
                self._spools.insert(len(self._spools) - 1, spool)
                self._adopted += spool.waiting
                self._torn += spool.torn

    def take(self) -> tuple[Spool, Message] | None:
        with self._lock:
            for spool in list(self._spools):
                message = spool.read()
                if message is not None:
                    return spool, message
                self._let_go(spool)
            self._idle = True
            return None

    def kept(self, spool: Spool, message: Message) -> bool:
        with self._lock:
            return spool.has(message.number)

    def acknowledged(self, spool: Spool, message: Message, duplicate: bool) -> None:
        with self._lock:
            if spool.acknowledge(message.number):
                self._acknowledged += 1
                self._duplicates += duplicate
            self._let_go(spool)
            self._lock.notify_all()

    def reconnected(self) -> None:
        with self._lock:
            self._reconnects += 1

    # With the lock

    def _let_go(self, spool: Spool) -> None:
        """Remove a dead process's spool when nothing in it waits."""
        if not spool.waiting and spool in self._spools[:-1]:
            self._spools.remove(spool)
            spool.close()

    def _drop(self) -> None:
        """Give up the oldest segment that there is."""
        oldest = next(spool for spool in self._spools if spool.size)
        self._dropped += oldest.drop_oldest()
        self._let_go(oldest)

    def _elsewhere(self) -> int:
        """Bytes on disk that are not our own spool's."""
        return sum(spool.size for spool in self._spools[:-1])

    def _waiting(self) -> int:
        return sum(spool.waiting for spool in self._spools)

    def _trouble(self) -> str:
        return self._delivery.trouble or "the engine takes less than comes"


def _messages(record: pa.RecordBatch) -> list[bytes]:
    """Arrow IPC streams of at most a message's size, in order. ValueError for a row that is too long."""
    pa = pyarrow()
    if record.nbytes <= _MESSAGE:
        out = pa.BufferOutputStream()
        with pa.ipc.new_stream(out, record.schema) as stream:
            stream.write_batch(record)
        written: bytes = out.getvalue().to_pybytes()
        if len(written) <= _MESSAGE:
            return [written]
    if len(record) == 1:
        raise ValueError(f"a row of {record.nbytes} bytes: a message has room for {_MESSAGE}")
    half = len(record) // 2
    return _messages(_own(record.slice(0, half))) + _messages(_own(record.slice(half)))


def _own(record: pa.RecordBatch) -> pa.RecordBatch:
    """A slice with dictionaries of its own: with the whole one's every message is long, and a single row may be."""
    pa = pyarrow()
    columns = []
    for column in record.columns:
        if pa.types.is_dictionary(column.type):
            used = column.indices.dictionary_encode()
            column = pa.DictionaryArray.from_arrays(  # noqa: PLW2901
                used.indices.cast(column.type.index_type), column.dictionary.take(used.dictionary),
                ordered=column.type.ordered,
            )  # fmt: skip
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=record.schema)
