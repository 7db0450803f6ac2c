"""The consumers from outside: two processes that share the shards, killed and started again, and what they have."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fastrecv.bench.numbered import NUMBERED
from fastrecv.bench.scale_out.consuming import DELIVERED, DELIVERIES, KEPT
from fastrecv.bench.survive_service import rows_of
from fastrecv.netns import Namespace

__all__ = ["CONSUMERS", "Consumers"]

CONSUMERS = 2
_PATIENCE = 10.0  # seconds


class Consumers:
    """A context manager: they run in a namespace, each with a folder of its own in `folder`."""

    def __init__(self, space: Namespace, folder: Path, shards: int) -> None:
        self._space, self._folder, self._shards = space, folder, shards
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        for number in range(CONSUMERS):
            (folder / str(number)).mkdir(parents=True)
            self._start(number)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes.values()]

    def restart(self, number: int) -> None:
        """Kill one by SIGKILL, whatever it has in its hands, and start it again."""
        self._processes[number].kill()
        self._processes[number].wait()
        self._start(number)

    def _start(self, number: int) -> None:
        own = [str(shard) for shard in range(number, self._shards, CONSUMERS)]
        folder = self._folder / str(number)
        with self._space, (folder / "log").open("a") as log:
            self._processes[number] = subprocess.Popen(  # noqa: S603 - ourselves
                [sys.executable, "-m", "fastrecv.bench.scale_out.consuming", str(folder), *own],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def look(self) -> None:
        """RuntimeError where one has ended by itself."""
        for number, process in self._processes.items():
            if process.poll() is not None:
                log = (self._folder / str(number) / "log").read_text()
                raise RuntimeError(f"consumer {number} has ended with exit code {process.returncode}\n{log}")

    def count(self) -> int:
        """How many records they have kept."""
        files = (self._folder / str(number) / KEPT for number in self._processes)
        return sum(file.stat().st_size // NUMBERED.itemsize for file in files if file.exists())

    def kept(self) -> NDArray[np.void]:
        """What they have kept: rows of NUMBERED, (n,)."""
        files = (self._folder / str(number) / KEPT for number in self._processes)
        return np.concatenate([rows_of(file) for file in files])

    def delivered(self) -> NDArray[np.void]:
        """What was delivered to them: rows of DELIVERED, (messages,)."""
        files = (self._folder / str(number) / DELIVERIES for number in self._processes)
        return np.concatenate([np.fromfile(file, DELIVERED) for file in files])

    def stop(self) -> None:
        """Let them end. RuntimeError where one does not do it well."""
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        for number, process in self._processes.items():
            try:
                code = process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"consumer {number} does not end in {_PATIENCE:g} s") from None
            if code:
                log = (self._folder / str(number) / "log").read_text()
                raise RuntimeError(f"consumer {number} has ended with exit code {code}\n{log}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
