"""Network namespaces: made without a name or opened by their path, entered and left by the calling thread.

A namespace made here lives as long as somebody holds it (this process, a socket, a device of it): nothing is mounted or
pinned, so even SIGKILL leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import threading
import warnings
from errno import EINVAL, ENOPROTOOPT, EPERM
from typing import Self

from fastrecv.errors import NotSupported

__all__ = ["Namespace", "cookie_of"]

_HERE = "/proc/thread-self/ns/net"
_SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h
_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int) -> None:
    """unshare(2) and setns(2), which Python has only since 3.12."""
    if getattr(_libc, name)(*arguments) < 0:
        code = ctypes.get_errno()
        cure = " (needs CAP_SYS_ADMIN)" if code == EPERM else ""
        raise OSError(code, f"{name}: {os.strerror(code)}{cure}")


def cookie_of(sock: socket.socket) -> int:
    """The number of the network namespace that a socket lives in; never given again (SO_NETNS_COOKIE, Linux 5.14)."""
    try:
        (cookie,) = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))
    except OSError as error:
        if error.errno not in (ENOPROTOOPT, EINVAL):
            raise
        raise NotSupported("cookies of network namespaces", "Linux 5.14", ENOPROTOOPT, "SO_NETNS_COOKIE") from error
    return int(cookie)


class Namespace:
    """A network namespace; `with namespace:` moves the calling thread into it. CAP_SYS_ADMIN.

    Namespace() makes a nameless one, Namespace.open(path) opens one that exists.
    """

    def __init__(self) -> None:
        self.fd = -1
        self._outside = threading.local()
        home = os.open(_HERE, os.O_RDONLY)
        try:
            _call("unshare", _CLONE_NEWNET)
            try:
                self.fd = os.open(_HERE, os.O_RDONLY)
            finally:
                _call("setns", home, _CLONE_NEWNET)
        finally:
            os.close(home)

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None = None) -> Self:
        """The namespace that a file of /proc/PID/ns/net or /run/netns stands for; by default the caller's own."""
        opened = cls.__new__(cls)
        opened._outside = threading.local()
        opened.fd = -1
        opened.fd = os.open(path or _HERE, os.O_RDONLY)
        return opened

    @property
    def inode(self) -> int:
        return os.fstat(self.fd).st_ino

    @property
    def cookie(self) -> int:
        """Its number, which is never given again: inodes are. Needs no privilege for the caller's own namespace."""
        here = contextlib.nullcontext() if os.path.samestat(os.stat(_HERE), os.fstat(self.fd)) else self  # noqa: PTH116
        with here, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            return cookie_of(sock)

    def __enter__(self) -> Self:
        outside = os.open(_HERE, os.O_RDONLY)
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

    def settle(self) -> None:
        """Move the calling thread, and those it will start, into the namespace for good. CAP_SYS_ADMIN."""
        _call("setns", self.fd, _CLONE_NEWNET)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        if self.fd >= 0:
            warnings.warn(f"unclosed {type(self).__name__}, fd {self.fd}", ResourceWarning, source=self, stacklevel=2)
            self.close()
