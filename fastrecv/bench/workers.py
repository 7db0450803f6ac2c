"""What supervision costs: a worker of `fastrecv run` against a bare Receiver loop, and two workers against one.

Sockets are filled while their readers are stopped (SIGSTOP), and the time counts from SIGCONT until all is handled: so
nobody sends meanwhile, and the readers alone have the CPUs. What each does with a datagram is the same: it counts.
Everybody drains once a round, in random order; processes and sockets are new in every set-up.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastrecv import Receiver
from fastrecv.bench import stats
from fastrecv.bench.results import Interval
from fastrecv.bench.survive_service import ADDRESS, Service, namespace, until
from fastrecv.bench.workers_counting import HANDLER
from fastrecv.workers.counters import ROW

__all__ = ["ENOUGH", "MAX_DATAGRAMS", "PAIRS", "Plan", "Ratio", "Result", "measure"]

ENOUGH = 0.9
"""What a worker must handle of what a bare loop does."""
MAX_DATAGRAMS = 200_000
_BUFFER = 512 << 20  # bytes: a small datagram is charged 1,280
_PORTS = {"bare": 2055, "one": 2056, "two": 2057}
_ORDER = ("bare", "again", "one", "two")  # "again" is the bare loop once more
PAIRS = {"again": "bare", "one": "bare", "two": "one"}
_PAYLOAD = bytes(64)
_SENDERS = 16  # a worker
_CANDIDATES = 200
_PATIENCE = 20.0  # seconds
_POLL = 0.0005  # seconds; more often would take a CPU from the second worker


class Plan(NamedTuple):
    """datagrams : of a drain. rounds : of each set-up, in each of which everybody drains once."""

    datagrams: int
    setups: int
    rounds: int
    seed: int


class Ratio(NamedTuple):
    """Of the datagrams a second of a row and another, with its 95 % interval."""

    row: str
    reference: str
    estimate: float
    low: float
    high: float


class Result(NamedTuple):
    """ns : of every drain, by row."""

    plan: Plan
    ns: dict[str, list[int]]
    ratios: list[Ratio]

    @property
    def good(self) -> bool:
        return all(ratio.estimate >= ENOUGH for ratio in self.ratios if ratio.row == "one")


class _Readers(NamedTuple):
    """Processes that read a port. handled : counts what they have handled, each."""

    pids: list[int]
    port: int
    handled: Callable[[], list[int]]

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """While this is entered they do not run."""
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            until(lambda: all(_state(pid) == "T" for pid in self.pids), lambda: "readers do not stop")
            yield
        finally:
            for pid in self.pids:
                os.kill(pid, signal.SIGCONT)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def measure(plan: Plan, on_step: Callable[[], None]) -> Result:
    """All set-ups. Root: namespaces, BPF, sizes of buffers. on_step : called after every round.

    RuntimeError where not every datagram is handled.
    """
    rng = np.random.default_rng(plan.seed)
    ns: dict[str, list[int]] = {row: [] for row in _ORDER}
    for _ in range(plan.setups):
        with _setup() as (readers, senders):
            for readers_of_one in readers.values():  # memory that the next drains will use is touched
                _drain(readers_of_one, senders, plan.datagrams // 4)
            for _ in range(plan.rounds):
                for index in rng.permutation(len(_ORDER)):
                    row = _ORDER[index]
                    ns[row].append(_drain(readers["bare" if row == "again" else row], senders, plan.datagrams))
                on_step()
    setups = [plan.rounds] * plan.setups
    ratios = [_ratio(row, of, stats.estimate(ns[of], ns[row], setups)) for row, of in PAIRS.items()]
    return Result(plan, ns, ratios)


def _ratio(row: str, reference: str, change: Interval) -> Ratio:
    return Ratio(row, reference, *(1 + percent / 100 for percent in (change.estimate, change.low, change.high)))


def _drain(readers: _Readers, senders: list[Receiver], datagrams: int) -> int:
    """Nanoseconds that it takes to handle so many."""
    before, sent = sum(readers.handled()), 0
    with readers.stopped():
        for number, sender in enumerate(senders):
            share = datagrams * (number + 1) // len(senders) - sent
            sent += sender.send([_PAYLOAD] * share, (ADDRESS, readers.port))
        began = time.perf_counter_ns()
    deadline = time.monotonic() + _PATIENCE
    while (done := sum(readers.handled()) - before) < sent:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{done:,} of {sent:,} datagrams handled: ask for fewer with --datagrams")
        time.sleep(_POLL)
    return time.perf_counter_ns() - began


@contextlib.contextmanager
def _setup() -> Iterator[tuple[dict[str, _Readers], list[Receiver]]]:
    """Who reads, by row; and senders of whom each of two workers has as many."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastrecv-workers-")))
        stack.enter_context(namespace())
        readers = {
            "bare": stack.enter_context(_bare()),
            "one": stack.enter_context(_supervised(folder / "one", 1)),
            "two": stack.enter_context(_supervised(folder / "two", 2)),
        }
        cpus = sorted(os.sched_getaffinity(0))
        for one in readers.values():
            for number, pid in enumerate(one.pids):
                os.sched_setaffinity(pid, [cpus[-1 - number % len(cpus)]])
        yield readers, _chosen(stack, readers["two"])


@contextlib.contextmanager
def _bare() -> Iterator[_Readers]:
    fd = os.memfd_create("bare")
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        memory = mmap.mmap(fd, mmap.PAGESIZE)
        words = ["-m", "fastrecv.bench.workers_counting", *map(str, (fd, ADDRESS, _PORTS["bare"], _BUFFER))]
        process = subprocess.Popen([sys.executable, *words], pass_fds=[fd])  # noqa: S603 - ourselves
    finally:
        os.close(fd)
    readers = _Readers([process.pid], _PORTS["bare"], lambda: [struct.unpack_from("=Q", memory)[0]])
    try:
        _wait_for(readers)
        yield readers
    finally:
        process.kill()
        process.wait()
        memory.close()


def _wait_for(readers: _Readers) -> None:
    """Until a datagram is handled."""
    with Receiver.bind((ADDRESS, 0)) as sender:

        def answered() -> bool:
            sender.send([_PAYLOAD], (ADDRESS, readers.port))
            return sum(readers.handled()) > 0

        until(answered, lambda: "the bare loop does not begin")
    _rest(readers)


def _rest(readers: _Readers) -> None:
    """Wait until nothing more is handled."""
    before = [-1]
    while (now := readers.handled()) != before:
        before = now
        time.sleep(0.05)


@contextlib.contextmanager
def _supervised(folder: Path, workers: int) -> Iterator[_Readers]:
    folder.mkdir()
    port = _PORTS["one" if workers == 1 else "two"]
    options = ("-w", workers, "--receive-buffer", _BUFFER)
    with Service(folder, HANDLER, *options, bind=f"{ADDRESS}:{port}", start_new_session=True) as service:
        service.begun(workers)
        with service.counters().open("rb") as opened:
            memory = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
        handled = np.frombuffer(memory, ROW, workers)["handled"]
        yield _Readers(service.pids(workers), port, lambda: handled.astype(int).tolist())
        service.stop()


def _chosen(stack: contextlib.ExitStack, two: _Readers) -> list[Receiver]:
    """Senders in turns: one of the first worker, one of the second."""
    found: list[list[Receiver]] = [[], []]
    for number in range(_CANDIDATES):
        sender = stack.enter_context(Receiver.bind((f"127.1.0.{number}", 0)))
        before = two.handled()
        sender.send([_PAYLOAD], (ADDRESS, two.port))
        until(lambda before=before: two.handled() != before, lambda: "the workers do not handle")  # type: ignore[misc]
        found[int(two.handled()[1] != before[1])].append(sender)
        if min(map(len, found)) >= _SENDERS:
            break
    return [sender for pair in zip(*(kind[:_SENDERS] for kind in found), strict=True) for sender in pair]
