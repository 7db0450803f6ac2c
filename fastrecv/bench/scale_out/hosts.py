"""Hosts: a supervised collector in each one's namespace, what befalls it, and what it says it has acknowledged."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fastrecv.bench.numbered import NUMBERED
from fastrecv.bench.scale_out.addresses import COLLECTOR, PORT
from fastrecv.bench.scale_out.processes import KILLED_WITH_US, alive, tree
from fastrecv.bench.scale_out.recorder import HANDLER, REMOVED, environment
from fastrecv.bench.survive_recorder import ROWS
from fastrecv.bench.survive_service import Service, rows_of, until
from fastrecv.netns import Namespace

__all__ = ["BATCH", "WORKERS", "Host"]

WORKERS = 2
BATCH = 64
"""Datagrams that a worker has in its hands at most."""
_BUFFER = 16 << 20  # bytes


class Host:
    """A context manager. Its folder is its disk: it stays when all its processes are killed.

    lives : how often its collector was started. deaths : of workers, which may have had a batch in their hands.
    """

    def __init__(self, number: int, space: Namespace, folder: Path) -> None:
        self.number, self.space, self.folder = number, space, folder
        self.lives = self.deaths = 0
        self._service: Service | None = None
        (folder / "spool").mkdir(parents=True)

    @property
    def pids(self) -> list[int]:
        return tree(self._service.process.pid) if self._service else []

    def start(self) -> None:
        """Start its collector; return when all workers read."""
        self.lives += 1
        folder = self.folder / f"life{self.lives}"
        folder.mkdir()
        with self.space:
            self._service = Service(
                folder, HANDLER, "-w", WORKERS, "--batch-size", BATCH, "--receive-buffer", _BUFFER,
                bind=f"{COLLECTOR}:{PORT}", before=KILLED_WITH_US,
                environment=environment(self.folder, self.folder / "spool"),
            )  # fmt: skip
        self._service.begun(WORKERS)

    def kill_worker(self, slot: int) -> None:
        """By SIGKILL; the supervisor goes on and starts another."""
        assert self._service is not None
        os.kill(self._service.reading()[slot], signal.SIGKILL)
        self.deaths += 1

    def kill(self) -> None:
        """Supervisor and workers at once, by SIGKILL: their queues go with them.

        The supervisor is stopped first, so that it starts no other, and workers do not outlive it to read their queues.
        """
        assert self._service is not None
        self._service.send(signal.SIGSTOP)
        workers = [pid for pid in self.pids if pid != self._service.process.pid]
        self.deaths += len(workers)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        self._service.__exit__()
        self._service = None
        until(lambda: not any(map(alive, workers)), lambda: f"workers of host {self.number} do not die")

    def stop(self) -> None:
        """Let it read its queues to their end, publish that, and end. RuntimeError where it does not do it well."""
        if self._service is None:
            return
        if code := self._service.stop(seconds=60):
            raise RuntimeError(f"host {self.number} has ended with exit code {code}\n{self._service.log}")
        self._service = None

    def count(self) -> int:
        """How many records it has acknowledged."""
        return sum(path.stat().st_size // NUMBERED.itemsize for path in self.folder.glob(f"*{ROWS}"))

    def removed(self) -> int:
        """How many of its messages the engine had already, and has removed by their ids."""
        files = self.folder.glob(f"*{REMOVED}")
        return sum(int.from_bytes(path.read_bytes(), "little") for path in files)

    def acknowledged(self) -> NDArray[np.void]:
        """What it has acknowledged in all its lives: rows of NUMBERED, (n,)."""
        return np.concatenate([np.zeros(0, NUMBERED), *map(rows_of, sorted(self.folder.glob(f"*{ROWS}")))])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._service is not None:
            self.kill()
