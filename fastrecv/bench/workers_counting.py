"""The trivial handler, and a bare Receiver loop that calls it: what a worker of `fastrecv run` is compared with.

`python -m fastrecv.bench.workers_counting FD ADDRESS PORT BUFFER` runs the loop; FD : memory in which it says how many
datagrams it has handled, in 8 bytes.
"""

from __future__ import annotations

import mmap
import struct
import sys

from fastrecv import Batch, Receiver
from fastrecv.sockets import grow_receive_buffer, open_datagram

__all__ = ["HANDLER", "handle"]

HANDLER = "fastrecv.bench.workers_counting:handle"

_total = 0


def handle(batch: Batch) -> None:
    """Count."""
    global _total  # noqa: PLW0603 - a handler that is a function keeps its state so
    _total += len(batch)


def _loop(fd: int, address: str, port: int, buffer: int) -> None:
    memory = mmap.mmap(fd, mmap.PAGESIZE)
    with open_datagram((address, port)) as sock:
        grow_receive_buffer(sock, buffer)
        with Receiver(sock) as receiver:
            while True:
                handle(receiver.recv())
                struct.pack_into("=Q", memory, 0, _total)


if __name__ == "__main__":
    _loop(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
