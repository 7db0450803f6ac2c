"""Lines of JSON on standard output or at the end of a file: what people read, and other programs take from a pipe."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import sys
import time

from fastrecv.errors import SinkFull
from fastrecv.sinks.base import BaseSink
from fastrecv.sinks.interface import Data, SinkStatistics
from fastrecv.sinks.records import json_lines

__all__ = ["JsonLines"]

_ROOM = 4 << 20  # bytes that may wait for a reader
_PIECE = select.PIPE_BUF  # a pipe that polls as writable takes so much whole (pipe(7))


class JsonLines(BaseSink):
    """An object a row and line. Shards make no difference, and nothing outlives the process but what is written.

    path : of a file, to whose end is written; "-" is standard output. patience : seconds that publish() waits for the
    reader of a pipe when 4 MiB wait already. Processes that share a pipe may all write to it: no line of up to 4 KiB
    is torn apart.
    """

    def __init__(self, path: str | os.PathLike[str] = "-", *, patience: float = 5.0) -> None:
        super().__init__(patience)
        self._path = os.fspath(path)
        self._fd, self._most = -1, _ROOM
        self._regular = False
        self._socket: socket.socket | None = None
        self._buffer = bytearray()
        self._ends: list[int] = []  # where in all that was ever written each waiting publish() ends
        self._taken = self._written = 0  # bytes
        self._rows = self._published = 0

    def open(self) -> None:
        self._opening()
        if self._path == "-":
            self._fd = _own(sys.__stdout__.fileno() if sys.__stdout__ is not None else 1)
        else:  # without O_NONBLOCK it would wait for the reader of a FIFO
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o644)
        mode = os.fstat(self._fd).st_mode
        self._regular = stat.S_ISREG(mode)
        if not self._regular:
            self._most = _PIECE
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=self._fd)

    def publish(self, data: Data, shard: int = 0) -> None:
        self._check(shard)
        lines = json_lines(data)
        if not lines:
            return
        deadline = time.monotonic() + self.patience
        while len(self._buffer) > _ROOM and self._write(deadline):
            pass
        if len(self._buffer) > _ROOM:
            raise SinkFull(f"{self._path}: its reader has taken nothing for {self.patience:g} s: is it stopped?")
        self._buffer += lines
        self._taken += len(lines)
        self._ends.append(self._taken)
        self._rows += lines.count(b"\n")
        self._published += 1
        while self._buffer and self._write(time.monotonic()):
            pass

    def flush(self, timeout: float | None = None) -> None:
        self._check()
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._buffer:
            if not self._write(deadline):
                raise TimeoutError(f"{self._path}: {len(self._buffer)} bytes wait for its reader")

    def close(self, timeout: float | None = None) -> None:
        if self._closed or not self._opened:
            return
        try:
            self.flush(timeout)
        finally:
            self._closed = True
            if self._socket is not None:
                self._socket.close()
            else:
                os.close(self._fd)

    def statistics(self) -> SinkStatistics:
        waiting = len(self._ends)
        return SinkStatistics(
            rows=self._rows, published=self._published, acknowledged=self._published - waiting, waiting=waiting,
            spooled_bytes=len(self._buffer),
        )  # fmt: skip

    def _write(self, deadline: float | None) -> bool:
        """Write a piece of what waits; False where nobody has taken any until then."""
        wait = None if deadline is None else max(deadline - time.monotonic(), 0) * 1000
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        if not poll.poll(wait):
            return False
        piece = self._piece()
        try:
            done = self._socket.send(piece, socket.MSG_DONTWAIT) if self._socket else os.write(self._fd, piece)
            if self._regular and done < len(piece):
                done = self._whole(piece[:done])
        except BlockingIOError:  # another writer was quicker
            return deadline is None or time.monotonic() < deadline
        del self._buffer[:done]
        self._written += done
        while self._ends and self._ends[0] <= self._written:
            del self._ends[0]
        return True

    def _whole(self, written: bytes) -> int:
        """A full disk took no more: take half a line off the end again; bytes that stay. OSError where none do.

        What comes when there is room, from here or from the next process, would be appended to it and lost with it.
        """
        whole, end = written.rfind(b"\n") + 1, os.lseek(self._fd, 0, os.SEEK_CUR)
        if end != os.fstat(self._fd).st_size:  # another has written since
            return len(written)
        os.ftruncate(self._fd, end := end - len(written) + whole)
        os.lseek(self._fd, end, os.SEEK_SET)  # standard output need not be open for appending
        if not whole:
            raise OSError(errno.ENOSPC, "no room for a line", self._path)
        return whole

    def _piece(self) -> bytes:
        """Whole lines, as many as fit, so that others may write between two pieces."""
        end = self._buffer.rfind(b"\n", 0, self._most) + 1
        return bytes(self._buffer[: end or self._most])


def _own(fd: int) -> int:
    """The same pipe or terminal, opened anew and never blocking: the mode of `fd` is shared with its other holders."""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # a socket; a pipe of another user
        pass
    return os.dup(fd)
