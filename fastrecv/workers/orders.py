"""What supervisor and worker say to one another: words over a pair of sockets that keep them apart (SOCK_SEQPACKET).

The supervisor's first message is the worker's Task. The worker says "ready" when its handler has been imported and
started, or "failed" and why; then it waits for "start" before it reads its socket. "stop" lets it finish its batch,
"drain" read the queue to its end first; having read for the last time it says "stopped". A supervisor that is gone
means "drain" where nobody else has the queue, else "stop".
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable

__all__ = ["LONGEST", "Orders"]

LONGEST = 1 << 16  # bytes of a message


class Orders:
    """The worker's end. forsaken : called when the supervisor has gone; whether that means "drain", or "stop"."""

    def __init__(self, sock: socket.socket, forsaken: Callable[[], bool]) -> None:
        self._sock, self._forsaken = sock, forsaken
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
            self._be_alone()

    def _be_alone(self) -> None:
        if not self._alone:
            self._alone = True
            draining = self.started and self._forsaken()
            self.drain |= draining
            self.stop |= not draining

    def look(self) -> None:
        """Take what has been said meanwhile."""
        while not self._alone:
            try:
                word = self._sock.recv(LONGEST, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                word = b""
            if not word:
                self._be_alone()
            self.started |= word == b"start"
            self.stop |= word == b"stop"
            self.drain |= word == b"drain"

    def idle(self, seconds: float | None, *others: int) -> None:
        """Wait until something is said, one of the other descriptors is readable, or the time is over."""
        poll = select.poll()
        for fd in (self._sock.fileno(), *others):
            poll.register(fd, select.POLLIN)
        poll.poll(None if seconds is None else 1000 * seconds)
        self.look()
