"""How what an XdpReceiver sends leaves: answers by the ring of its first queue, everything else by the stack."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from errno import EADDRNOTAVAIL
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from fastrecv._recv import Batch, in_sequence, send
from fastrecv._xsk import Umem, answer
from fastrecv.errors import XdpError
from fastrecv.redirect import Redirect
from fastrecv.replies import Buffer, Replier
from fastrecv.sockets import endpoints

__all__ = ["Outgoing"]


class Outgoing:
    """unanswered : replies that the kernel has refused."""

    def __init__(self, redirect: Redirect, umem: Umem) -> None:
        self._redirect, self._umem = redirect, umem
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._replier = Replier(self.socket, from_anywhere=True)

    @property
    def unanswered(self) -> int:
        return self._replier.unanswered

    def reply(self, wake: int, batch: Batch, payloads: Batch | Sequence[Buffer | None], timeout: float | None) -> int:
        """XdpReceiver.reply; wake : as of _recv.send."""
        if not isinstance(batch, Batch):
            raise TypeError(f"reply answers a Batch, not {type(batch).__name__}")
        if not isinstance(payloads, Batch):
            payloads = in_sequence(payloads)
        if len(payloads) != len(batch):
            raise ValueError(f"{len(payloads)} payloads for {len(batch)} datagrams: give one each, None for no answer")
        sent, left = answer(self._umem, batch, payloads, self._redirect.interface.mtu)
        if not left:
            return sent
        others: list[Buffer | None] = [None] * len(batch)
        for row in left:
            others[row] = payloads[row]
        return sent + self._replier.reply(self.socket.fileno(), wake, batch, others, timeout)

    def send(self, wake: int, payloads: Batch | Sequence[Buffer], to: NDArray[np.void], timeout: float | None) -> int:
        """XdpReceiver.send; to : ENDPOINT, one for all or one for each."""
        count, done = len(payloads), 0
        if len(to) not in (1, count):
            raise ValueError(f"{count} payloads for {len(to)} destinations: give one for each")
        for family, rows in _runs(to, count):
            raw = self._replier.raw_socket(family)
            if raw is None:
                raise PermissionError("sending from the address of an interface takes CAP_NET_RAW: run as root")
            source = np.repeat(self._source(family), count)
            sent, _, code = send(
                raw.fileno(), payloads, to, source, rows, raw=True, timeout=timeout, wake=wake
            )  # fmt: skip
            done += sent
            if code and not done:
                raise OSError(code, f"sending: {os.strerror(code)}")
            if sent < len(rows):
                break
        return done

    def _source(self, family: int) -> NDArray[np.void]:
        """The lowest port, and the first address of the family that is taken; a global one where there is one."""
        version = 6 if family == socket.AF_INET6 else 4
        own = sorted(
            (address.is_link_local, address.packed, str(address))
            for address in self._redirect.addresses
            if address.version == version
        )
        if not own:
            raise XdpError(EADDRNOTAVAIL, f"{self._redirect.interface.name} has no IPv{version} address to send from")
        return endpoints([(own[0][2], min(self._redirect.ports))])

    def close(self) -> None:
        self._replier.close()
        self.socket.close()


def _runs(to: NDArray[np.void], count: int) -> Iterator[tuple[int, list[int]]]:
    """Payloads in order, by runs of one family of their destinations."""
    families = np.broadcast_to(to["family"], count)
    for family, rows in groupby(range(count), lambda row: int(families[row])):
        yield family, list(rows)
