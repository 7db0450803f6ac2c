"""Answers that leave from the address and port the datagram was sent to.

Where the port is the socket's own, packet info names the address. Where it is another (a service that gets every port
of an address by steering) a socket can only send from its own port, so the answer leaves through a raw socket, or,
without CAP_NET_RAW, through a socket bound to that address and port. Neither receives: their filter drops everything.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import OrderedDict
from collections.abc import Sequence
from ipaddress import IPv6Address
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrecv._recv import Batch, in_sequence, send
from fastrecv.sockets import drop_everything

__all__ = ["Buffer", "Replier"]

log = logging.getLogger("fastrecv")

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
        self._told: set[int | None] = set()  # errnos that the log has had
        self._lock = threading.RLock()  # of the sockets; a signal handler may close what it interrupts
        if from_anywhere and sock.family == socket.AF_INET6:
            _may_use_any_local(sock)  # IPv4 asks the routes anyway

    def reply(
        self, fd: int, wake: int, batch: Batch, payloads: Batch | Sequence[Buffer | None], timeout: float | None
    ) -> int:
        """Receiver.reply, out of the Receiver's own descriptor `fd` where that can be. wake : as of _recv.send."""
        if not isinstance(batch, Batch):
            raise TypeError(f"reply answers a Batch, not {type(batch).__name__}")
        if not isinstance(payloads, Batch):
            payloads = in_sequence(payloads)
        if len(payloads) != len(batch):
            raise ValueError(f"{len(payloads)} payloads for {len(batch)} datagrams: give one each, None for no answer")

        def answer(through: int, senders: Any, source: Any, rows: Any = None, raw: bool = False) -> int:
            sent, refused, _ = send(through, payloads, senders, source, rows, raw=raw, tolerant=True, timeout=timeout,
                                    wake=wake)  # fmt: skip
            self.unanswered += refused
            return sent

        to = batch.destinations
        if to is None:
            if self._nameless():
                raise ValueError(
                    "the socket is bound to every address of this host, so answers could leave from another one than "
                    "was asked: open the Receiver with destinations=True"
                )
            return answer(fd, batch, None)
        strange = (to["port"] != 0) & (to["port"] != self._socket.getsockname()[1]) & ~_groups(to["address"])
        if not strange.any():
            return answer(fd, batch, batch)
        sent = answer(fd, batch, batch, np.flatnonzero(~strange))
        four = _mapped(to["address"])
        with self._lock:  # another thread must not close, or replace, what this one sends through
            for family, rows in ((socket.AF_INET, strange & four), (socket.AF_INET6, strange & ~four)):
                if not rows.any():
                    continue
                if raw := self.raw_socket(family):
                    senders, sources = _of_family(batch.sources, family), _of_family(to, family)
                    sent += answer(raw.fileno(), senders, sources, np.flatnonzero(rows), raw=True)
                    continue
                for address, some in _by_destination(batch, np.flatnonzero(rows)).items():
                    if bound := self._bound_socket(address):
                        sent += answer(bound.fileno(), batch, None, some)
                    else:
                        self.unanswered += len(some)
        return sent

    def _nameless(self) -> bool:
        """Whether the socket has no address of its own to answer from, nor one peer whose route chose one."""
        return self._socket.family != socket.AF_UNIX and self._socket.getsockname()[0] in {"0.0.0.0", "::"}  # noqa: S104

    def raw_socket(self, family: int) -> socket.socket | None:
        """What sends from any address and port, and receives nothing; None without CAP_NET_RAW."""
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

    def _bound_socket(self, address: tuple[Any, ...]) -> socket.socket | None:
        """A socket that sends from `address` and never receives; None, and a word in the log, where that cannot be.

        A stranger chooses the address, so that must not end the service. The filter is there before the address is.
        """
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
            if error.errno not in self._told:
                self._told.add(error.errno)
                why = f"cannot answer from {address[0]} port {address[1]}: {error.strerror}"
                log.warning("%s (said once); CAP_NET_RAW would do without binding to it", why)
            return None
        self._bound[address] = sock
        return sock

    def close(self) -> None:
        with self._lock:
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


def _by_destination(batch: Batch, rows: NDArray[np.intp]) -> dict[Any, list[int]]:
    grouped: dict[Any, list[int]] = {}
    for row in rows.tolist():
        grouped.setdefault(batch.destination(row), []).append(row)
    return grouped


def _of_family(endpoints: NDArray[np.void] | None, family: int) -> NDArray[np.void]:
    assert endpoints is not None
    changed = endpoints.copy()
    changed["family"] = family
    return changed
