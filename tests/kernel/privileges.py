"""Giving capabilities up for a while: what a step needs is a tested fact only where it has nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# include/uapi/linux/capability.h
CAP_CHOWN, CAP_FSETID, CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_NET_RAW = 0, 4, 10, 12, 13
CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 19, 21, 38, 39
_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, data: ctypes.Array[ctypes.c_char]) -> None:
    """capget(2) or capset(2) of the calling thread."""
    header = ctypes.create_string_buffer(struct.pack("Ii", _VERSION_3, 0))
    if getattr(_libc, name)(header, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


@contextlib.contextmanager
def only(*capabilities: int) -> Iterator[None]:
    """The calling thread's effective capabilities are these and no others."""
    before = ctypes.create_string_buffer(24)
    _call("capget", before)
    words = list(struct.unpack("6I", before.raw))  # (effective, permitted, inheritable), twice
    effective = sum(1 << number for number in capabilities)
    words[0], words[3] = effective & 0xFFFFFFFF, effective >> 32
    _call("capset", ctypes.create_string_buffer(struct.pack("6I", *words)))
    try:
        yield
    finally:
        _call("capset", ctypes.create_string_buffer(before.raw))


def need_open_root() -> None:
    """Skip what other users are to do where the root directory is closed to them: a folder may serve as a machine."""
    if not os.stat("/").st_mode & stat.S_IXOTH:  # noqa: PTH116 - a mode, of a path known beforehand
        pytest.skip("the root directory is closed to other users here")


def open_to_all(folder: Path) -> None:
    """A folder of pytest's, and those of pytest's above it: other users may go and write there."""
    for path in (folder, *folder.parents):
        path.chmod(0o777)
        if path.name.startswith("pytest-of-"):
            return


def as_user(user: int, group: int, action: Callable[[], int]) -> int:
    """A child that has become another user, without capabilities, and does something: its process id."""
    need_open_root()
    child = os.fork()
    if child:
        return child
    try:
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)
        os._exit(action())
    finally:
        os._exit(99)
