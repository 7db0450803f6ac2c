"""Giving privileges up: capabilities(7) of the calling thread, before it does what does not need them."""

from __future__ import annotations

import ctypes
import os
import struct
from errno import EPERM
from pathlib import Path

__all__ = [
    "ALONE",
    "CAP_BPF",
    "CAP_IPC_LOCK",
    "CAP_KILL",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "OtherThreadsError",
    "check_becoming",
    "has",
    "is_privileged_port",
    "keep_only",
    "refuse_threads",
    "tell_parents_death",
]

# include/uapi/linux/capability.h
CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_BPF = 5, 6, 7, 10, 12, 39
CAP_NET_RAW, CAP_IPC_LOCK, CAP_SYS_NICE, CAP_SYS_RESOURCE = 13, 14, 23, 24
_VERSION_3 = 0x20080522  # the same
# include/uapi/linux/prctl.h
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4
ALONE = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment in which numpy's linear algebra starts no threads, which would keep every capability."""
_libc = ctypes.CDLL(None, use_errno=True)


class OtherThreadsError(RuntimeError):
    """Capabilities are a thread's own, and there are other threads."""


def keep_only(*capabilities: int, inherited: bool = False) -> None:
    """Give up every capability but these, for good; threads that the caller starts afterwards have no more.

    inherited : what it executes has them, too, as root's programs have them anyway.

    Those of `capabilities` that the caller does not have stay missing. OtherThreadsError where there are other threads:
    each has capabilities of its own. What a user may do by his id, root above all, he still may.
    """
    refuse_threads()
    kept = sum(1 << number for number in capabilities) & _sets()[1]
    ambient = kept if inherited else 0
    words = (kept & 0xFFFFFFFF,) * 2 + (ambient & 0xFFFFFFFF,) + (kept >> 32,) * 2 + (ambient >> 32,)
    header = _header()
    _checked("prctl", _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    _checked("prctl", _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))  # what root executes would get all back
    _checked("capset", _libc.capset(header, ctypes.create_string_buffer(struct.pack("6I", *words))))
    for number in capabilities:
        if ambient & 1 << number:
            _checked("prctl", _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0))


def tell_parents_death(number: int) -> None:
    """Get a signal when the parent's thread that began this process has ended (PR_SET_PDEATHSIG, prctl(2)).

    To become another user or to give capabilities up afterwards would undo it.
    """
    _checked("prctl", _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0))


def has(capability: int) -> bool:
    """Whether the calling thread has it in effect."""
    return bool(_sets()[0] & 1 << capability)


def check_becoming(user: int | None, group: int | None) -> None:
    """PermissionError where the caller may not become that user and group, by setresuid(2) and setgroups(2)."""
    wanted = 0
    if user is not None:
        wanted |= 1 << CAP_SETUID
    if group is not None:
        wanted |= 1 << CAP_SETGID
    if wanted & ~_sets()[0]:
        raise PermissionError(EPERM, "to become another user or group takes CAP_SETUID and CAP_SETGID: run as root")


def is_privileged_port(port: int) -> bool:
    """Whether to bind to it takes CAP_NET_BIND_SERVICE (ip(7), ip_unprivileged_port_start)."""
    return port < int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())


def _header() -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack("Ii", _VERSION_3, 0))


def _set(*words: int) -> None:
    """capset(2) of effective, permitted and inheritable capabilities, the low words first."""
    _checked("capset", _libc.capset(_header(), ctypes.create_string_buffer(struct.pack("6I", *words))))


def _sets() -> tuple[int, int]:
    """The effective and the permitted capabilities of the calling thread."""
    found = ctypes.create_string_buffer(24)
    _checked("capget", _libc.capget(_header(), found))
    words = struct.unpack("6I", found.raw)  # (effective, permitted, inheritable), twice
    return words[0] | words[3] << 32, words[1] | words[4] << 32


def _checked(name: str, result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def refuse_threads() -> None:
    """OtherThreadsError where a library, or the caller, has started a thread: `keep_only` could not reach it."""
    if _threads() > 1:
        raise OtherThreadsError("other threads would keep their capabilities")


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))
