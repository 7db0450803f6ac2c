"""What a service manager is told, and has told: sd_notify(3), sd_watchdog_enabled(3).

READY=1 once all workers read that were not given up; RELOADING=1 when a rolling restart is asked for, and READY=1 again
when it is over; STOPPING=1; STATUS=, a line a second while it changes; WATCHDOG=1 at half the time that the manager
gives, as long as the supervisor's loop turns.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from fastrecv.errors import StateError

if TYPE_CHECKING:  # whose processes get their environment from here
    from fastrecv.workers.counters import Counters
    from fastrecv.workers.fleet import Fleet

__all__ = ["Manager", "without"]

_PRIVATE = {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}
_EVERY = 1.0  # seconds between two STATUS


def without(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for other processes: what a manager says there is for this one only."""
    return {name: value for name, value in environment.items() if name not in _PRIVATE}


class Manager:
    """Who has started this process, if anybody wants to know; a context manager. StateError for what is malformed.

    Never waits: what the manager has no room for is said later.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._watchdog = _watchdog(environment)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._unsaid: deque[str] = deque()
        self._ready = self._reloading = self._stopping = False
        self._alive_at = self._status_at = 0.0
        self._status, self._before = "", (0.0, 0)

    def resume(self, fleet: Fleet) -> None:
        """Go on from what the program before this one has said."""
        self._ready, self._reloading = fleet.begun, fleet.restarting > 0

    def reloading(self) -> None:
        """A rolling restart has been asked for; said each time, since the manager waits for its own."""
        if self._ready:
            self._reloading = True
            self._say(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._say("STOPPING=1")

    def act(self, fleet: Fleet, counters: Counters) -> None:
        """Say how things stand; to be called at each turn of the loop."""
        if self._address is None:
            return
        now = time.monotonic()
        if fleet.stopping:
            self.stopping()
        elif fleet.begun and not fleet.restarting and (self._reloading or not self._ready):
            self._ready, self._reloading, self._status_at = True, False, now
            self._say("READY=1")
        self._flush()
        if self._unsaid:  # what comes again need not wait
            return
        if self._watchdog and now >= self._alive_at:
            self._alive_at = now + self._watchdog / 2
            self._say("WATCHDOG=1")
        if now >= self._status_at:
            self._status_at = now + _EVERY
            self._tell_status(fleet, counters, now)

    def _tell_status(self, fleet: Fleet, counters: Counters, now: float) -> None:
        rows = counters.read()
        datagrams, handled, failed, killed = (
            int(rows[name].sum()) for name in ("datagrams", "handled", "failed", "killed")
        )
        (then, before), self._before = self._before, (now, datagrams)
        reading, workers = sum(slot.reader is not None for slot in fleet.slots), len(fleet.slots)
        status = (
            f"{reading} of {workers} workers read, {(datagrams - before) / (now - then):,.0f} datagrams/s, "
            f"{handled:,} handled, {failed:,} failed, {killed:,} in the hands of workers that died"
        )
        if status != self._status:
            self._status = status
            self._say(f"STATUS={status}")

    def _say(self, text: str) -> None:
        if self._address is not None:
            self._unsaid.append(text)
            self._flush()

    def _flush(self) -> None:
        """Say what has not been said yet. What nobody takes is dropped: no manager is no reason to fail."""
        assert self._address is not None
        while self._unsaid:
            try:
                self._socket.sendto(self._unsaid[0].encode(), self._address)
            except BlockingIOError:
                return
            except OSError:
                pass
            self._unsaid.popleft()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()


def _address(word: str) -> str | None:
    """What to send to; a name that begins with @ is in no file system (unix(7))."""
    if word and word[0] not in "/@":
        raise StateError(f"NOTIFY_SOCKET is {word!r}: neither a path nor @ and a name (sd_notify(3))")
    return word.replace("@", "\0", 1) if word.startswith("@") else word or None


def _watchdog(environment: Mapping[str, str]) -> float:
    """Seconds without a sign of life until the manager acts; 0: it does not."""
    word = environment.get("WATCHDOG_USEC", "")
    if not word or environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    if not (word.isascii() and word.isdecimal() and int(word[:20])):
        raise StateError(f"WATCHDOG_USEC is {word!r}: no number of microseconds (sd_watchdog_enabled(3))")
    return int(word[:20]) / 1e6
