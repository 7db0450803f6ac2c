"""Processes of the test bed: each in its namespace, killed with the bench, however that ends."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from errno import ENOENT
from pathlib import Path

from fastrecv.errors import NotSupported
from fastrecv.netns import Namespace

__all__ = ["KILLED_WITH_US", "PACKAGES", "SBIN", "alive", "cpu_seconds", "found", "started", "tree"]

KILLED_WITH_US = ["setpriv", "--pdeathsig", "KILL"]
"""In front of a command (util-linux); its own children are its own affair."""
PACKAGES = {"nats-server": "nats-server", "setpriv": "util-linux"}
"""Programs that the test bed needs, and what has them."""
SBIN = "/usr/local/sbin:/usr/sbin"
"""Where daemons are, also for who has them not on his path."""
_TICK = os.sysconf("SC_CLK_TCK")


def found(program: str) -> str:
    """The path of one. NotSupported where it is not installed."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:{SBIN}")
    if path is None:
        raise NotSupported("the test bed", program, ENOENT, f"install it (Debian: {PACKAGES[program]})")
    return path


def started(space: Namespace, words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """A program with its arguments, in a namespace, its output behind what the log has already."""
    path = found(words[0])
    with space, log.open("a") as output:
        return subprocess.Popen(  # noqa: S603 - programs that the command has looked for
            [*KILLED_WITH_US, path, *words[1:]], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip


def tree(pid: int) -> list[int]:
    """A process and its children (proc(5), children); none where it has ended."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [pid, *(one for child in children for one in tree(int(child)))]


def alive(pid: int) -> bool:
    """Whether it runs still: it is there, and no zombie (proc(5), stat)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def cpu_seconds(pids: Sequence[int]) -> float:
    """What they have used so far, in user mode and in the kernel (proc(5), stat: fields 14 and 15)."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICK
