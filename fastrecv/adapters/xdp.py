"""asyncio's datagram endpoints over an XdpReceiver: fastrecv.adapters.asyncio, without a socket to read from.

What a protocol sends leaves by the stack, from the lowest port of the receiver and the first address of its interface;
a protocol with datagrams_received(batch) may answer through transport.get_extra_info("receiver").reply instead, which
answers from where each datagram was sent to.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from errno import EBADF
from ipaddress import ip_address
from typing import Any, TypeVar

from fastrecv.adapters.asyncio import Transport
from fastrecv.adapters.sending import endpoint_name
from fastrecv.xdp import XdpReceiver

__all__ = ["XdpTransport", "create_datagram_endpoint"]

P = TypeVar("P", bound=asyncio.BaseProtocol)


async def create_datagram_endpoint(protocol_factory: Callable[[], P], receiver: XdpReceiver) -> tuple[XdpTransport, P]:
    """An endpoint of the running loop that reads from `receiver`, which is closed with it.

    Everything else: fastrecv.adapters.asyncio.create_datagram_endpoint.
    """
    loop = asyncio.get_running_loop()
    protocol = protocol_factory()
    started = loop.create_future()
    transport = XdpTransport(loop, receiver, protocol, started)
    try:
        await started
    except BaseException:
        transport.close()
        raise
    return transport, protocol


class XdpTransport(Transport):
    """A datagram transport that reads the batches of an XdpReceiver; made by create_datagram_endpoint."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        receiver: XdpReceiver,
        protocol: asyncio.BaseProtocol,
        started: asyncio.Future[None],
    ) -> None:
        self._open = contextlib.ExitStack()
        reading, self._wake = self._open.enter_context(receiver.watched())
        super().__init__(loop, receiver.sending_socket(), receiver, protocol, None, started)
        self._fd = reading
        loop.add_reader(self._wake, self._closed_under)

    def _closed_under(self) -> None:
        self._loop.remove_reader(self._wake)
        self._fatal_error(OSError(EBADF, "the XdpReceiver of a datagram transport was closed under it"), "")

    def _name(self, address: Any) -> bytes | None:
        try:
            version = ip_address(address[0]).version
        except (TypeError, ValueError, IndexError):
            return None
        return endpoint_name(socket.AF_INET if version == 4 else socket.AF_INET6, address)

    def _transmit(self, data: bytes | bytearray | memoryview, address: Any) -> None:
        if not self._receiver.send([data], address, 0):
            raise BlockingIOError

    def _release(self) -> None:
        self._loop.remove_reader(self._wake)
        super()._release()
        self._open.close()
