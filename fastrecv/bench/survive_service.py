"""`fastrecv run` as a process in a private namespace: its log, its counters, and what its handler recorded."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pyroute2 import IPRoute

from fastrecv.bench import survive_account
from fastrecv.bench.numbered import NUMBERED
from fastrecv.bench.survive_account import Readers
from fastrecv.bench.survive_recorder import ROWS
from fastrecv.netns import Namespace
from fastrecv.privileges import ALONE
from fastrecv.workers.counters import NAME, ROW, STATES
from fastrecv.workers.settings import MAX_WORKERS

__all__ = ["ADDRESS", "PORT", "READS", "Service", "Totals", "namespace", "rows_of", "until"]

ADDRESS, PORT = "127.0.0.1", 2055
_PATIENCE = 20.0  # seconds: a busy machine starts interpreters slowly
READS = re.compile(r"worker (\d+) \[(\d+)\] reads")
_DIED = re.compile(r"worker \d+ \[(\d+)\] has died")
_STOPPED = re.compile(r"stopped: (\d+) datagrams received, (\d+) handled, (\d+) failed, (\d+) in")


class Totals(NamedTuple):
    """What a service says of itself when it has stopped, in datagrams. killed : in the hands of workers that died."""

    datagrams: int
    handled: int
    failed: int
    killed: int


def until(found: Callable[[], object], what: Callable[[], str], seconds: float = _PATIENCE) -> None:
    """Wait until it is so. RuntimeError with what is wrong where that takes too long."""
    deadline = time.monotonic() + seconds
    while not found():
        if time.monotonic() > deadline:
            raise RuntimeError(what())
        time.sleep(0.01)


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    """A private one, entered, where loopback is up."""
    with contextlib.closing(Namespace()) as made, made:
        with IPRoute() as net:
            net.link("set", index=1, state="up")
        yield made


def rows_of(path: Path) -> NDArray[np.void]:
    """What a recorder wrote down, but for half a row that a SIGKILL may leave at the end."""
    data = path.read_bytes()
    return np.frombuffer(data[: len(data) // NUMBERED.itemsize * NUMBERED.itemsize], NUMBERED)


class Service:
    """A context manager; killed at its end where it has not stopped.

    folder : where its log goes, and the recorders' rows; on its handlers' path. handler : of `fastrecv run`; None is
    `fastrecv collect`. options : of the command. before :
    words in front of the command. environment : added to ours. popen : what subprocess.Popen takes.
    """

    def __init__(
        self, folder: Path, handler: str | None, *options: object, bind: str | None = f"{ADDRESS}:{PORT}",
        before: Sequence[str] = (), environment: dict[str, str] | None = None, **popen: Any,
    ) -> None:  # fmt: skip
        self.folder = folder
        self._log = folder / "log"
        command = ["collect"] if handler is None else ["run", handler]
        words = [*before, sys.executable, "-m", "fastrecv", *command, *map(str, options)]
        words += ["-b", bind] if bind else []
        path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        ours = {"PYTHONPATH": path, "RUNTIME_DIRECTORY": str(folder)}  # where its control socket is
        with self._log.open("w") as log:
            self.process = subprocess.Popen(  # noqa: S603 - ourselves
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | ALONE | ours | (environment or {}), **popen,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text()

    def says(self, words: str, times: int = 1) -> None:
        """Wait until its log has the words, a regular expression, so often."""
        until(
            lambda: len(re.findall(words, self.log)) >= times, lambda: f"{words!r} is not {times} times in\n{self.log}"
        )

    def begun(self, workers: int) -> None:
        """Wait until so many workers have begun to read since its start."""
        self.says(READS.pattern, workers)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def counters(self) -> Path:
        """Its counters, as /proc shows them."""
        for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if NAME in fd.readlink().name:
                    return fd
        raise RuntimeError(f"no counters\n{self.log}")

    def rows(self) -> NDArray[np.void]:
        """The counters, as they are."""
        with self.counters().open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as memory:
            return np.frombuffer(bytes(memory), ROW, MAX_WORKERS)

    def pids(self, workers: int) -> list[int]:
        """Who reads the slots."""
        return [int(pid) for pid in self.rows()["pid"][:workers]]

    def reading(self) -> dict[int, int]:
        """Slot and process of those who read."""
        rows = self.rows()
        return {int(slot): int(rows["pid"][slot]) for slot in np.flatnonzero(rows["state"] == STATES.index("reading"))}

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = _PATIENCE) -> int:
        """Its exit code."""
        self.send(number)
        return self.process.wait(seconds)

    def totals(self) -> Totals:
        """Of a service that has stopped."""
        found = _STOPPED.search(self.log)
        if found is None:
            raise RuntimeError(f"it has not said what it has received\n{self.log}")
        return Totals(*map(int, found.groups()))

    def slots(self) -> dict[int, int]:
        """Which slot each worker process has read, by its log."""
        return {int(pid): int(slot) for slot, pid in READS.findall(self.log)}

    def by_process(self) -> dict[int, NDArray[np.void]]:
        """What each process wrote down."""
        return {int(path.stem): rows_of(path) for path in self.folder.glob(f"*{ROWS}")}

    def recorded(self) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        """What all wrote down, and by which slot: rows of NUMBERED (n,), slots (n,)."""
        slots = self.slots()
        found = [(rows, slots[pid]) for pid, rows in self.by_process().items() if len(rows)]
        rows = np.concatenate([np.zeros(0, NUMBERED), *(rows for rows, _ in found)])
        by = np.concatenate([np.zeros(0, np.int64), *(np.full(len(rows), slot) for rows, slot in found)])
        return rows, by

    def readers(self) -> Readers:
        """Whether all have read one after the other, of a service that has stopped."""
        slots, found, died = self.slots(), self.by_process(), {int(pid) for pid in _DIED.findall(self.log)}
        numbers = {pid: number for number, pid in enumerate(slots)}
        by = [np.full(len(rows), numbers[pid]) for pid, rows in found.items() if len(rows)]
        return survive_account.readers(
            np.concatenate([np.zeros(0, NUMBERED), *found.values()]), np.concatenate([np.zeros(0, np.int64), *by]),
            np.array(list(slots.values())), np.array([pid in died for pid in slots]),
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
