"""Giving privileges up: capabilities(7) of the calling thread, before it does what does not need them."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

__all__ = ["CAP_BPF", "OtherThreadsError", "keep_only", "refuse_threads"]

CAP_BPF = 39  # include/uapi/linux/capability.h
_VERSION_3 = 0x20080522  # the same
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4  # include/uapi/linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)


class OtherThreadsError(RuntimeError):
    """Capabilities are a thread's own, and there are other threads."""


def keep_only(*capabilities: int) -> None:
    """Give up every capability but these, for good; threads that the caller starts afterwards have no more.

    Those of `capabilities` that the caller does not have stay missing. OtherThreadsError where there are other
    threads: each has capabilities of its own. What a user may do by his id, root above all, he still may.
    """
    refuse_threads()
    header = ctypes.create_string_buffer(struct.pack("Ii", _VERSION_3, 0))
    before = ctypes.create_string_buffer(24)
    _checked("capget", _libc.capget(header, before))
    words = struct.unpack("6I", before.raw)  # (effective, permitted, inheritable), twice
    kept = sum(1 << number for number in capabilities) & (words[1] | words[4] << 32)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    _checked("prctl", _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    _checked("prctl", _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))  # what root executes would get all back
    _checked("capset", _libc.capset(header, ctypes.create_string_buffer(struct.pack("6I", low, low, 0, high, high, 0))))


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
