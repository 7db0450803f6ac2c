"""A slot: one socket, which stays, and the processes that read it, one at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable

import msgspec

from fastrecv.sockets import memory
from fastrecv.workers import logs
from fastrecv.workers.counters import Row
from fastrecv.workers.process import Process, ending
from fastrecv.workers.process import Record as ProcessRecord

__all__ = ["Record", "Slot"]

_AT_ONCE = 1.0  # seconds of reading: who dies earlier has died at once
_BACKOFF = (0.0, 0.1, 0.2, 0.4, 0.8)  # seconds before the next try, by how many have died at once; then no more
_IMPORT = 60.0  # seconds until a worker must be ready, where the timeout is shorter
_REST = 1.0  # seconds until the next try to start somebody where there was no room for it
_WELL = (0, -signal.SIGTERM)
_HANDSHAKES = 0.3  # seconds: handshakes that have begun end within a round trip


class Record(msgspec.Struct, frozen=True):
    """What the next supervisor of the same process id must know of a slot. sock, snapshots : descriptors."""

    number: int
    sock: int
    own: bool
    snapshots: int
    reader: ProcessRecord | None
    successor: ProcessRecord | None
    going: list[ProcessRecord]
    deaths: int
    again_at: float | None
    leaving: bool
    drained: bool
    given_up: bool
    new: bool
    left_at: float
    cause: str | None


class Slot:
    """The socket of one worker, with whoever reads it and whoever is to read it next.

    spawn : starts a process for it. own : whether the socket was opened here, so that its queue ends with it.
    snapshots : descriptor of what its handlers keep.

    reader : who reads, or has been told to stop. successor : who has been started and does not read yet.
    leaving : it is to be read to its end. drained : it has been. given_up : nobody is started any more unless it is
    asked for, and it has no senders until somebody reads again. new : it has no senders until it has a reader. cause :
    how the last process that died has ended.
    """

    def __init__(
        self, number: int, sock: socket.socket, own: bool, row: Row, snapshots: int, spawn: Callable[[Slot], Process],
        log: logging.Logger, seconds: float,
    ) -> None:  # fmt: skip
        self.number, self.sock, self.own, self.row, self.snapshots = number, sock, own, row, snapshots
        self._spawn, self._log, self._seconds = spawn, logs.about(number, log), seconds
        self.reader: Process | None = None
        self.successor: Process | None = None
        self._going: list[Process] = []  # who have read for the last time, and have not ended
        self._deaths = 0
        self._again_at: float | None = None
        self._left_at = 0.0
        self.leaving = self.drained = self.given_up = self.new = False
        self.cause: str | None = None

    def resume(self, record: Record) -> None:
        """Be as another was before this program was executed."""
        self.reader, self.successor = _resumed(record.reader), _resumed(record.successor)
        self._going = [Process.resume(one) for one in record.going]
        self._deaths, self._again_at = record.deaths, record.again_at
        self._left_at, self.cause = record.left_at, record.cause
        self.leaving, self.drained, self.given_up, self.new = (
            record.leaving, record.drained, record.given_up, record.new,
        )  # fmt: skip

    def record(self) -> Record:
        return Record(
            self.number, self.sock.fileno(), self.own, self.snapshots,
            _recorded(self.reader), _recorded(self.successor), [one.record() for one in self._going],
            self._deaths, self._again_at, self.leaving, self.drained, self.given_up, self.new,
            self._left_at, self.cause,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the socket, and of what the handler has kept. Nobody reads any more.

        A check of new code, or what a worker has left behind, may have a listener still, and it would go on to take
        connections that nobody accepts: it ends for all.
        """
        if self.own and self.sock.type == socket.SOCK_STREAM:
            with contextlib.suppress(OSError):  # its worker has done so already
                self.sock.shutdown(socket.SHUT_RD)
        self.sock.close()
        os.close(self.snapshots)

    @property
    def processes(self) -> list[Process]:
        return [one for one in (self.reader, self.successor, *self._going) if one is not None]

    @property
    def waits(self) -> bool:
        """Whether anything may wait in its socket."""
        return self.sock.type != socket.SOCK_DGRAM or memory(self.sock).queued > 0

    @property
    def unread(self) -> bool:
        """Whether what waits in its socket ends with it. That it was read to its end is believed of listeners alone."""
        return self.own and self.waits and not (self.drained and self.sock.type != socket.SOCK_DGRAM)

    @property
    def abandoned(self) -> bool:
        """Whether it is given up, and nobody is on his way who would read."""
        return self.given_up and self.successor is None and self._again_at is None

    @property
    def finished(self) -> bool:
        """Whether a slot that leaves has nobody and nothing left."""
        return self.leaving and (self.drained or self.given_up) and not self.processes

    def begin(self) -> bool:
        """Start who reads next. False where that cannot be, for want of descriptors, memory or the interpreter's file.

        It is tried again then, while nobody reads.
        """
        self._again_at = None
        try:
            self.successor = self._spawn(self)
        except OSError as error:
            self.cause = error.strerror or str(error)
            self._log.error("worker %d cannot be started: %s", self.number, self.cause)
            if self.reader is None:
                self._again_at = time.monotonic() + _REST
            return False
        return True

    def leave(self) -> None:
        """Have the queue read to its end, and nobody after that; a socket of others' is left with its queue."""
        if self.leaving:
            return
        self.leaving, self._left_at = True, time.monotonic()
        self.drained = not self.own
        reader = self.reader
        if reader is not None and reader.told is None:
            self._let_end(reader)
        elif self.own:  # the successor is to do it
            if self.successor is None and not self.given_up:
                self.begin()
            return
        if self.successor is not None:
            self.successor.kill()

    def _let_end(self, reader: Process) -> None:
        """Tell the reader of a slot that leaves; of a listener when its loop, which `drain` ends, has accepted all."""
        if not self.own:
            reader.stop(self._seconds)
        elif self.sock.type != socket.SOCK_STREAM or self._accepted():
            reader.drain(self._seconds)

    def _accepted(self) -> bool:
        """Whether no connection waits any more; half of the time to stop in may go by until then."""
        passed = time.monotonic() - self._left_at
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return (passed > _HANDSHAKES and not poll.poll(0)) or passed > self._seconds / 2

    def renew(self, sock: socket.socket) -> None:
        """Go on with another socket of one's own. Who reads the old one reads that to its end."""
        self.sock.close()
        self.sock = sock
        if self.successor is not None:
            self.successor.kill()  # it has the old one
        if self.reader is not None and self.reader.told is None:
            self.reader.drain(self._seconds)

    def heard(self, process: Process) -> None:
        """Take what one of the processes has said."""
        said = process.heard()
        if "stopped" in said and process is self.reader and process.told is not None:
            self._going.append(process)
            self._stopped(process)
        self._hand_over()

    def _stopped(self, reader: Process) -> None:
        """The reader has read for the last time, as it was told to."""
        self.reader = None
        self._deaths = 0  # it has not died
        self.drained |= self.leaving and reader.told == "drain"
        if self.successor is None and not self.drained:
            self._again_at = time.monotonic()

    def _hand_over(self) -> None:
        """Let the successor read, where it is ready and nobody reads."""
        successor = self.successor
        if successor is None or successor.state != "ready":
            return
        if self.reader is not None:
            self.reader.stop(self._seconds)
            return
        self.reader, self.successor, self.new, self.given_up = successor, None, False, False
        self.row.begin(successor.pid)
        successor.start()
        self._log.info("worker %d [%d] reads", self.number, successor.pid)
        if self.leaving:
            self._let_end(successor)

    def ended(self, process: Process) -> None:
        """One of the processes has ended."""
        if process in self._going:
            self._going.remove(process)
        elif process is self.successor:
            self.successor = None
            missed = self.reader is None and not self.drained
            if missed or not self.leaving:  # else it was killed: nobody needs it
                self._died(process)
            if missed:
                self._plan(process)
        elif process.told is not None and process.status in _WELL and not self.row.in_hands:
            self._stopped(process)  # a loop of its own may end before it can say so
        else:
            self.reader = None
            self._died(process)
            self._log.error(
                "worker %d [%d] has died, %s, with %d datagrams in its hands; its queue waits",
                self.number, process.pid, ending(process.status), self.row.settle(),
            )  # fmt: skip
            self._plan(process)
        self._hand_over()

    def _died(self, dead: Process) -> None:
        self.row.died()
        self.cause = dead.failure or ending(dead.status)

    def _plan(self, dead: Process) -> None:
        """When to try again."""
        now = time.monotonic()
        lasted = 0.0 if dead.read_since is None else now - dead.read_since
        self._deaths = self._deaths + 1 if lasted < _AT_ONCE else 0
        if self.successor is not None:
            return
        if self._deaths < len(_BACKOFF):
            self._again_at = now + _BACKOFF[self._deaths]
            return
        self.given_up = True
        self._log.error(
            "worker %d is given up: it has died at once %d times, the last time %s",
            self.number, self._deaths, self.cause,
        )  # fmt: skip
        self._deaths = 0

    def act(self, now: float, timeout: float) -> None:
        """What the time has come for: another try, or the end of who hangs or takes too long. timeout : 0 is never."""
        if self._again_at is not None and now >= self._again_at and not self.drained:
            self.begin()
        if self.leaving and self.reader is not None and self.reader.told is None:
            self._let_end(self.reader)
        for process in self.processes:
            if process.deadline is not None and now >= process.deadline:
                process.deadline = None
                self._kill(process, "has not stopped in time")
        successor, reader = self.successor, self.reader
        if not timeout:
            return
        if successor is not None and successor.state == "starting" and now - successor.began > max(timeout, _IMPORT):
            successor.began = now
            self._kill(successor, "is not ready yet")
        if reader is not None and time.monotonic_ns() - self.row.heartbeat > 1e9 * timeout:
            self.row.beat(time.monotonic_ns())  # once is enough
            self._kill(reader, f"has given no sign of life for {timeout:g} s")

    def _kill(self, process: Process, why: str) -> None:
        self._log.error("worker %d [%d] %s: killed", self.number, process.pid, why)
        process.kill()


def _recorded(found: Process | None) -> ProcessRecord | None:
    return None if found is None else found.record()


def _resumed(record: ProcessRecord | None) -> Process | None:
    return None if record is None else Process.resume(record)
