"""A reuseport group of TCP listeners that answer every client with the slot it came to."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from functools import partial

from fastrecv.companions import fastopen
from fastrecv.companions.answers import Endpoint, Server, endpoint
from fastrecv.companions.binding import Address, allow_descriptors, bind, opened
from fastrecv.companions.listening import Connection, Event, Slot
from fastrecv.sockets import drops
from fastrecv.steerable import cookie_of

__all__ = ["IDLE", "MOST_OPEN", "Connections"]

MOST_OPEN = 512
"""Connections at a time; the others wait in the listeners' queues."""
IDLE = 30.0
"""Seconds without a byte after which a connection is closed."""

_BACKLOG = 1024  # net.core.somaxconn cuts it
_AT_ONCE = 64  # connections accepted of one listener before the next has its turn
_REST = 0.1  # seconds without accepting, where the system has no descriptor or memory for one more
_TCP_FASTOPEN = 23  # include/uapi/linux/tcp.h


class _Open:
    """A connection that has not ended. Times are of time.monotonic, but `taken` is of the epoch."""

    def __init__(self, slot: int, sock: socket.socket, source: Endpoint) -> None:
        self.slot, self.sock, self.source = slot, sock, source
        self.destination = endpoint(sock.getsockname())
        self.taken, self.accepted = time.time(), time.monotonic()
        self.last = self.accepted
        self.first: float | None = None
        self.bytes = 0
        self.in_syn = False

    def ended(self, how: str) -> Connection:
        first = None if self.first is None else 1e3 * (self.first - self.accepted)
        lasted = 1e3 * (time.monotonic() - self.accepted)
        return Connection(self.taken, self.slot, self.source, self.destination, self.bytes, first, lasted, self.in_syn,
                          how)  # fmt: skip


class Connections:
    """`number` TCP listeners on one address and port; an IPv6 one takes IPv4 as well. A Group.

    fast_open : they take data with the SYN (TCP_FASTOPEN, tcp(7)); OSError where the sysctl does not allow it.
    """

    def __init__(
        self, address: Address, port: int, number: int, *, fast_open: bool = False, most: int = MOST_OPEN,
        idle: float = IDLE,
    ) -> None:  # fmt: skip
        if fast_open:
            fastopen.check("server")
        allow_descriptors(number + most)
        self._most, self._idle = most, idle
        self._listeners: list[socket.socket] = []
        self._open: dict[int, _Open] = {}  # by descriptor; who was silent longest comes first
        self._buffer = bytearray(1 << 16)
        self._selector: selectors.BaseSelector | None = None
        self._rests_until: float | None = None  # when listeners are not watched
        self.slots: list[Slot] = []
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            for slot in range(number):
                sock = opened(socket.SOCK_STREAM, address.version)
                self._listeners.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if address.version == 6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                bind(sock, address, port)
                if fast_open:
                    sock.setsockopt(socket.IPPROTO_TCP, _TCP_FASTOPEN, _BACKLOG)
                sock.listen(_BACKLOG)
                self.slots.append(Slot(slot, sock.fileno(), cookie_of(sock), endpoint(sock.getsockname())))
            failed.pop_all()

    def watch(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        for slot, listener in enumerate(self._listeners):
            selector.register(listener, selectors.EVENT_READ, partial(self._accept, slot, listener))

    def _rest(self, seconds: float) -> None:
        """Accept nothing for a while: what has no place here waits in the kernel."""
        assert self._selector is not None
        if self._rests_until is None:
            for listener in self._listeners:
                self._selector.unregister(listener)
        self._rests_until = time.monotonic() + seconds

    def _accept(self, slot: int, listener: socket.socket) -> list[Event]:
        assert self._selector is not None
        for _ in range(_AT_ONCE):
            if self._rests_until is not None:
                break
            if len(self._open) >= self._most:
                self._rest(0)
                break
            try:
                sock, peer = listener.accept()
            except BlockingIOError:
                break
            except ConnectionError:  # reset before it was accepted
                continue
            except OSError:
                self._rest(_REST)
                break
            sock.setblocking(False)
            self._open[sock.fileno()] = found = _Open(slot, sock, endpoint(peer))
            self._selector.register(sock, selectors.EVENT_READ, partial(self._read, found))
        return []

    def _read(self, found: _Open) -> list[Event]:
        """One read, so that a fast sender does not keep the others waiting; the first byte, or the end, is answered."""
        try:
            length = found.sock.recv_into(self._buffer)
            found.last = time.monotonic()
            found.bytes += length
            if found.first is None:
                found.first = found.last if length else None
                found.in_syn = fastopen.in_syn(found.sock)
                found.sock.send(Server(found.slot, os.getpid()).answer())
        except BlockingIOError:
            return []
        except OSError as error:
            return [self._end(found, "reset" if isinstance(error, ConnectionError) else str(error.strerror))]
        if length == 0:
            return [self._end(found, "closed")]
        fd = found.sock.fileno()
        self._open[fd] = self._open.pop(fd)  # to the end
        return []

    def _end(self, found: _Open, how: str) -> Connection:
        assert self._selector is not None
        self._selector.unregister(found.sock)
        del self._open[found.sock.fileno()]
        found.sock.close()
        return found.ended(how)

    def tick(self) -> list[Event]:
        now = time.monotonic()
        silent = []
        for found in self._open.values():
            if now - found.last < self._idle:
                break
            silent.append(found)
        events: list[Event] = [self._end(found, f"silent for {self._idle:g} s") for found in silent]
        if self._rests_until is not None and now >= self._rests_until and len(self._open) < self._most:
            self._rests_until = None
            assert self._selector is not None
            self.watch(self._selector)
        return events

    def finish(self) -> list[Event]:
        """Who has closed by now has closed: the last bytes, and the end behind them, may not have been read yet."""
        events = [event for _ in range(2) for found in list(self._open.values()) for event in self._read(found)]
        return events + [self._end(found, "still open") for found in list(self._open.values())]

    def lost(self, slot: int) -> int:
        return drops(self._listeners[slot])  # of a listener: connections that its queue had no room for

    def close(self) -> None:
        for sock in self._listeners:
            sock.close()
        for found in self._open.values():
            found.sock.close()
        self._open.clear()
