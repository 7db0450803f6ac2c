"""The C loop of limit.c: compiled when it is first asked for, since only who runs this bench has a use for it."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from errno import ENOENT
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Self

from fastrecv.errors import NotSupported

__all__ = ["CLoop", "compile_c", "compiled"]


def compile_c(name: str, needs: str, *libraries: str) -> ctypes.CDLL:
    """The library of a C file beside this one, linked to `libraries`. NotSupported without what it `needs`."""
    with tempfile.TemporaryDirectory(prefix="fastrecv-") as folder:
        source, target = Path(folder, name), Path(folder, name).with_suffix(".so")
        source.write_bytes(files("fastrecv.bench").joinpath(name).read_bytes())
        command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(target), str(source)]
        command += [f"-l{library}" for library in libraries]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own source
        except FileNotFoundError:
            raise NotSupported("the C loop to compare with", needs, ENOENT, "no cc in PATH") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["cc failed"])[0]
            raise NotSupported("the C loop to compare with", needs, ENOENT, reason)
        return ctypes.CDLL(str(target), use_errno=True)  # stays mapped when the file is gone


@functools.cache
def compiled() -> ctypes.CDLL:
    """The library of limit.c. NotSupported without a C compiler."""
    library = compile_c("limit.c", "a C compiler named cc")
    library.limit_open.argtypes, library.limit_open.restype = [ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    library.limit_close.argtypes, library.limit_close.restype = [ctypes.c_void_p], None
    library.limit_drain.argtypes, library.limit_drain.restype = [ctypes.c_void_p, ctypes.c_int], ctypes.c_long
    return library


class CLoop:
    """A recvmmsg loop over buffers of its own: `slots` datagrams a call, `control` bytes of messages each."""

    def __init__(self, slots: int = 64, control: int = 0) -> None:
        self._library = compiled()
        self._loop = self._library.limit_open(slots, control)
        if not self._loop:
            raise MemoryError

    def drain(self, fd: int) -> int:
        """Receive until the queue is empty; how many datagrams that were."""
        count = int(self._library.limit_drain(self._loop, fd))
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        return count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._library.limit_close(self._loop)
        self._loop = None
