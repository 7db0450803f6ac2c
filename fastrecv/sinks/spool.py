"""A spool: messages on disk from before publish() returns until the engine has acknowledged them, and not for longer.

A process has a folder of its own, which it locks (flock(2)), with segments: files named by the number of their first
message, in which messages stand one behind the other, each with a checksum. What write(2) has taken is in the page
cache, which outlives the process's SIGKILL; nothing is fsynced, so the crash of the host is not covered. A segment is
removed when all in it is acknowledged. How far that is stands in a file of one 64-bit word, so that who takes over a
dead process's folder sends again what was on its way when it died, and little more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import secrets
import struct
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from fastrecv.closing import Closing

__all__ = ["Message", "Spool"]

_LOG = logging.getLogger("fastrecv.sinks")
_HEADER = struct.Struct("<IIQI")  # bytes of data, CRC-32 of number, shard and data, number, shard
_NUMBERED = struct.Struct("<QI")
_SUFFIX = ".messages"
_WORD = "acknowledged"
_SEGMENTS = 16  # of a full spool, about: what is acknowledged and still takes room is less than one
_MOST_SEGMENT = 64 << 20


class Message(NamedTuple):
    """number : among its spool's, from 0."""

    number: int
    shard: int
    data: bytes


class _Segment:
    """A file. first : number of its first message; end : of the one after its last. size : bytes of whole messages."""

    def __init__(self, path: Path, first: int) -> None:
        self.path, self.first, self.end, self.size = path, first, first, 0


class Spool(Closing):
    """The messages of one process, first in first out; for one thread at a time. Made by `new` and `orphans`.

    identity : the folder's name, unlike any other's, and sorted behind those of older ones. torn : messages
    of which a killed process had written a part only. adopted : those that were there when it was opened.
    """

    def __init__(self, folder: Path, lock: int, limit: int) -> None:
        self.identity, self._folder, self._lock, self._limit = folder.name, folder, lock, limit
        self._most = min(limit // _SEGMENTS, _MOST_SEGMENT)
        self._segments: deque[_Segment] = deque()
        self._done: set[int] = set()  # acknowledged behind one that is not
        self._out = self._in = -1
        self._reading: _Segment | None = None  # the segment that _in is of
        self._at = 0
        self.size = self.torn = self._next = self._low = 0
        fd = os.open(folder / _WORD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, 8)  # a hole would be filled at the first store, which is SIGBUS on a full disk
            self._memory = mmap.mmap(fd, 8)
        finally:
            os.close(fd)
        self._word = memoryview(self._memory).cast("Q")
        self._closed = False
        self._look()
        self._low = self._advanced(
            max(min(self._word[0], self._next), self._segments[0].first if self._segments else 0)
        )
        self.adopted = self.waiting

    @classmethod
    def new(cls, parent: Path, limit: int) -> Self:
        """An empty one in a folder of its own. limit : bytes that it may have on disk."""
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            folder = parent / f"{time.time_ns():016x}-{secrets.token_hex(4)}"
            folder.mkdir(mode=0o700)
            lock = _locked(folder)
            if lock is not None:  # else it was taken for a dead process's before it was locked
                return cls._entered(folder, lock, limit)

    @classmethod
    def orphans(cls, parent: Path, limit: int, before: float | None = None) -> Iterator[Self]:
        """Those of dead processes in which messages wait, the oldest first; they are locked now. Empty ones go.

        before : seconds since the epoch; what was written to since then is left alone. So is what cannot be read.
        """
        for folder in sorted(parent.iterdir()):
            if before is not None and _written(folder) > before:
                continue
            lock = _locked(folder)
            if lock is None:
                continue
            try:
                spool = cls._entered(folder, lock, limit)
            except OSError as error:
                _LOG.warning("what a dead process has left cannot be taken over: %s", error)
                continue
            if spool.waiting or spool.torn:
                yield spool
            else:
                spool.close()

    @classmethod
    def _entered(cls, folder: Path, lock: int, limit: int) -> Self:
        """The spool of a folder whose lock is held, and let go where it cannot be opened: OSError."""
        try:
            return cls(folder, lock, limit)
        except OSError as error:
            os.close(lock)
            raise OSError(error.errno, error.strerror, os.fspath(folder)) from None

    @property
    def waiting(self) -> int:
        """Messages that are not acknowledged."""
        return self._next - self._low - len(self._done)

    def append(self, messages: Sequence[tuple[int, bytes]], elsewhere: int = 0) -> bool:
        """Write messages, each a shard and its data: all, or none and False where there is no room for them.

        elsewhere : bytes that count as the spool's own. A full disk is a full spool. ValueError: there never would be
        room. OSError: the disk has failed, and none is there.
        """
        pieces = []
        for number, (shard, data) in enumerate(messages, self._next):
            crc = zlib.crc32(data, zlib.crc32(_NUMBERED.pack(number, shard)))
            pieces += [_HEADER.pack(len(data), crc, number, shard), data]
        written = b"".join(pieces)
        if len(written) > self._limit:
            raise ValueError(f"{len(written)} bytes never fit into a spool of {self._limit}")
        room = self._limit - elsewhere - len(written)
        if self.size > room and not self.waiting:
            self._remove(len(self._segments))
        if self.size > room:
            return False
        try:
            segment = self._active()
            self._write(segment, written)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return False
            raise
        segment.size += len(written)
        self.size += len(written)
        self._next = segment.end = self._next + len(messages)
        return True

    def read(self) -> Message | None:
        """The first message that was neither read, nor dropped or acknowledged before; None where all were."""
        while self._unread():
            length, _, number, shard = _HEADER.unpack(os.pread(self._in, _HEADER.size, self._at))
            start = self._at + _HEADER.size
            self._at = start + length
            if number >= self._low:
                return Message(number, shard, os.pread(self._in, length, start))
        return None

    def has(self, number: int) -> bool:
        """Whether that message, which was read, was neither dropped nor acknowledged since."""
        return number >= self._low and number not in self._done

    def acknowledge(self, number: int) -> bool:
        """It needs to be kept no longer; False where it was not any more."""
        if not self.has(number):
            return False
        self._done.add(number)
        self._move(self._low)
        return True

    def drop_oldest(self) -> int:
        """Give up the oldest segment's messages; how many were not acknowledged."""
        if not self._segments:
            return 0
        before, oldest = self.waiting, self._segments[0]
        self._move(oldest.end)
        if self._segments and self._segments[0] is oldest:
            self._remove(1)  # it is the one that is written to
        return before - self.waiting

    def close(self) -> None:
        """Let it go; the folder stays for who comes next where messages wait in it."""
        if self._closed:
            return
        self._closed = True
        if not self.waiting:
            self._remove(len(self._segments))
            with contextlib.suppress(OSError):  # a stranger's file in it
                (self._folder / _WORD).unlink()
                self._folder.rmdir()
        self._word.release()
        self._memory.close()
        self._close_files()
        os.close(self._lock)

    def _look(self) -> None:
        """Find the segments that are there, and how much of each is whole."""
        for path in sorted(self._folder.glob(f"{'[0-9]' * 20}{_SUFFIX}")):
            segment = _Segment(path, int(path.stem))
            data = memoryview(path.read_bytes())
            for end, number in _whole(data, segment.first):
                segment.size, segment.end = end, number + 1
            self.torn += segment.size < len(data)
            if self._segments:
                self._done.update(range(self._next, segment.first))  # damaged: they are in no file
            self.size += segment.size
            self._next = segment.end
            self._segments.append(segment)

    def _active(self) -> _Segment:
        """The segment that is written to."""
        if self._out < 0 or self._segments[-1].size >= self._most:
            if self._out >= 0:
                os.close(self._out)
                self._out = -1
            path = self._folder / f"{self._next:020}{_SUFFIX}"
            self._out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._segments.append(_Segment(path, self._next))
            self._move(self._low)  # the one before may be acknowledged
        return self._segments[-1]

    def _write(self, segment: _Segment, data: bytes) -> None:
        at = 0
        try:
            while at < len(data):
                at += os.pwrite(self._out, data[at:], segment.size + at)
        except OSError:
            os.ftruncate(self._out, segment.size)
            raise

    def _unread(self) -> bool:
        """Whether there is a message at _at of what is open for reading."""
        while self._segments:
            segment = self._reading
            if segment is not None and self._at < segment.size and segment.end > self._low:
                return True
            after = self._segments[0].first if segment is None else segment.end
            following = next((other for other in self._segments if other.first >= after and other.size), None)
            if following is None:
                return False
            if self._in >= 0:
                os.close(self._in)
            self._in, self._at, self._reading = os.open(following.path, os.O_RDONLY | os.O_CLOEXEC), 0, following
        return False

    def _advanced(self, low: int) -> int:
        """The first at `low` or behind it that is not done with; those before it are forgotten."""
        if self._low < low:
            self._done = {number for number in self._done if number >= low}
        while low in self._done:
            self._done.remove(low)
            low += 1
        return low

    def _move(self, low: int) -> None:
        """All below is done with."""
        self._low = self._word[0] = low = self._advanced(low)
        active = self._segments[-1] if self._out >= 0 else None
        self._remove(sum(1 for segment in self._segments if segment.end <= low and segment is not active))

    def _remove(self, count: int) -> None:
        """The oldest segments, all of whose messages are done with."""
        for _ in range(count):
            segment = self._segments.popleft()
            self.size -= segment.size
            segment.path.unlink()
        if not self._segments and self._out >= 0:
            os.close(self._out)
            self._out = -1

    def _close_files(self) -> None:
        for fd in (self._in, self._out):
            if fd >= 0:
                os.close(fd)
        self._in = self._out = -1


def _whole(data: memoryview, number: int) -> Iterator[tuple[int, int]]:
    """Where each message ends that is there as it was written, and its number."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, crc, found, shard = _HEADER.unpack_from(data, at)
        start, at = at + _HEADER.size, at + _HEADER.size + length
        if at > len(data) or found != number:
            return
        if zlib.crc32(data[start:at], zlib.crc32(_NUMBERED.pack(number, shard))) != crc:
            return
        yield at, number
        number += 1


def _written(folder: Path) -> float:
    """When messages were last written there; 0 where none were."""
    try:
        return max((path.stat().st_mtime for path in folder.glob(f"*{_SUFFIX}")), default=0)
    except FileNotFoundError:  # acknowledged meanwhile: somebody lives there
        return time.time()


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None where another has it, or the folder has gone."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.stat().st_ino == os.fstat(fd).st_ino:
            return fd
    except OSError:  # locked; or removed by who had the lock
        pass
    os.close(fd)
    return None
