"""The group's program and its members, looked after: a worker can undo them without any privilege.

A member may attach another program to the whole group, or detach it; SO_LOCK_FILTER stops the first alone
(reuseport_detach_prog, net/core/sock_reuseport.c). A UDP socket that is connected leaves the group for good, and
disconnected again it may take everybody's datagrams: it is in the kernel's lookup still, and in no group (seen on Linux
6.18: all of 200 senders). A listener that is shut down is so for all who have it.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping, Sequence

import msgspec

from fastrecv.balance import Balancer
from fastrecv.classic import Filter
from fastrecv.closing import Closing
from fastrecv.errors import SocketRefusedError
from fastrecv.groups import CLASSIC, Lookout, Member
from fastrecv.steerable import cookie_of, has_peer, listens
from fastrecv.workers import opening

__all__ = ["Guard", "Repairs"]

_EVERY = 1.0  # seconds between two looks
_QUIET = 10.0  # seconds until a line is said again


class Repairs(msgspec.Struct):
    """put_back : how often the group's program was put back. renewed : how many sockets had left the group."""

    put_back: int = 0
    renewed: int = 0


class Guard(Closing):
    """Looks once a second, and puts back what can be. Needs no privilege but for the Lookout, which was opened before.

    lookout : of the group's port. Without one a program is not seen, nor a UDP socket that was connected and is not any
    more, where no Balancer misses it: only what the sockets themselves tell. With one, two classic programs cannot be
    told apart: another in the place of a Filter's stays.

    repairs : what it has put right.
    """

    def __init__(self, lookout: Lookout | None, log: logging.Logger, repairs: Repairs | None = None) -> None:
        """The repairs: those counted before."""
        self.lookout, self._log = lookout, log
        self.repairs = repairs or Repairs()
        self._look_at = self._speak_at = 0.0
        self._said, self._unsaid = "", 0
        self._known: set[int] = set()  # who have left, by their cookies

    def close(self) -> None:
        if self.lookout is not None:
            self.lookout.close()

    def look(self, by: Balancer | Filter | None, members: Mapping[int, socket.socket]) -> list[int]:
        """The slots whose sockets have left the group for good, so that others have to take their places.

        by : who gives the group its program, None: nobody. members : the sockets by their slots.
        """
        now = time.monotonic()
        if now < self._look_at:
            return []
        self._look_at = now + _EVERY
        try:
            return self._looked(by, members)
        except OSError as error:  # not worth a service's life
            self._say(f"the group cannot be looked after: {error}")
            return []

    def _looked(self, by: Balancer | Filter | None, members: Mapping[int, socket.socket]) -> list[int]:
        seen = None if self.lookout is None else self.lookout.look()
        taken = by.sockets() if isinstance(by, Balancer) else {}
        staying, gone = [], []
        for slot, member in members.items():
            self._listen(slot, member)
            why = self._left(slot, member, by, taken, seen)
            if why is None:
                staying.append(member)
                continue
            gone.append(slot)
            if cookie_of(member) not in self._known:
                self._known.add(cookie_of(member))
                self.repairs.renewed += 1
                self._log.error("the socket of worker %d has left the group for good: %s", slot, why)
        if seen is not None and by is not None:
            self._restore(by, staying, seen)
        return gone

    def _listen(self, slot: int, member: socket.socket) -> None:
        if not listens(member):
            opening.listen(member)
            self._log.error("the listener of worker %d was shut down by its worker: it listens again", slot)

    def _left(
        self, slot: int, member: socket.socket, by: Balancer | Filter | None, taken: Mapping[int, int],
        seen: Mapping[int, Member] | None,
    ) -> str | None:  # fmt: skip
        """Why a socket is of no use any more; None where it is, or is again."""
        cookie = cookie_of(member)
        if has_peer(member):
            return "it was connected by its worker"
        if isinstance(by, Balancer):
            if taken.get(slot) == cookie:
                return None
            try:
                by.register(slot, member)
            except SocketRefusedError as error:
                return f"its worker has connected it, or bound it to an interface ({error})"
            self._log.warning("slot %d had lost its socket: it has it again", slot)
        elif seen is not None and member.type == socket.SOCK_DGRAM and cookie in seen and seen[cookie].group is None:
            return "its worker has connected it, or bound it to an interface"
        return None

    def _restore(self, by: Balancer | Filter, members: Sequence[socket.socket], seen: Mapping[int, Member]) -> None:
        """Attach the program again where the group has another one, or none."""
        present = {seen[cookie].program for cookie in map(cookie_of, members) if cookie in seen}
        found = present - {by.maps.program.info.id if isinstance(by, Balancer) else CLASSIC}
        if not found:
            return
        refused: OSError | None = None
        for member in members:
            try:
                by.attach(member)
            except SocketRefusedError as error:  # its filters were locked; another's may not be
                refused = error
            else:
                self.repairs.put_back += 1
                self._say(f"the group had {_named(found.pop())} in the place of its own, which is put back")
                return
        self._say(f"the group has {_named(found.pop())} in the place of its own, which cannot be put back: {refused}")

    def _say(self, message: str) -> None:
        now = time.monotonic()
        if message == self._said and now < self._speak_at:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} times more since the last such line)" if self._unsaid else ""
        self._log.error("%s%s", message, more)
        self._said, self._speak_at, self._unsaid = message, now + _QUIET, 0


def _named(program: int | None) -> str:
    if program is None:
        return "no program"
    return "a classic program" if program == CLASSIC else f"program {program}"
