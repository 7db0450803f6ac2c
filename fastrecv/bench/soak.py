"""What a service that lives long leaves behind: memory, descriptors, BPF objects, while workers come and go.

The same churn as of `survive`, at a moderate rate. Now and then it is written down what the supervisor and the workers
have. The supervisor is one process all the time; of the workers that of slot 0 is spared, and once there are no more
rolling restarts, after a third of the time, it is the same process to the end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy  # its parts when they are asked for: statistics alone take half a second to import

from fastrecv import bpf
from fastrecv.bench import survive
from fastrecv.bench.survive import Plan, Run
from fastrecv.bench.survive_churn import Due, Pattern, schedule
from fastrecv.bench.survive_supervised import Supervised
from fastrecv.workers.counters import NAME

__all__ = ["RATE", "Sample", "Slope", "Soak", "leaks", "run", "slopes"]

RATE = 10_000.0
"""Datagrams a second."""
_EVERY = 1.0  # seconds
_RESTARTS = 1 / 3  # of the time, from its beginning
_SPARED = 0  # the slot
_GROUPS = (
    30  # of samples, whose medians make a slope: neighbours are alike, which an interval must not take for knowledge
)
_HOUR = 3600.0
_PINNED = Path("/sys/fs/bpf")
_BPF = re.compile(r"^anon_inode:bpf[-_](map|prog|link)$")
_ID = re.compile(r"^(?:map|prog|link)_id:\t(\d+)$", re.MULTILINE)


class Sample(NamedTuple):
    """At a time: seconds since the beginning. workers : how many are wanted. steady : no process comes or goes.

    resident : bytes, of the supervisor and of slot 0's worker. descriptors, objects : of the supervisor, all and those
    of BPF. pid : of slot 0's worker.
    """

    at: float
    workers: int
    steady: bool
    resident: int
    descriptors: int
    objects: int
    pid: int
    worker_resident: int


class Slope(NamedTuple):
    """Bytes an hour, with the 95 % interval (Theil and Sen, over medians of neighbours), from so many seconds."""

    what: str
    estimate: float
    low: float
    high: float
    seconds: float


class Soak(NamedTuple):
    """What came of it. run : the account. faults : its, and what was leaked or left behind."""

    run: Run
    samples: list[Sample]
    slopes: list[Slope]
    faults: list[str]


class _Watcher:
    """Looks now and then."""

    def __init__(self, on_look: Callable[[float, Pattern], None]) -> None:
        self.samples: list[Sample] = []
        self.pids: set[int] = set()
        self.objects: set[tuple[str, int]] = set()
        self.memory: int | None = None
        self._on_look, self._next = on_look, 0.0

    def __call__(self, now: float, pattern: Pattern) -> None:
        self._on_look(now, pattern)
        if now < self._next:
            return
        self._next = now + _EVERY
        assert isinstance(pattern, Supervised)
        service = pattern.service
        supervisor, reading = service.process.pid, service.reading()
        children = {int(word) for word in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()}
        self.pids |= children
        if self.memory is None:
            self.memory = service.counters().stat().st_ino
        descriptors = _descriptors(supervisor)
        objects = {(found[1], fd) for fd, what in descriptors.items() if (found := _BPF.match(what))}
        self.objects |= {(kind, number) for kind, fd in objects if (number := _id(supervisor, fd)) is not None}
        steady = not pattern.busy and children == set(reading.values()) and len(children) == pattern.size
        pid = reading.get(_SPARED, 0)
        self.samples.append(Sample(
            now, pattern.size, steady, _resident(supervisor), len(descriptors), len(objects), pid, _resident(pid),
        ))  # fmt: skip


def _resident(pid: int) -> int:
    """Bytes; 0 where there is no such process any more."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _descriptors(pid: int) -> dict[int, str]:
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[int(path.name)] = str(path.readlink())
        except FileNotFoundError:  # closed meanwhile
            continue
    return found


def _id(pid: int, fd: int) -> int | None:
    try:
        found = _ID.search(Path(f"/proc/{pid}/fdinfo/{fd}").read_text())
    except FileNotFoundError:
        return None
    return int(found[1]) if found else None


def run(plan: Plan, on_look: Callable[[float, Pattern], None]) -> Soak:
    """Root: namespaces, BPF. RuntimeError where the service does not do what it was told to."""
    pins = _pins()
    watcher = _Watcher(on_look)
    found = survive.supervised(plan, watcher, due=_due(plan), rate=RATE, spared=frozenset({_SPARED}))
    samples = watcher.samples
    return Soak(found, samples, slopes(samples), [*found.faults, *_left(watcher, pins), *leaks(samples)])


def _due(plan: Plan) -> list[Due]:
    """Rolling restarts early."""
    due = schedule(plan.actions, plan.seconds, plan.seed)
    return sorted((at * _RESTARTS if action == "restart" else at, action) for at, action in due)


def _pins() -> set[Path]:
    return set(_PINNED.rglob("*"))


def _left(watcher: _Watcher, pins: set[Path]) -> list[str]:
    """What is still there when all has ended."""
    ids = {kind: {number for of, number in watcher.objects if of == kind} for kind in ("prog", "link")}
    found: dict[str, set[int] | set[str]] = {
        "processes {}": {pid for pid in watcher.pids if Path(f"/proc/{pid}").exists()},
        "BPF programs {}": {number for number in ids["prog"] if bpf.program_info(number) is not None},
        "BPF links {}": ids["link"] & set(bpf.link_ids()),
        "pins {}": set(map(str, _pins() - pins)),
        "the counters' memory, mapped by processes {}": _mapped(watcher.memory),
    }
    return [words.format(", ".join(map(str, left))) + " were left behind" for words, left in found.items() if left]


def _mapped(inode: int | None) -> set[int]:
    """Processes that map the memory."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = path.read_text().splitlines()
        except OSError:  # ended meanwhile
            continue
        if any(NAME in line and line.split()[4] == str(inode) for line in lines):
            found.add(int(path.parts[2]))
    return found


def leaks(samples: Sequence[Sample]) -> list[str]:
    """Descriptors and BPF objects of the supervisor: at the same number of workers no more in the end than at first."""
    steady = [sample for sample in samples if sample.steady]
    third = samples[-1].at / 3
    found = []
    for what in ("descriptors", "objects"):
        least: dict[str, dict[int, int]] = {"first": {}, "last": {}}
        for sample in steady:
            part = "first" if sample.at < third else "last" if sample.at > 2 * third else None
            if part is not None:
                before = least[part].get(sample.workers)
                count = getattr(sample, what)
                least[part][sample.workers] = count if before is None else min(before, count)
        found += [
            f"the supervisor has {least['last'][size]} {what} at {size} workers, and had {least['first'][size]}"
            for size in sorted(least["first"].keys() & least["last"].keys())
            if least["last"][size] > least["first"][size]
        ]
    return found


def slopes(samples: Sequence[Sample]) -> list[Slope]:
    """How fast resident memory grows: the supervisor's, and that of the worker that was there last in the spared slot.

    What begins takes memory, so the first tenth of the time of each is left out. None where there are too few samples.
    """
    last = [(sample.at, sample.worker_resident) for sample in samples if sample.pid == samples[-1].pid]
    both = {"supervisor": [(sample.at, sample.resident) for sample in samples], "worker of slot 0": last}
    return [found for what, points in both.items() if (found := _slope(what, points)) is not None]


def _slope(what: str, points: list[tuple[float, int]]) -> Slope | None:
    points = points[len(points) // 10 :]
    if len(points) < 2 * _GROUPS:
        return None
    at, resident = (np.array([np.median(part) for part in np.array_split(column, _GROUPS)])
                    for column in zip(*points, strict=True))  # fmt: skip
    estimate, _, low, high = scipy.stats.theilslopes(resident, at / _HOUR, 0.95)
    return Slope(what, float(estimate), float(low), float(high), points[-1][0] - points[0][0])
