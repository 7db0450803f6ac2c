"""socketserver's datagram servers over a Receiver: a batch is read with one system call and handled one by one."""

from __future__ import annotations

import socket
import socketserver
from collections import deque
from functools import cached_property
from typing import Any

from fastrecv._recv import MAX_SLOT
from fastrecv.options import Options
from fastrecv.receiver import Receiver

__all__ = ["ThreadingUDPServer", "UDPServer", "UnixDatagramServer"]


class UDPServer(socketserver.UDPServer):
    """socketserver.UDPServer that reads in batches; everything else, mix-ins and hooks, is as there.

    max_packet_size counts when the first datagram is read. serve_forever handles all that has been read before it
    heeds shutdown().

    receiver_options : options of the Receiver, set on the class or before the first datagram.
    """

    receiver_options: Options = {}  # noqa: RUF012 - a class attribute to be replaced, as socketserver's own are
    _serving = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._read: deque[tuple[bytes, Any]] = deque()
        super().__init__(*arguments, **options)

    @cached_property
    def receiver(self) -> Receiver:
        """What the server reads with: made late, since server_bind and its like may change or replace the socket."""
        options: Options = {"slot_size": min(self.max_packet_size, MAX_SLOT), **self.receiver_options}
        return Receiver(self.socket, **options)

    def get_request(self) -> tuple[Any, Any]:
        if not self._read:
            self._read.extend(self.receiver.recv_nowait().datagrams())
            if not self._read:
                raise BlockingIOError("readable, but nothing came: a bad checksum, or another process was faster")
        data, client_address = self._read.popleft()
        return (data, self.socket), client_address

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        self._serving = True
        try:
            self._handle_read()
            super().serve_forever(poll_interval)
        finally:
            self._serving = False

    def handle_request(self) -> None:
        if self._read:
            self._handle_request_noblock()
        else:
            super().handle_request()

    def _handle_request_noblock(self) -> None:
        """What BaseServer calls when the socket is readable."""
        super()._handle_request_noblock()  # type: ignore[misc] # not in typeshed
        if self._serving:
            self._handle_read()

    def _handle_read(self) -> None:
        while self._read:
            self.service_actions()
            super()._handle_request_noblock()  # type: ignore[misc]

    def server_close(self) -> None:
        if "receiver" in vars(self):
            self.receiver.close()
        super().server_close()


class ThreadingUDPServer(socketserver.ThreadingMixIn, UDPServer):
    """One thread a datagram, as socketserver.ThreadingUDPServer."""


class UnixDatagramServer(UDPServer):
    """As socketserver.UnixDatagramServer."""

    address_family = socket.AF_UNIX
