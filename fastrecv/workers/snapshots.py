"""What handlers keep of their state: a memfd for each slot, held by the supervisor, with two areas written in turn.

A snapshot is written to the idle area, then published by one word of the slot's row of counters: which area, how long.
So a writer that is killed at any instant leaves a whole one behind, the new one or the one before it. Nobody reads
meanwhile: the next worker of a slot begins when the last has stopped for good. Memory is taken as it is written, and
stays with the slot: twice the longest snapshot at most.
"""

from __future__ import annotations

import os
from errno import EIO

from fastrecv.workers.counters import Row

__all__ = ["LONGEST", "NAME", "SIZE", "Snapshots", "begun"]

NAME = "fastrecv-snapshots"
"""Of the memfd, as /proc/PID/fd shows it."""
LONGEST = 1 << 30
"""Bytes of a snapshot at most: the second area begins here."""
SIZE = 2 * LONGEST
"""Bytes of a memfd at most; RLIMIT_FSIZE counts the place, not what is there."""


def begun(row: Row) -> int:
    """A descriptor of the areas of a slot that begins without state; the caller's to close."""
    row.snapshot = 0
    return os.memfd_create(NAME, os.MFD_CLOEXEC)


class Snapshots:
    """The snapshots of a slot, for its reader; fd stays the caller's."""

    def __init__(self, fd: int, row: Row) -> None:
        self._fd, self._row = fd, row

    def write(self, state: bytes | bytearray | memoryview | None) -> None:
        """Keep a state in the place of the one before; None: it has not changed.

        TypeError, ValueError for what cannot be kept; OSError where there is no memory. The one before stays then.
        """
        if state is None:
            return
        if not isinstance(state, bytes | bytearray | memoryview):
            raise TypeError(f"snapshot() gives {type(state).__name__}: give bytes, or None where nothing has changed")
        left = memoryview(state).cast("B")
        length = len(left)
        if length > LONGEST:
            raise ValueError(f"snapshot() gives {length:,} bytes: {LONGEST:,} at most")
        area = 1 - _area(self._row.snapshot)
        place = area * LONGEST
        while left:
            written = os.pwrite(self._fd, left, place)
            left, place = left[written:], place + written
        self._row.snapshot = length << 2 | area << 1 | 1

    def read(self) -> bytes | None:
        """The last state that was kept; None: none ever was. OSError where somebody has cut it off."""
        word = self._row.snapshot
        if not word:
            return None
        state = os.pread(self._fd, word >> 2, _area(word) * LONGEST)
        if len(state) != word >> 2:
            raise OSError(EIO, f"{len(state):,} bytes are left of a snapshot of {word >> 2:,}")
        return state


def _area(word: int) -> int:
    return word >> 1 & 1
