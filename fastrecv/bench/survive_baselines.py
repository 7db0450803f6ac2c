"""The patterns to compare with: processes that own their sockets, started anew by a parent when they have ended.

Each change of the processes is a change of who gets a sender, so every one has a phase of its own, and begins only when
it is known who had the senders before.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from fastrecv.bench import survive_usual
from fastrecv.bench.numbered import NUMBERED, NumberedSource
from fastrecv.bench.survive_churn import Action
from fastrecv.bench.survive_service import ADDRESS, PORT, until
from fastrecv.bench.survive_supervised import BUFFER
from fastrecv.bench.survive_usual import HEAD

__all__ = ["Kind", "Usual"]

Kind = Literal["recvfrom", "asyncio"]
_TITLES = {"recvfrom": "{} processes, SO_REUSEPORT, recvfrom", "asyncio": "{} process, asyncio DatagramProtocol"}
_ROUNDS = 1.5  # datagrams of every sender between two changes
_PATIENCE = 20.0  # seconds


class Usual:
    """A Pattern; a context manager. Root, for the size of the buffers."""

    def __init__(self, kind: Kind, folder: Path, workers: int, senders: int, seed: int) -> None:
        self.title = _TITLES[kind].format(workers)
        self.done: Counter[str] = Counter()
        self.changes: list[tuple[str, int, int]] = []
        self._kind, self._folder, self._senders = kind, folder, senders
        self._rng = np.random.default_rng(seed)
        self._change: Action | None = None
        self._rolling: list[int] = []
        self._ending: subprocess.Popen[bytes] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for slot in range(workers):
                self._processes.append(self._start(slot))
            until(lambda: self._all_bound, lambda: f"{self.title}: they do not begin")
        except BaseException:
            self.__exit__()
            raise

    @property
    def deaths(self) -> int:
        return self.done["kill"]

    def begin(self, source: NumberedSource) -> None:
        self._source = source
        self._settled = source.sent

    def _start(self, slot: int) -> subprocess.Popen[bytes]:
        words = [self._kind, self._folder, slot, ADDRESS, PORT, BUFFER]
        return subprocess.Popen(  # noqa: S603 - ourselves
            [sys.executable, "-P", survive_usual.__file__, *map(str, words)], stdin=subprocess.DEVNULL
        )

    def _bound(self, slot: int) -> bool:
        return (self._folder / f"{slot}-{self._processes[slot].pid}.rows").exists()

    @property
    def _all_bound(self) -> bool:
        return all(map(self._bound, range(len(self._processes))))

    @property
    def busy(self) -> bool:
        """Also until every sender has sent often enough since the last change."""
        return self._change is not None or self._source.sent < self._settled + _ROUNDS * self._senders

    def act(self, action: Action) -> bool:
        if self.busy:
            return False
        self._source.next_phase()
        self._change = action
        self.done[action] += 1
        self._since = time.monotonic()
        if action == "kill":
            self._end(int(self._rng.integers(len(self._processes))), signal.SIGKILL)
        else:
            self._rolling = list(range(len(self._processes)))
            self._roll()
        return True

    def _end(self, slot: int, number: signal.Signals) -> None:
        self._ending = self._processes[slot]
        self._ending.send_signal(number)

    def _roll(self) -> None:
        """The next of the rolling restart is told to stop."""
        self._end(self._rolling.pop(0), signal.SIGTERM)

    def look(self) -> None:
        for slot, process in enumerate(self._processes):
            if process.poll() is not None:
                if process is not self._ending:
                    raise RuntimeError(f"{self.title}: one has ended by itself, exit code {process.returncode}")
                self._processes[slot] = self._start(slot)
        if self._change is None:
            return
        if time.monotonic() > self._since + _PATIENCE:
            raise RuntimeError(f"{self.title}: the {self._change} does not come to its end")
        if self._ending in self._processes or not self._all_bound:
            return
        if self._rolling:
            self._roll()
            return
        self._source.next_phase()
        self._settled = self._source.sent
        self.changes.append((self._change, len(self._processes), len(self._processes)))
        self._change = None

    def stop(self) -> None:
        """When all that is queued has been read."""
        for process in self._processes:
            process.kill()
            process.wait()

    def recorded(self) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        found = []
        for path in self._folder.glob("*.rows"):
            with path.open("rb") as file:
                (count,) = HEAD.unpack(file.read(HEAD.size))
                found.append((np.fromfile(file, NUMBERED, count), int(path.stem.split("-")[0])))
        slots = [np.full(len(rows), slot) for rows, slot in found]
        return np.concatenate([rows for rows, _ in found]), np.concatenate(slots)

    def totals(self, rows: NDArray[np.void]) -> tuple[int, int, int]:
        return len(rows), 0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
