"""What processes hold of the kernel, and whose they are: by it a test, or a whole run, is told what it left behind."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

__all__ = ["Traces", "held", "remaining"]

_NAME = "FASTRECV_TEST_RUN"  # a run's process, and where it is of several a dot and its worker: "17" or "17.23"
_RUN = os.environ.get(_NAME, "") if "PYTEST_XDIST_WORKER" in os.environ else str(os.getpid())
_OURS = f"{_RUN}.{os.getpid()}" if "PYTEST_XDIST_WORKER" in os.environ else _RUN
os.environ[_NAME] = _OURS  # inherited by every process that a test starts
_BEGUN_WITH = Path("/proc/self/environ").read_bytes()  # what is set later is not in it
_LINK = re.compile(r"^link_id:\t(\d+)$", re.MULTILINE)  # Linux, kernel/bpf/syscall.c: bpf_link_show_fdinfo
_PATIENCE = 5.0  # seconds


class Traces(NamedTuple):
    """namespaces : network namespaces that processes are in or hold open ("net:[inode]"). links : ids of BPF links."""

    namespaces: set[str]
    links: set[int]


_NOTHING = Traces(set(), set())


def held(strangers: bool = False) -> Traces:
    """By this process and those it has started; or by strangers, which no process of this run has started."""
    found = Traces(set(), set())
    for process in Path("/proc").glob("[0-9]*"):
        try:
            started = _OURS if int(process.name) == os.getpid() else _started_by(process)
            if started.partition(".")[0] != _RUN if strangers else started == _OURS:
                _add(found, process)
        except OSError:
            continue  # the process has ended
    return found


def _started_by(process: Path) -> str:
    environ = (process / "environ").read_bytes()
    if environ == _BEGUN_WITH and _parent(process) == os.getpid():  # forked, and it runs no other program
        return _OURS
    words = environ.split(b"\0")
    return next((word.decode() for word in words if word.startswith(f"{_NAME}=".encode())), "").partition("=")[2]


def _parent(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])


def _add(found: Traces, process: Path) -> None:
    found.namespaces.add((process / "ns/net").readlink().name)
    for fd in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed: one is what they were listed by
            name = fd.readlink().name
            if name.startswith("net:["):
                found.namespaces.add(name)
            elif name.startswith("anon_inode:bpf"):
                found.links.update(map(int, _LINK.findall((process / "fdinfo" / fd.name).read_text())))


def remaining(look: Callable[[], Traces], before: Traces) -> Traces:
    """What is there after a while that was not before. Processes end after they are killed, links after they are held.

    A link that a stranger holds, or has held meanwhile, does not count.
    """
    deadline = time.monotonic() + _PATIENCE
    foreign: set[int] = set()
    while True:
        now = look()
        left = Traces(now.namespaces - before.namespaces, now.links - before.links - foreign)
        if left == _NOTHING or time.monotonic() > deadline:
            return left
        foreign |= held(strangers=True).links
        time.sleep(0.02)
