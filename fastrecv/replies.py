"""Answers that leave from the address and port the datagram was sent to.

Where the port is the socket's own, packet info names the address. Where it is another (a service that gets every port
of an address by steering) a socket can only send from its own port, so the answer leaves through a raw socket, or,
without CAP_NET_RAW, through a socket bound to that address and port. Neither receives: their filter drops everything.
"""

from __future__ import annotations

import socket
from collections import OrderedDict
from collections.abc import Sequence
from ipaddress import IPv6Address
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrecv._recv import Batch, send
from fastrecv.sockets import drop_everything

__all__ = ["Buffer", "Replier"]

Buffer = bytes | bytearray | memoryview | NDArray[np.uint8]

_CACHED = 256  # bound sockets that are kept; the one used longest ago is closed for the next
_IP_FREEBIND, _IPV6_FREEBIND, _IPV6_CHECKSUM = 15, 78, 7  # include/uapi/linux/in.h, in6.h
_UDP_CHECKSUM = 6  # offset in the header, RFC 768
_MAPPED = np.frombuffer(bytes(10) + b"\xff\xff", np.uint8)  # ::ffff:0:0/96, RFC 4291


class Replier:
    """Sends the answers of one Receiver. unanswered : how many the kernel has refused."""

    def __init__(self, sock: socket.socket, from_anywhere: bool) -> None:
        """from_anywhere : answers name the address they are to leave from."""
        self.unanswered = 0
        self._socket = sock
        self._raw: dict[int, socket.socket | None] = {}  # by family; None: not permitted
        self._bound: OrderedDict[tuple[Any, ...], socket.socket] = OrderedDict()
        if from_anywhere and sock.family == socket.AF_INET6:
            _may_use_any_local(sock)  # IPv4 asks the routes anyway

    def reply(self, fd: int, batch: Batch, payloads: Batch | Sequence[Buffer | None], timeout: float | None) -> int:
        """Receiver.reply, out of the Receiver's own descriptor where that can be."""
        if len(payloads) != len(batch):
            raise ValueError(f"{len(payloads)} payloads for {len(batch)} datagrams: give one each, None for no answer")
        to = batch.destinations
        if to is None:
            if self._nameless():
                raise ValueError(
                    "the socket is bound to every address of this host, so answers could leave from another one than "
                    "was asked: open the Receiver with destinations=True"
                )
            return self._send(fd, payloads, batch, None, None, timeout)
        strange = (to["port"] != 0) & (to["port"] != self._socket.getsockname()[1]) & ~_groups(to["address"])
        if not strange.any():
            return self._send(fd, payloads, batch, batch, None, timeout)
        rows = np.flatnonzero(strange)
        sent = self._send(fd, payloads, batch, batch, np.flatnonzero(~strange), timeout)
        four = _mapped(to["address"][rows])
        for family, some in ((socket.AF_INET, rows[four]), (socket.AF_INET6, rows[~four])):
            if some.size:
                raw = self._raw_socket(family)
                if raw is not None:
                    sources, destinations = _of_family(batch.sources, family), _of_family(to, family)
                    sent += self._send(raw.fileno(), payloads, sources, destinations, some, timeout, raw=True)
                else:
                    sent += self._send_bound(batch, payloads, some, timeout)
        return sent

    def _nameless(self) -> bool:
        """Whether the socket has no address of its own to answer from, nor one peer whose route chose one."""
        return self._socket.family != socket.AF_UNIX and self._socket.getsockname()[0] in {"0.0.0.0", "::"}  # noqa: S104

    def _send(self, fd: int, payloads: Any, to: Any, source: Any, rows: Any, timeout: float | None,
              raw: bool = False) -> int:  # fmt: skip
        sent, refused, _ = send(fd, payloads, to, source, rows, raw=raw, tolerant=True, timeout=timeout)
        self.unanswered += refused
        return sent

    def _send_bound(self, batch: Batch, payloads: Any, rows: NDArray[np.intp], timeout: float | None) -> int:
        """Each answer out of a socket that is bound to the address and port it was asked at."""
        by_address: dict[Any, list[int]] = {}
        for row in rows.tolist():
            by_address.setdefault(batch.destination(row), []).append(row)
        return sum(
            self._send(self._bound_socket(address).fileno(), payloads, batch, None, some, timeout)
            for address, some in by_address.items()
        )

    def _raw_socket(self, family: int) -> socket.socket | None:
        if family not in self._raw:
            try:
                raw = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_UDP)
            except PermissionError:
                self._raw[family] = None
            else:
                drop_everything(raw)
                _may_use_any_local(raw)
                if family == socket.AF_INET6:
                    raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_CHECKSUM, _UDP_CHECKSUM)
                self._raw[family] = raw
        return self._raw[family]

    def _bound_socket(self, address: tuple[Any, ...]) -> socket.socket:
        """A socket that sends from `address` and never receives; the filter is there before the address is."""
        if len(address) == 4 and not IPv6Address(address[0]).is_link_local:
            address = (*address[:3], 0)  # the scope was the interface the datagram came in by
        if address in self._bound:
            self._bound.move_to_end(address)
            return self._bound[address]
        if len(self._bound) == _CACHED:
            self._bound.popitem(last=False)[1].close()
        sock = socket.socket(self._socket.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            drop_everything(sock)
            _may_use_any_local(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # another worker answers from there, too
            sock.bind(address)
        except OSError as error:
            sock.close()
            where = f"{address[0]} port {address[1]}"
            raise OSError(
                error.errno,
                f"cannot answer from {where}: {error.strerror}; CAP_NET_RAW would do without binding to it",
            ) from error
        self._bound[address] = sock
        return sock

    def close(self) -> None:
        for sock in (*self._raw.values(), *self._bound.values()):
            if sock is not None:
                sock.close()
        self._raw.clear()
        self._bound.clear()


def _may_use_any_local(sock: socket.socket) -> None:
    """Let addresses of a local route be used that no interface has (IP_FREEBIND, ip(7); IPV6_FREEBIND, Linux 4.15)."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)


def _mapped(addresses: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which addresses are IPv4."""
    four: NDArray[np.bool_] = (addresses[:, :12] == _MAPPED).all(axis=1)
    return four


def _groups(addresses: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which addresses are multicast: nobody can answer from there."""
    groups: NDArray[np.bool_] = (addresses[:, 0] == 0xFF) | (_mapped(addresses) & (addresses[:, 12] >> 4 == 0xE))
    return groups


def _of_family(endpoints: NDArray[np.void] | None, family: int) -> NDArray[np.void]:
    assert endpoints is not None
    changed = endpoints.copy()
    changed["family"] = family
    return changed
