"""Prefill: a socket whose queue is full before the clock starts, so that a drain times the receiver alone."""

from __future__ import annotations

import socket
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

from pyroute2 import IPRoute

from fastrecv import Receiver, sockets
from fastrecv.bench.floods import FLOODS, PORT, Source
from fastrecv.bench.lab import Lab

__all__ = ["MAX_DATAGRAMS", "ROOM_EACH", "Injection", "Traffic", "Trains", "pattern"]

ROOM_EACH = 4096
"""Bytes to ask for: the kernel charges a live frame for its whole page and its headers, 4,240; and doubles this."""
MAX_DATAGRAMS = 100_000  # SO_RCVBUF ends at 2 GiB


def pattern(size: int) -> bytes:
    """A payload in which no two neighbouring words are equal."""
    return bytes(index * 7 % 251 for index in range(size))


class Traffic(Protocol):
    """What fills a socket: a context manager. `open` gives a bound socket, `fill` returns how many were sent to it."""

    def open(self, datagrams: int) -> socket.socket: ...
    def fill(self, sock: socket.socket, datagrams: int) -> int: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def _open(lab: Lab, family: socket.AddressFamily, host: str, datagrams: int) -> socket.socket:
    with lab.host:
        sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind((host, PORT))
    sockets.grow_receive_buffer(sock, datagrams * ROOM_EACH)
    return sock


class Injection:
    """Live frames from `sources` ports of one address, each a datagram of its own: they bypass GRO."""

    def __init__(self, lab: Lab, payload: bytes, sources: int, flood: str = "udp4") -> None:
        self._flood = replace(FLOODS[flood], payload=payload)
        self._lab = lab
        self._source = Source(self._flood, lab, sources)

    def open(self, datagrams: int) -> socket.socket:
        return _open(self._lab, self._flood.family, self._flood.destination, datagrams)

    def fill(self, sock: socket.socket, datagrams: int) -> int:  # noqa: ARG002 - the frames name its port
        with self._lab.host:
            return self._source.deliver(datagrams)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.close()


class Trains:
    """Datagrams of one flow over the loopback device, sent in trains (UDP_SEGMENT).

    The kernel hands a train whole to a socket with UDP_GRO and cuts it, while it is sent, for one without.
    """

    def __init__(self, lab: Lab, payload: bytes) -> None:
        self._lab = lab
        self._payload = payload
        with lab.host, IPRoute() as net:
            net.link("set", index=net.link_lookup(ifname="lo")[0], state="up")
        with lab.host:
            self._sender = Receiver.bind(("127.0.0.1", 0))

    def open(self, datagrams: int) -> socket.socket:
        return _open(self._lab, socket.AF_INET, "127.0.0.1", datagrams)

    def fill(self, sock: socket.socket, datagrams: int) -> int:
        return self._sender.send([self._payload] * datagrams, sock.getsockname())

    def send(self, sock: socket.socket, payloads: list[bytes]) -> int:
        """Send these: who wants to see that each of them arrives as it was."""
        return self._sender.send(payloads, sock.getsockname())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sender.close()
