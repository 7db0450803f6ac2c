"""Sockets of this host that have a path: who is at the other end, and files that the dead have left."""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path

from fastrecv.errors import StateError

__all__ = ["connect", "peer", "remove_stale"]


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user id of who has connected, or listens, by the kernel (SO_PEERCRED, unix(7))."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def connect(sock: socket.socket, path: str | Path, seconds: float) -> None:
    """Connect, and while the queue of a server is full, again: AF_UNIX says so at once."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            sock.connect(str(path))
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def remove_stale(path: Path) -> None:
    """Remove the socket file of a server that has ended (SOCK_SEQPACKET).

    StateError where one listens, which it names. What is no socket stays: bind says what is wrong with it.
    """
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.setblocking(False)
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # its queue is full
            raise StateError(f"{path} is served already: stop who serves it, or give another path") from None
        raise StateError(f"{path} is served already, by process {peer(probe)[0]}: stop it, or give another path")
