"""One worker process, as the supervisor sees it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

import fastrecv
from fastrecv.workers import notify
from fastrecv.workers.orders import LONGEST
from fastrecv.workers.settings import Task

__all__ = ["ALONE", "Process", "State", "ending"]

ALONE = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment of workers: threads of numpy's linear algebra would be there before capabilities are given up."""

State = Literal["starting", "ready", "reading", "stopped", "dead"]


class Process:
    """A fresh interpreter, executed, never a fork that goes on; it begins to read when `start` is called.

    failure : why it could not begin, in its words. told : how it shall end. began, read_since, deadline :
    time.monotonic() when it was started, when it began to read, and when it is to be killed.
    """

    def __init__(self, task: Task) -> None:
        self.state: State = "starting"
        self.failure: str | None = None
        self.deadline: float | None = None
        self.told: Literal["stop", "drain"] | None = None
        self.began = time.monotonic()
        self.read_since: float | None = None
        self._silent = False
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                theirs_fd = theirs.fileno()
                self._popen = subprocess.Popen(  # noqa: S603 - ourselves
                    [sys.executable, *_safe(), "-m", "fastrecv.workers.worker", str(theirs_fd)],
                    pass_fds=[theirs_fd, task.counters, task.socket], stdin=subprocess.DEVNULL,
                    env=notify.without(os.environ) | ALONE,
                    start_new_session=True,  # Ctrl-C is for the supervisor
                )  # fmt: skip
            self.pidfd = os.pidfd_open(self._popen.pid)
            self._orders.setblocking(False)
            self._say(msgspec.json.encode(task))
        except BaseException:
            self._orders.close()
            raise

    @property
    def pid(self) -> int:
        return self._popen.pid

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
        while True:
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

    def kill(self) -> None:
        """SIGKILL; for another user's it takes CAP_KILL."""
        if self.state != "dead":
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    @property
    def ended(self) -> bool:
        """Whether it has; its descriptors are closed then."""
        if self.state != "dead":
            if self._popen.poll() is None:
                return False
            self.heard()
            self.state = "dead"
            self._orders.close()
            os.close(self.pidfd)
        return True

    def reap(self) -> None:
        """Wait until it has ended."""
        self._popen.wait()
        assert self.ended

    @property
    def status(self) -> int:
        """Exit code; negative: the signal that killed it."""
        return self._popen.wait()


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
