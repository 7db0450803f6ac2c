"""The C loop of xsk_limit.c: the limit beside the XdpReceiver, compiled when it is first asked for."""

from __future__ import annotations

import ctypes
import functools
import os
import time
from errno import EBUSY
from types import TracebackType
from typing import Self

from fastrecv.bench.limit import compile_c

__all__ = ["XskLoop", "compiled"]

_PATIENCE = 1.0  # seconds; the kernel lets go of a queue some time after its socket is closed (xp_put_pool is deferred)
_NAP = 0.005


@functools.cache
def compiled() -> ctypes.CDLL:
    """The library of xsk_limit.c. NotSupported without a C compiler and libxdp's headers."""
    library = compile_c("xsk_limit.c", "a C compiler named cc and libxdp-dev", "xdp", "bpf")
    loop, number = ctypes.c_void_p, ctypes.c_uint32
    library.xsk_limit_open.argtypes, library.xsk_limit_open.restype = [ctypes.c_char_p, number, number], loop
    library.xsk_limit_close.argtypes, library.xsk_limit_close.restype = [loop], None
    library.xsk_limit_fd.argtypes, library.xsk_limit_fd.restype = [loop], ctypes.c_int
    library.xsk_limit_lost.argtypes, library.xsk_limit_lost.restype = [loop], ctypes.c_long
    library.xsk_limit_run.argtypes = [loop, number, ctypes.POINTER(ctypes.c_int)]
    library.xsk_limit_run.restype = ctypes.c_long
    return library


class XskLoop:
    """A loop over the AF_XDP rings of queue 0 of an interface, in copy mode; a context manager.

    interface : its name, in the calling thread's network namespace. ring, frames : XdpReceiver's ring_size and frames.
    """

    def __init__(self, interface: str, ring: int, frames: int) -> None:
        self._library = compiled()
        deadline = time.monotonic() + _PATIENCE
        while not (loop := self._library.xsk_limit_open(interface.encode(), ring, frames)):
            number = ctypes.get_errno()
            if number != EBUSY or time.monotonic() > deadline:
                raise OSError(number, f"opening the C loop's AF_XDP socket on {interface}: {os.strerror(number)}")
            time.sleep(_NAP)
        self._loop = loop

    def fileno(self) -> int:
        return int(self._library.xsk_limit_fd(self._loop))

    def run(self, batch: int, stop: ctypes.c_int) -> int:
        """Receive until `stop` is not 0 and the ring is empty, without the GIL; how many datagrams that were."""
        return self._checked(self._library.xsk_limit_run(self._loop, batch, ctypes.byref(stop)))

    @property
    def lost(self) -> int:
        """Datagrams that the kernel has had no frame, or no room in the ring, for."""
        return self._checked(self._library.xsk_limit_lost(self._loop))

    @staticmethod
    def _checked(count: int) -> int:
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        return int(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._library.xsk_limit_close(self._loop)
        self._loop = None
