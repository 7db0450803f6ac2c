"""The sockets of destinations: a SOCKMAP in which every destination has MEMBERS places."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Sequence
from errno import EBUSY, EINVAL

from fastrecv.bpf import Map
from fastrecv.errors import BpfError, SocketRefusedError
from fastrecv.listeners import cookie_of
from fastrecv.rules import MEMBERS

__all__ = ["Members"]


class Members:
    """Who stands in the places. The kernel empties the place of a socket that is closed; TCP ones also at shutdown."""

    def __init__(self, sockets: Map) -> None:
        self._sockets = sockets

    def places(self, number: int) -> dict[int, int]:
        """The taken places of destination `number`, and the cookies of the sockets in them."""
        found = {}
        for place in range(number * MEMBERS, (number + 1) * MEMBERS):
            with contextlib.suppress(KeyError):
                found[place] = int(self._sockets[place])
        return found

    def present(self, numbers: Iterable[int]) -> dict[int, list[int]]:
        """Cookies of the sockets of those destinations that have any, by number."""
        found = {number: list(self.places(number).values()) for number in numbers}
        return {number: cookies for number, cookies in found.items() if cookies}

    def put(self, number: int, group: Sequence[socket.socket], add: bool) -> None:
        """Give the places to a socket or a group: the new are there before the old go, which stay with `add`.

        More members than there are places are passed over, and so are those that a REUSEPORT_SOCKARRAY holds, if any
        is left. SocketRefusedError, with nothing changed, if not.
        """
        taken = self.places(number)
        free = list(range(number * MEMBERS, (number + 1) * MEMBERS))
        if add:
            group = [member for member in group if cookie_of(member) not in taken.values()]
            free = [place for place in free if place not in taken]
            if group and not free:
                raise SocketRefusedError(f"{MEMBERS} sockets are registered there already, no more are kept")
        balanced, used = False, 0
        for member in group:
            if used == len(free):
                break
            try:
                self._sockets.update([free[used]], [member.fileno()])
                used += 1
            except BpfError as error:
                if error.errno != EBUSY:  # a socket is in one REUSEPORT_SOCKARRAY or in SOCKMAPs
                    raise
                balanced = True
        if balanced and not used:
            raise SocketRefusedError(
                "a REUSEPORT_SOCKARRAY holds the socket: a program balances its group. Register an anchor: one more "
                "socket of the group (SO_REUSEPORT, same address, same user) that is in no slot"
            )
        if not add:
            self._empty(place for place in free[used:] if place in taken)

    def clear(self, number: int) -> None:
        self._empty(self.places(number))

    def _empty(self, places: Iterable[int]) -> None:
        for place in places:
            try:
                self._sockets.delete([place])
            except (KeyError, BpfError) as error:
                if isinstance(error, BpfError) and error.errno != EINVAL:
                    raise  # else its socket was closed since
