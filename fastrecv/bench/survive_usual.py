"""What services usually are: a process that opens its own socket and handles one datagram after the other.

A script that needs nothing but Python: `python -P survive_usual.py KIND FOLDER SLOT ADDRESS PORT BUFFER`. KIND is
recvfrom, a loop around socket.recvfrom on one of several sockets with SO_REUSEPORT; or asyncio, a DatagramProtocol.
Told to stop by SIGTERM it finishes the datagram in its hands, and ends. What it handles it writes down in memory that
is a file's, so that a SIGKILL costs none of it: 8 bytes that count the datagrams, then their 12 bytes each.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import socket
import struct
import sys
from pathlib import Path

__all__ = ["HEAD", "ROW_BYTES"]

HEAD = struct.Struct("=Q")
ROW_BYTES = 12
_ROOM = 1 << 28  # bytes, of a sparse file
_SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h


class _Rows:
    """Writes down. The file is there when the socket is bound."""

    def __init__(self, folder: Path, slot: int) -> None:
        fd = os.open(folder / f"{slot}-{os.getpid()}.rows", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(fd, _ROOM)
        self._memory = mmap.mmap(fd, _ROOM)
        os.close(fd)
        self._count, self._end = 0, HEAD.size

    def add(self, datagram: bytes) -> None:
        end = self._end + ROW_BYTES
        self._memory[self._end : end] = datagram
        self._end = end
        self._count += 1
        HEAD.pack_into(self._memory, 0, self._count)


def _open(address: str, port: int, buffer: int, *, shared: bool) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer)
    sock.bind((address, port))
    return sock


def _loop(folder: Path, slot: int, address: str, port: int, buffer: int) -> None:
    going = True

    def stop(_number: int, _frame: object) -> None:
        nonlocal going
        going = False

    signal.signal(signal.SIGTERM, stop)
    with _open(address, port, buffer, shared=True) as sock:
        rows = _Rows(folder, slot)
        receive, add = sock.recvfrom, rows.add
        while going:
            data, _source = receive(65535)
            add(data)


class _Protocol(asyncio.DatagramProtocol):
    def __init__(self, rows: _Rows) -> None:
        self._rows = rows

    def datagram_received(self, data: bytes, addr: tuple[object, ...]) -> None:  # noqa: ARG002 - asyncio's signature
        self._rows.add(data)


async def _serve(folder: Path, slot: int, address: str, port: int, buffer: int) -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    sock = _open(address, port, buffer, shared=False)
    rows = _Rows(folder, slot)
    transport, _ = await loop.create_datagram_endpoint(lambda: _Protocol(rows), sock=sock)
    await stopped.wait()
    transport.close()


def _main(kind: str, folder: str, slot: str, address: str, port: str, buffer: str) -> None:
    if kind == "asyncio":
        asyncio.run(_serve(Path(folder), int(slot), address, int(port), int(buffer)))
    else:
        _loop(Path(folder), int(slot), address, int(port), int(buffer))


if __name__ == "__main__":
    _main(*sys.argv[1:])
