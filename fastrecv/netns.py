"""Network namespaces without a name: made, entered and left by the calling thread.

A namespace here lives as long as somebody holds it (this process, a socket, a device of it): nothing is mounted or
pinned, so even SIGKILL leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from typing import Self

__all__ = ["Namespace"]

_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int) -> None:
    """unshare(2) and setns(2), which Python has only since 3.12."""
    if getattr(_libc, name)(*arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


class Namespace:
    """A nameless network namespace; `with namespace:` moves the calling thread into it. CAP_SYS_ADMIN."""

    def __init__(self) -> None:
        self.fd = -1
        self._outside = threading.local()
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _call("unshare", _CLONE_NEWNET)
            try:
                self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            finally:
                _call("setns", home, _CLONE_NEWNET)
        finally:
            os.close(home)

    @property
    def inode(self) -> int:
        return os.fstat(self.fd).st_ino

    def __enter__(self) -> Self:
        outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _call("setns", self.fd, _CLONE_NEWNET)
        except OSError:
            os.close(outside)
            raise
        self._outside.stack = [*getattr(self._outside, "stack", []), outside]
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        outside = self._outside.stack.pop()
        _call("setns", outside, _CLONE_NEWNET)
        os.close(outside)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        if self.fd >= 0:
            warnings.warn(f"unclosed {type(self).__name__}, fd {self.fd}", ResourceWarning, source=self, stacklevel=2)
            self.close()
