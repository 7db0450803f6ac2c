"""What workers count, in memory that all of them and the supervisor map: one row a slot, one writer each at a time.

The writer of a row is the worker that reads the slot's socket, and the supervisor while nobody does; two words are the
supervisor's alone. All words have 64 bits and are aligned, so that nobody sees half of one, even of a writer that was
killed. After a death the next worker counts on, and so does a slot that goes and comes back.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fastrecv._recv import MAX_BATCH
from fastrecv.receiver import Statistics
from fastrecv.workers.settings import MAX_WORKERS

__all__ = ["FILLS", "NAME", "ROW", "STATES", "Counters", "Row"]

NAME = "fastrecv-counters"
"""Of the memfd, as /proc/PID/fd shows it."""
_WORDS = ("pid", "state", "heartbeat", "datagrams", "bytes", "batches", "truncated", "handled", "handler_ns", "failed",
          "errors", "killed", "starts", "snapshot", "deaths", "closed_drops", "by_ring", "ring_drops")  # fmt: skip
FILLS = MAX_BATCH.bit_length()
"""Places of `fill`: batches of 1, of 2 or 3, of 4 to 7, ... datagrams."""
_WIDTH = 32  # words of a row: four cache lines, so that no two writers share one
_FILL = len(_WORDS)
ROW = np.dtype({
    "names": (*_WORDS, "fill"), "formats": [*["<u8"] * len(_WORDS), ("<u8", (FILLS,))],
    "offsets": [8 * place for place in range(len(_WORDS) + 1)], "itemsize": 8 * _WIDTH,
})  # fmt: skip
"""A row. pid : of the writer. state : a place in STATES. heartbeat : CLOCK_MONOTONIC ns of its last sign of life.

datagrams, bytes, batches, truncated : received. handled : datagrams whose handler has returned, handler_ns : what that
took. failed : datagrams of batches whose handler raised an exception, errors : how many such batches, and exceptions of
snapshot and restore. killed : datagrams that were in the hands of workers that died. starts : how many workers have
begun to read. snapshot : where the handler's state is kept (fastrecv.workers.snapshots), 0: nowhere; its upper 62 bits
are the length in bytes. Where nobody reads, datagrams is handled + failed + killed. fill : batches by how many
datagrams they had. by_ring : datagrams that came by AF_XDP; ring_drops : those that were taken off the interface and
dropped there: no frame was free for them, or they were not what they should be.

Of the supervisor alone: deaths : workers that have ended otherwise than told. closed_drops : what the kernel dropped
at sockets of this slot that are closed since.
"""
STATES = ("idle", "reading", "stopped")
_PID, _STATE, _HEARTBEAT, _DATAGRAMS, _BYTES, _BATCHES, _TRUNCATED, _HANDLED, _HANDLER_NS, _FAILED, _ERRORS, _KILLED, \
    _STARTS, _SNAPSHOT, _DEATHS, _CLOSED_DROPS, _BY_RING, _RING_DROPS = range(len(_WORDS))  # fmt: skip
_LENGTH = MAX_WORKERS * ROW.itemsize
_MASK = (1 << 64) - 1


class Counters:
    """The rows of all slots, in a memfd; a context manager. Needs no privilege."""

    def __init__(self, fd: int | None = None) -> None:
        """Those of a descriptor that stays the caller's, or new ones."""
        self._own = fd is None
        if fd is None:
            fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, _LENGTH)
            # Its length is fixed for all: whoever could cut it off would kill those who look at it (SIGBUS).
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.fd = fd
        self._memory = mmap.mmap(fd, _LENGTH)

    def row(self, slot: int) -> Row:
        """To write the row of a slot."""
        return Row(memoryview(self._memory).cast("Q")[slot * _WIDTH : (slot + 1) * _WIDTH])

    def read(self) -> NDArray[np.void]:
        """A copy of all rows, of dtype ROW."""
        return np.frombuffer(bytes(self._memory), ROW)

    def close(self) -> None:
        """Let go of the memory; rows that are still held keep it mapped until they are gone."""
        if self._own and self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Row:
    """One slot's counters, for their writer of the moment."""

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._before = words[_DATAGRAMS], words[_BYTES], words[_BATCHES], words[_TRUNCATED]
        self._rings_before = words[_BY_RING], words[_RING_DROPS]

    def _add(self, word: int, count: int) -> None:
        """By the supervisor, whom no worker can end by what he has written here: it goes round."""
        self._words[word] = (self._words[word] + count) & _MASK

    def begin(self, pid: int) -> None:
        """A worker is about to read; the supervisor says so, and then the row is the worker's."""
        words = self._words
        words[_PID], words[_HEARTBEAT], words[_STATE] = pid, time.monotonic_ns(), STATES.index("reading")
        self._add(_STARTS, 1)

    def beat(self, now: int) -> None:
        """A sign of life; now : time.monotonic_ns()."""
        self._words[_HEARTBEAT] = now

    def received(self, statistics: Statistics, datagrams: int) -> None:
        """What a Receiver has received since the row was opened, just now a batch of so many datagrams."""
        words = self._words
        before_datagrams, before_bytes, before_batches, before_truncated = self._before
        batches, received, size, truncated, _, _ = statistics  # faster than by their names
        words[_DATAGRAMS] = before_datagrams + received
        words[_BYTES] = before_bytes + size
        words[_BATCHES] = before_batches + batches
        words[_TRUNCATED] = before_truncated + truncated
        words[_FILL + datagrams.bit_length() - 1] += 1

    def rings(self, received: int, dropped: int) -> None:
        """What has come by AF_XDP since the row was opened."""
        before_received, before_dropped = self._rings_before
        self._words[_BY_RING], self._words[_RING_DROPS] = before_received + received, before_dropped + dropped

    def handled(self, datagrams: int, nanoseconds: int) -> None:
        """The handler has returned."""
        self._words[_HANDLED] += datagrams
        self._words[_HANDLER_NS] += nanoseconds

    def failed(self, datagrams: int) -> None:
        """The handler has raised an exception: so many are lost, none where only its state is."""
        self._words[_FAILED] += datagrams
        self._words[_ERRORS] += 1

    def stop(self) -> None:
        self._words[_STATE] = STATES.index("stopped")

    @property
    def in_hands(self) -> int:
        """How many datagrams the worker has received and neither handled nor lost, as far as it has counted them."""
        words = self._words
        return max(0, words[_DATAGRAMS] - words[_HANDLED] - words[_FAILED] - words[_KILLED])

    def settle(self) -> int:
        """After a death: how many datagrams the worker had in its hands."""
        lost = self.in_hands
        self._add(_KILLED, lost)
        self._words[_STATE] = STATES.index("idle")
        return lost

    def died(self) -> None:
        """A worker of this slot has ended otherwise than told, whether it has read or not."""
        self._add(_DEATHS, 1)

    def closed(self, drops: int) -> None:
        """A socket of this slot is being closed, at which the kernel has dropped so many datagrams."""
        self._add(_CLOSED_DROPS, drops)

    @property
    def snapshot(self) -> int:
        return self._words[_SNAPSHOT]

    @snapshot.setter
    def snapshot(self, word: int) -> None:
        """One store: whoever is killed before or after it leaves a whole snapshot behind."""
        self._words[_SNAPSHOT] = word

    @property
    def heartbeat(self) -> int:
        """CLOCK_MONOTONIC ns."""
        return int(self._words[_HEARTBEAT])
