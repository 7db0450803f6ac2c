"""What a worker process is to the kernel: the CPUs it runs on, how nice it is, what it may use at most.

sched_setaffinity(2), setpriority(2), setrlimit(2). A worker gives them to itself, before it gives its privileges up.
"""

from __future__ import annotations

import os
import re
import resource
from errno import EPERM
from pathlib import Path
from typing import NamedTuple

from fastrecv import privileges

__all__ = ["Attributes", "allowed", "limit", "listed"]

_MOST_CPUS = 8192  # CONFIG_NR_CPUS at most (arch/x86/Kconfig)
_CPUS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?", re.ASCII)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_VALUE = re.compile(rf"(\d{{1,19}})([{''.join(_UNITS)}]?)", re.ASCII)
_LARGEST = (1 << 63) - 1
UNLIMITED = "unlimited"
LIMITS = {
    name.removeprefix("RLIMIT_").lower(): number
    for name, number in vars(resource).items() if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"  # NOFILE
}  # fmt: skip
"""Numbers of resources by their names, as Python has them for this kernel."""


class Attributes(NamedTuple):
    """As they shall be.

    cpus : the worker of slot i gets the i-th, round and round; none: where the supervisor runs. nice : -20 to 19; None:
    as nice as the supervisor. limits : soft and hard, by the resource's number.
    """

    cpus: list[int]
    nice: int | None
    limits: dict[int, int]

    @property
    def privileges(self) -> list[int]:
        """The capabilities that `apply` takes, for a process like this one."""
        found = []
        if self._below:
            found.append(privileges.CAP_SYS_NICE)
        if self._above:
            found.append(privileges.CAP_SYS_RESOURCE)
        return found

    @property
    def _below(self) -> bool:
        """Whether nice is lower than who is without privileges may set it (RLIMIT_NICE, getrlimit(2))."""
        if self.nice is None:
            return False
        least = 20 - _ordered(resource.getrlimit(resource.RLIMIT_NICE)[0])
        return self.nice < min(least, os.getpriority(os.PRIO_PROCESS, 0))

    @property
    def _above(self) -> list[str]:
        """The limits that are above the hard ones."""
        return [
            name for name, number in LIMITS.items()
            if number in self.limits and _ordered(self.limits[number]) > _ordered(resource.getrlimit(number)[1])
        ]  # fmt: skip

    def check(self) -> None:
        """PermissionError where a worker could not apply them."""
        if self._below and not privileges.has(privileges.CAP_SYS_NICE):
            now = os.getpriority(os.PRIO_PROCESS, 0)
            raise PermissionError(EPERM, f"nice {self.nice} is below {now}, which takes CAP_SYS_NICE: run as root")
        if self._above and not privileges.has(privileges.CAP_SYS_RESOURCE):
            name = self._above[0]
            hard = _spelled(resource.getrlimit(LIMITS[name])[1])
            raise PermissionError(
                EPERM, f"limit {name} is above the hard one, {hard}, which takes CAP_SYS_RESOURCE: run as root"
            )

    def apply(self, slot: int) -> None:
        """To the calling process, which has one thread. OSError."""
        if self.cpus:
            os.sched_setaffinity(0, {self.cpus[slot % len(self.cpus)]})
        if self.nice is not None:
            os.setpriority(os.PRIO_PROCESS, 0, self.nice)
        for number, value in self.limits.items():
            resource.setrlimit(number, (value, value))


def listed(text: str) -> list[int]:
    """The CPUs of a list like "0-3,6", in its order. ValueError."""
    found: list[int] = []
    for word in text.split(","):
        match = _CPUS.fullmatch(word.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < _MOST_CPUS:
            raise ValueError(f"{text!r} is no list of CPUs: give one like 0-3,6")
        found += range(first, last + 1)
    return found


def allowed(text: str) -> list[int]:
    """Those of `listed`; ValueError also where this process may not run on one of them (taskset(1), cpuset(7))."""
    found, may = listed(text), os.sched_getaffinity(0)
    for cpu in found:
        if cpu not in may:
            raise ValueError(f"there is no CPU {cpu} for this process: it has {', '.join(map(str, sorted(may)))}")
    return found


def limit(name: str, value: int | str) -> tuple[int, int]:
    """The number of a resource, and its limit: 1024, "1G" or "unlimited". ValueError."""
    number = LIMITS.get(name)
    if number is None:
        raise ValueError(f"there is no such limit: give one of {', '.join(sorted(LIMITS))}")
    if value == UNLIMITED:
        return number, resource.RLIM_INFINITY
    match = _VALUE.fullmatch(str(value))
    found = int(match[1]) << _UNITS[match[2]] if match else -1
    if not 0 <= found <= _LARGEST:
        raise ValueError(f"{value!r} is no limit: give a number, perhaps with K, M, G or T, or {UNLIMITED}")
    if number == resource.RLIMIT_NOFILE:
        most = int(Path("/proc/sys/fs/nr_open").read_text())
        if found > most:
            raise ValueError(f"{value!r} is more than the kernel allows: give {most} at most (fs.nr_open)")
    return number, found


def _ordered(value: int) -> float:
    """So that no limit is the highest."""
    return float("inf") if value == resource.RLIM_INFINITY else value


def _spelled(value: int) -> str:
    return UNLIMITED if value == resource.RLIM_INFINITY else str(value)
