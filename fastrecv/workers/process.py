"""One worker process, as the supervisor sees it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

import fastrecv
from fastrecv.privileges import ALONE
from fastrecv.workers import notify
from fastrecv.workers.orders import LONGEST
from fastrecv.workers.settings import Task

__all__ = ["Process", "Record", "State", "ending", "executed", "exit_status"]

_AT_ONCE = 16  # words: who says more waits for the loop's next turn

State = Literal["starting", "ready", "reading", "stopped", "dead"]


class Record(msgspec.Struct, frozen=True):
    """What the next supervisor of the same process id must know of a worker. pidfd, orders : descriptors."""

    pid: int
    pidfd: int
    orders: int
    state: State
    told: Literal["stop", "drain"] | None
    deadline: float | None
    began: float
    read_since: float | None
    failure: str | None


class Process:
    """A fresh interpreter, executed, never a fork that goes on; it begins to read when `start` is called.

    failure : why it could not begin, in its words. told : how it shall end. began, read_since, deadline :
    time.monotonic() when it was started, when it began to read, and when it is to be killed.
    """

    def __init__(self, pid: int, pidfd: int, orders: socket.socket) -> None:
        self.pid, self.pidfd = pid, pidfd
        self.state: State = "starting"
        self.failure: str | None = None
        self.deadline: float | None = None
        self.told: Literal["stop", "drain"] | None = None
        self.began = time.monotonic()
        self.read_since: float | None = None
        self._silent = False
        self._status: int | None = None
        self._orders = orders
        orders.setblocking(False)

    @classmethod
    def begin(cls, task: Task) -> Process:
        """Execute an interpreter for a task. OSError, with nothing left behind."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            words = [sys.executable, *_safe(), "-m", "fastrecv.workers.worker", str(theirs.fileno())]
            kept = (theirs.fileno(), *task.descriptors())
            try:
                pid, pidfd = executed(words, kept, notify.without(os.environ) | ALONE, devnull=True)
            except BaseException:
                ours.close()
                raise
        process = cls(pid, pidfd, ours)
        process._say(msgspec.json.encode(task))
        return process

    @classmethod
    def resume(cls, record: Record) -> Process:
        """One that was begun before this program was executed."""
        process = cls(record.pid, record.pidfd, socket.socket(fileno=record.orders))
        process.state, process.told, process.failure = record.state, record.told, record.failure
        process.deadline, process.began, process.read_since = record.deadline, record.began, record.read_since
        return process

    def record(self) -> Record:
        return Record(
            self.pid, self.pidfd, self._orders.fileno(), self.state, self.told, self.deadline, self.began,
            self.read_since, self.failure,
        )  # fmt: skip

    @property
    def descriptors(self) -> Iterable[int]:
        """What to poll: it has said something, or has ended."""
        return (self.pidfd,) if self._silent else (self._orders.fileno(), self.pidfd)

    def _say(self, word: bytes) -> None:
        try:
            self._orders.send(word)
        except (BrokenPipeError, ConnectionResetError):
            return  # it has ended, which its pidfd says as well

    def start(self) -> None:
        self.state, self.read_since = "reading", time.monotonic()
        self._say(b"start")

    def stop(self, seconds: float) -> None:
        """Let it finish its batch, within so many seconds."""
        self._end("stop", seconds)

    def drain(self, seconds: float) -> None:
        """Let it read its queue to the end, within so many seconds."""
        self._end("drain", seconds)

    def _end(self, word: Literal["stop", "drain"], seconds: float) -> None:
        if self.told is None:
            self.told, self.deadline = word, time.monotonic() + seconds
            self._say(word.encode())

    def heard(self) -> list[str]:
        """What it has said since; its state follows."""
        said: list[str] = []
        for _ in range(_AT_ONCE):
            try:
                word = self._orders.recv(LONGEST).decode(errors="replace")
            except (BlockingIOError, ConnectionResetError):
                return said
            if not word:  # it has closed its end
                self._silent = True
                return said
            said.append(word)
            kind, _, rest = word.partition(" ")
            if kind == "failed":
                self.failure = rest
            elif kind in ("ready", "stopped"):
                self.state = kind  # type: ignore[assignment] # two of its states
        return said

    def kill(self) -> None:
        """SIGKILL; for another user's it takes CAP_KILL."""
        if self.state != "dead":
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    @property
    def ended(self) -> bool:
        """Whether it has; its descriptors are closed then."""
        return self._ended(os.WNOHANG)

    def reap(self) -> None:
        """Wait until it has ended."""
        self._ended(0)

    def _ended(self, flags: int) -> bool:
        if self._status is None:
            self._status = exit_status(self.pidfd, flags)
            if self._status is None:
                return False
            self.heard()
            self.state = "dead"
            self._orders.close()
            os.close(self.pidfd)
        return True

    @property
    def status(self) -> int:
        """Exit code of one that has ended; negative: the signal that killed it."""
        assert self._status is not None
        return self._status


def executed(
    words: list[str], kept: Iterable[int], environment: Mapping[str, str], *, devnull: bool = False
) -> tuple[int, int]:
    """Execute a program in a process of its own; its id and its pidfd. OSError, with nothing left behind.

    kept : the descriptors that it has, too, by their numbers. devnull : it is a session of its own, whom Ctrl-C does
    not reach, with nothing to read.
    """
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in kept]
    if devnull:
        actions.append((os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0))
    pid = os.posix_spawn(words[0], words, environment, file_actions=actions, setsid=devnull, setsigmask=[])
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def exit_status(pidfd: int, flags: int) -> int | None:
    """Of a child: its exit code; negative: the signal that killed it; None: it goes on. flags : os.WNOHANG or 0."""
    found = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | flags)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _safe() -> list[str]:
    """An interpreter's option by which nothing comes from the current folder before privileges are given up.

    Unless this package itself lies there.
    """
    return [] if Path(fastrecv.__file__).parents[1] == Path.cwd() else ["-P"]


def ending(status: int) -> str:
    """How a process has ended."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
