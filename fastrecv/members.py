"""The sockets of destinations: a SOCKMAP in which every destination has MEMBERS places."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Sequence
from errno import EBUSY, EINVAL

from fastrecv.bpf import Map
from fastrecv.errors import BpfError, SocketRefusedError
from fastrecv.rules import MEMBERS
from fastrecv.state import MAX_DESTINATIONS
from fastrecv.steerable import cookie_of, described

__all__ = ["PLACES", "Members"]

_SPARE = MEMBERS * MAX_DESTINATIONS  # the place of no destination
PLACES = _SPARE + 1


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

    def fitting(self, group: Sequence[socket.socket]) -> list[socket.socket]:
        """Those of a group that the map takes, tried in a place of no destination.

        Members that a REUSEPORT_SOCKARRAY holds are passed over; SocketRefusedError where none is left.
        """
        found = []
        for member in group:
            try:
                self._sockets.update([_SPARE], [member.fileno()])
            except BpfError as error:
                if error.errno != EBUSY:  # a socket is in one REUSEPORT_SOCKARRAY or in SOCKMAPs
                    raise SocketRefusedError(f"{described(member)}: {error.strerror}") from None
                continue
            found.append(member)
        self._empty([_SPARE])
        if not found:
            raise SocketRefusedError(
                f"{described(group[0])}: a REUSEPORT_SOCKARRAY holds the socket, a program balances its group. "
                "Register an anchor: one more of the group (SO_REUSEPORT, same address, same user) that is in no slot"
            )
        return found

    def present(self, numbers: Iterable[int]) -> dict[int, list[int]]:
        """Cookies of the sockets of those destinations that have any, by number."""
        found = {number: list(self.places(number).values()) for number in numbers}
        return {number: cookies for number, cookies in found.items() if cookies}

    def room(self, number: int, group: Sequence[socket.socket]) -> None:
        """SocketRefusedError where no place is free to add one of a group that is not there yet."""
        taken = self.places(number)
        if len(taken) == MEMBERS and any(cookie_of(member) not in taken.values() for member in group):
            raise SocketRefusedError(f"{MEMBERS} sockets are registered there already, no more are kept")

    def put(self, number: int, group: Sequence[socket.socket], add: bool) -> None:
        """Give the places to a socket or a group, as many as there are places; the rest is passed over.

        The new are there before the old go; with `add` those stay.
        """
        taken = self.places(number)
        places = list(range(number * MEMBERS, (number + 1) * MEMBERS))
        if add:
            group = [member for member in group if cookie_of(member) not in taken.values()]
            places = [place for place in places if place not in taken]
        for place, member in zip(places, group, strict=False):
            self._sockets.update([place], [member.fileno()])
        if not add:
            self._empty(place for place in places[len(group) :] if place in taken)

    def clear(self, number: int) -> None:
        self._empty(self.places(number))

    def _empty(self, places: Iterable[int]) -> None:
        for place in places:
            try:
                self._sockets.delete([place])
            except (KeyError, BpfError) as error:
                if isinstance(error, BpfError) and error.errno != EINVAL:
                    raise  # else its socket was closed since
