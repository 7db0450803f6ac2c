"""One thread that serves a group of reuseport sockets until it is told to stop, and who got what."""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NamedTuple, Protocol

from fastrecv.companions.answers import Endpoint

__all__ = ["SENDERS", "Connection", "Datagram", "Event", "Group", "Slot", "Tally", "serve", "tallied"]

SENDERS = 10_000
"""How many addresses a slot remembers; its tally says when there were more."""


class Datagram(NamedTuple):
    """What one datagram was. time : when the kernel took it, seconds of the epoch.

    queued_ms : from then until the program had it.
    """

    time: float
    slot: int
    source: Endpoint
    destination: Endpoint
    bytes: int
    queued_ms: float


class Connection(NamedTuple):
    """What one connection was, when it has ended. time : when it was accepted, seconds of the epoch.

    first_byte_ms : from then to the first byte read, None where there was none. open_ms : from then to the end.
    in_syn : data came with the SYN. ended : "closed" by the peer, or how else.
    """

    time: float
    slot: int
    source: Endpoint
    destination: Endpoint
    bytes: int
    first_byte_ms: float | None
    open_ms: float
    in_syn: bool
    ended: str


Event = Datagram | Connection


class Slot(NamedTuple):
    """One socket of a group. fd : its descriptor in this process."""

    number: int
    fd: int
    cookie: int
    address: Endpoint


class Group(Protocol):
    """N sockets on one address and port, each of which is a slot, in the order of bind."""

    @property
    def slots(self) -> Sequence[Slot]: ...

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Register what to wait for, with a function that deals with it and gives what has ended by that."""

    def tick(self) -> list[Event]:
        """What has ended by the passing of time; asked every second or oftener."""

    def finish(self) -> list[Event]:
        """What is still going on ends."""

    def lost(self, slot: int) -> int:
        """How many datagrams, or connections, the slot's full queue has cost, as far as the kernel tells."""

    def close(self) -> None: ...


class Tally:
    """What one slot got."""

    def __init__(self) -> None:
        self.served = self.bytes = 0
        self._senders: set[str] = set()

    def add(self, event: Event) -> None:
        self.served += 1
        self.bytes += event.bytes
        if len(self._senders) < SENDERS:
            self._senders.add(event.source.host)

    @property
    def senders(self) -> int:
        """Different source addresses; SENDERS stands for that many or more."""
        return len(self._senders)


def tallied(report: Callable[[list[Event]], None], tallies: Sequence[Tally]) -> Callable[[list[Event]], None]:
    """`report`, with what it is told counted before."""

    def both(events: list[Event]) -> None:
        for event in events:
            tallies[event.slot].add(event)
        report(events)

    return both


def serve(
    group: Group, report: Callable[[list[Event]], None], *, seconds: float | None = None, count: int | None = None
) -> None:
    """Serve until SIGINT or SIGTERM, for so many seconds, or until so many datagrams or connections have been reported.

    report : is given what has come, in batches. From the main thread only (signal(7)).
    """
    end = None if seconds is None else time.monotonic() + seconds
    served = 0
    with selectors.DefaultSelector() as selector, _signals() as told:
        selector.register(told, selectors.EVENT_READ)
        group.watch(selector)
        while count is None or served < count:
            wait = 1.0 if end is None else min(1.0, end - time.monotonic())
            if wait <= 0:
                break
            ready = selector.select(wait)
            if any(key.data is None for key, _ in ready):
                break
            events = [event for key, _ in ready for event in key.data()]
            events += group.tick()
            served += len(events)
            if events:
                report(events)
        left = group.finish()
        if left:
            report(left)


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """Becomes readable with the first SIGINT or SIGTERM; the second is a KeyboardInterrupt, should output block."""
    reader, writer = socket.socketpair()
    seen = 0

    def count(_number: int, _frame: FrameType | None) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            raise KeyboardInterrupt

    with reader, writer:
        writer.setblocking(False)
        before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        woken = signal.set_wakeup_fd(writer.fileno())
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(woken)
            for number, handler in before.items():
                signal.signal(number, handler)
