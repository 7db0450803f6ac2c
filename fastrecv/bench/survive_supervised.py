"""The pattern that is to survive: `fastrecv run`, and what befalls it, followed by its log."""

from __future__ import annotations

import math
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fastrecv.bench.numbered import NumberedSource
from fastrecv.bench.survive_churn import Action
from fastrecv.bench.survive_recorder import DWELL, FOLDER, HANDLER, HANG
from fastrecv.bench.survive_service import READS, Service

__all__ = ["BATCH", "BUFFER", "TIMEOUT", "Supervised"]

BATCH = 256
BUFFER = 64 << 20  # bytes
TIMEOUT = 2  # seconds without a sign of life
_SAYS = {
    "died": "has died, ",
    "hung": "has given no sign of life",
    "given up": "is given up: ",
    "restarted": "all workers are new",
    "left as they are": "no more workers are restarted",
    "shared": "share the senders",
    "taken over": "took over",
    "no more": "ERROR   supervisor: no worker more",
}
_ROUNDS = 10  # datagrams of every sender between two changes: most of them say who has it, though some may be lost
_QUICK = 1.2  # seconds of reading: who is killed earlier may have died at once
_QUICKLY = 3  # times one after the other; two more and the supervisor gives the worker up, as it shall
_DWELL = 0.001  # seconds
_SPREAD = 2  # workers more or less than there were
_PATIENCE = 30.0  # seconds


class Supervised:
    """A Pattern; a context manager. spared : slots whose workers are not killed."""

    def __init__(
        self, folder: Path, workers: int, senders: int, seed: int, spared: frozenset[int] = frozenset()
    ) -> None:
        self.title = "fastrecv run"
        self.done: Counter[str] = Counter()
        self.changes: list[tuple[str, int, int]] = []
        self.said: Counter[str] = Counter()
        self.size = workers
        self._first, self._senders, self._spared = workers, senders, spared
        self._rng = np.random.default_rng(seed)
        self._hang = folder / HANG
        self._killed: set[int] = set()
        self._began: dict[int, float] = {}
        self._quick: Counter[int] = Counter()
        self._wanted: int | None = None
        self._since = 0.0
        self._settled = 0
        self._line = ""
        self.service = Service(
            folder, HANDLER, "-w", workers, "--batch-size", BATCH, "--receive-buffer", BUFFER, "--timeout", TIMEOUT,
            environment={FOLDER: str(folder), DWELL: str(_DWELL)}, start_new_session=True,
        )  # fmt: skip
        try:
            self.service.begun(workers)
        except BaseException:
            self.service.__exit__()
            raise
        self._log = (folder / "log").open()

    @property
    def deaths(self) -> int:
        return self.said["died"]

    def begin(self, source: NumberedSource) -> None:
        self._source = source
        self._settled, self._since = source.sent, time.monotonic()

    @property
    def busy(self) -> bool:
        return bool(self._wanted or self._restarting or self._handing_over or self._hang.exists() or not self._known)

    @property
    def _known(self) -> bool:
        """Whether every sender has sent often enough since the last change."""
        return self._source.sent >= self._settled + _ROUNDS * self._senders

    @property
    def _restarting(self) -> bool:
        return self.done["restart"] > self.said["restarted"] + self.said["left as they are"]

    @property
    def _handing_over(self) -> bool:
        return self.done["hand-over"] > self.said["taken over"]

    # What befalls it

    def act(self, action: Action) -> bool:
        did = {
            "kill": self._kill, "restart": self._restart, "resize": self._resize, "hang": self._let_hang,
            "hand-over": self._hand_over,
        }[action]()  # fmt: skip
        if did:
            self.done[action] += 1
            self._since = time.monotonic()
        return did

    def _kill(self) -> bool:
        """A random one of those who read."""
        found = {slot: pid for slot, pid in self.service.reading().items() if self._may_be_killed(slot, pid)}
        if not found:
            return False
        slot = int(self._rng.choice(sorted(found)))
        self._killed.add(found[slot])
        self._quick[slot] = 0 if self._has_lasted(found[slot]) else self._quick[slot] + 1
        try:
            os.kill(found[slot], signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def _may_be_killed(self, slot: int, pid: int) -> bool:
        if slot in self._spared or pid in self._killed:
            return False
        return self._quick[slot] < _QUICKLY or self._has_lasted(pid)

    def _has_lasted(self, pid: int) -> bool:
        return time.monotonic() - self._began.get(pid, math.inf) > _QUICK

    def _restart(self) -> bool:
        if self._restarting:
            return False
        self.service.send(signal.SIGHUP)
        return True

    def _resize(self) -> bool:
        """One worker more or less; not before it is known who has which sender."""
        if self._wanted or not self._known:
            return False
        low, high = max(1 + len(self._spared), self._first - _SPREAD), self._first + _SPREAD
        more = self.size < high and (self.size == low or bool(self._rng.integers(2)))
        self._wanted = self.size + (1 if more else -1)
        self._source.next_phase()
        self.service.send(signal.SIGTTIN if more else signal.SIGTTOU)
        return True

    def _let_hang(self) -> bool:
        if self._hang.exists():
            return False
        self._hang.touch()
        return True

    def _hand_over(self) -> bool:
        if self._handing_over:
            return False
        self.service.send(signal.SIGUSR2)
        return True

    # What it says

    def look(self) -> None:
        shared = self.said["shared"]
        self._read_log()
        if self._wanted is not None and self.said["shared"] > shared:
            self._source.next_phase()
            self.changes.append(("resize", self.size, self._wanted))
            self.size, self._wanted, self._settled = self._wanted, None, self._source.sent
        for trouble in ("given up", "no more"):
            if self.said[trouble]:
                raise RuntimeError(f"a worker was {trouble}\n{self.service.log}")
        if self.service.process.poll() is not None:
            raise RuntimeError(f"the supervisor has ended\n{self.service.log}")
        if self.busy and time.monotonic() > self._since + _PATIENCE:
            raise RuntimeError(f"it does not come to an end\n{self.service.log}")

    def _read_log(self) -> None:
        *lines, self._line = (self._line + self._log.read()).split("\n")
        for line in lines:
            if began := READS.search(line):
                self._began[int(began[2])] = time.monotonic()
            self.said.update(name for name, words in _SAYS.items() if words in line)

    # Its end

    def stop(self) -> None:
        if code := self.service.stop():
            raise RuntimeError(f"it has ended with exit code {code}\n{self.service.log}")
        self._read_log()

    def recorded(self) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        return self.service.recorded()

    def totals(self, rows: NDArray[np.void]) -> tuple[int, int, int]:  # noqa: ARG002 - its counters say
        found = self.service.totals()
        return found.handled, found.failed, found.killed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._log.close()
        self.service.__exit__()
