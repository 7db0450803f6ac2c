"""What supervisor and worker say to one another: words over a pair of sockets that keep them apart (SOCK_SEQPACKET).

The supervisor's first message is the worker's Task. The worker says "ready" when its handler has been imported and
started, or "failed" and why; then it waits for "start" before it reads its socket. "stop" lets it finish its batch,
"drain" read the queue to its end first; having read for the last time it says "stopped". A supervisor that is gone
means "stop".
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
        self.started = self.stop = self.drain = self._alone = False

    @property
    def waiting(self) -> bool:
        """Whether it is to neither start nor stop yet."""
        return not (self.started or self.stop)

    def fileno(self) -> int:
        return self._sock.fileno()

    def say(self, word: str) -> None:
        try:
            self._sock.send(word.encode()[: LONGEST - 1])
        except (BrokenPipeError, ConnectionResetError):
            self.stop = self._alone = True

    def look(self) -> None:
        """Take what has been said meanwhile."""
        while not self._alone:
            try:
                word = self._sock.recv(LONGEST, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                word = b""
            self._alone = not word
            self.started |= word == b"start"
            self.stop |= word in (b"", b"stop")
            self.drain |= word == b"drain"

    def idle(self, seconds: float | None, *others: int) -> None:
        """Wait until something is said, one of the other descriptors is readable, or the time is over."""
        poll = select.poll()
        for fd in (self._sock.fileno(), *others):
            poll.register(fd, select.POLLIN)
        poll.poll(None if seconds is None else 1000 * seconds)
        self.look()
