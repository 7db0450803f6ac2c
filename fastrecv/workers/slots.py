"""A slot: one socket, which stays, and the processes that read it, one at a time."""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable

from fastrecv.workers.counters import Row
from fastrecv.workers.process import Process, ending

__all__ = ["Slot"]

_AT_ONCE = 1.0  # seconds of reading: who dies earlier has died at once
_BACKOFF = (0.0, 0.1, 0.2, 0.4, 0.8)  # seconds before the next try, by how many have died at once; then no more
_IMPORT = 60.0  # seconds until a worker must be ready, where the timeout is shorter
_WELL = (0, -signal.SIGTERM)


class Slot:
    """The socket of one worker, with whoever reads it and whoever is to read it next.

    spawn : starts a process for it. own : whether the socket was opened here, so that its queue ends with it.

    reader : who reads, or has been told to stop. successor : who has been started and does not read yet.
    leaving : it is to be read to its end. drained : it has been. given_up : nobody is started any more. new : it has no
    senders until it has a reader.
    """

    def __init__(
        self, number: int, sock: socket.socket, own: bool, row: Row, spawn: Callable[[Slot], Process],
        log: logging.Logger, seconds: float,
    ) -> None:  # fmt: skip
        self.number, self.sock, self.own, self.row = number, sock, own, row
        self._spawn, self._log, self._seconds = spawn, log, seconds
        self.reader: Process | None = None
        self.successor: Process | None = None
        self._going: list[Process] = []  # who have read for the last time, and have not ended
        self._deaths = 0
        self._again_at: float | None = None
        self.leaving = self.drained = self.given_up = self.new = False

    @property
    def processes(self) -> list[Process]:
        return [one for one in (self.reader, self.successor, *self._going) if one is not None]

    @property
    def finished(self) -> bool:
        """Whether a slot that leaves has nobody and nothing left."""
        return self.leaving and (self.drained or self.given_up) and not self.processes

    def begin(self) -> None:
        """Start who reads next."""
        self._again_at = None
        self.given_up = False
        self.successor = self._spawn(self)

    def leave(self) -> None:
        """Have the queue read to its end, and nobody after that; a socket of others' is left with its queue."""
        if self.leaving:
            return
        self.leaving = True
        self.drained = not self.own
        reader = self.reader
        if reader is not None and reader.told is None:
            (reader.drain if self.own else reader.stop)(self._seconds)
        elif self.own:  # the successor is to do it
            if self.successor is None and not self.given_up:
                self.begin()
            return
        if self.successor is not None:
            self.successor.kill()

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
        if reader.read_since is not None and time.monotonic() - reader.read_since >= _AT_ONCE:
            self._deaths = 0
        self.drained |= reader.told == "drain"
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
        self.reader, self.successor, self.new = successor, None, False
        self.row.begin(successor.pid)
        successor.start()
        self._log.info("worker %d [%d] reads", self.number, successor.pid)
        if self.leaving:
            successor.drain(self._seconds)

    def ended(self, process: Process) -> None:
        """One of the processes has ended."""
        if process in self._going:
            self._going.remove(process)
        elif process is self.successor:
            self.successor = None
            if self.reader is None and not self.drained:
                self._plan(process)
        elif process.told is not None and process.status in _WELL:  # a loop of its own may end before it can say so
            self._stopped(process)
        else:
            self.reader = None
            self._log.error(
                "worker %d [%d] has died, %s, with %d datagrams in its hands; its queue waits",
                self.number, process.pid, ending(process.status), self.row.settle(),
            )  # fmt: skip
            self._plan(process)
        self._hand_over()

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
            self.number, self._deaths, dead.failure or ending(dead.status),
        )  # fmt: skip
        self._deaths = 0

    def act(self, now: float, timeout: float) -> None:
        """What the time has come for: another try, or the end of who hangs or takes too long. timeout : 0 is never."""
        if self._again_at is not None and now >= self._again_at and not self.drained:
            self.begin()
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
