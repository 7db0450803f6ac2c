"""What supervisor and worker say to one another: words over a pair of sockets that keep them apart (SOCK_SEQPACKET).

The supervisor's first message is the worker's Task. The worker says "ready" when it has imported its handler, or
"failed" and why; then it waits for "start" before it reads its socket. "stop" lets it finish its batch, "drain" read
the queue to its end first; having read for the last time it says "stopped". A supervisor that is gone means "stop".
"""

from __future__ import annotations

import select
import socket

__all__ = ["LONGEST", "Orders"]

LONGEST = 1 << 16  # bytes of a message


class Orders:
    """The worker's end."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.stop = self.drain = self.alone = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def say(self, word: str) -> None:
        try:
            self._sock.send(word.encode()[: LONGEST - 1])
        except (BrokenPipeError, ConnectionResetError):
            self.stop = self.alone = True

    def wait(self) -> bool:
        """Wait for "start"; False where that will not come."""
        while not self.stop:
            if self._take(0) == b"start":
                return True
        return False

    def look(self) -> None:
        """Take what has been said meanwhile."""
        try:
            while not self.alone:
                self._take(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return

    def _take(self, flags: int) -> bytes:
        try:
            word = self._sock.recv(LONGEST, flags)
        except ConnectionResetError:
            word = b""
        if not word:
            self.alone = True
        self.stop |= word in (b"", b"stop")
        self.drain |= word == b"drain"
        return word

    def idle(self, fd: int, seconds: float) -> None:
        """Wait until a descriptor is readable, something is said, or the time is over."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._sock, select.POLLIN)
        poll.poll(1000 * seconds)
        self.look()
