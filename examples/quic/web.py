"""An HTTP/3 server on several workers, whose connections outlive a rolling restart and a change of the client's port.

    export QUIC_CERTIFICATE=certificate.pem QUIC_KEY=key.pem
    fastrecv run -b 0.0.0.0:4433 -w 4 --user nobody --policy 'quic[1]' web:Server

Needs aioquic, and what `fastrecv run` needs (fastrecv[cli]). GET says who answers and whom; POST says what it is told,
piece by piece. docs/quic.md says how it works, load.py tries it.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.h3.connection import H3_ALPN, ErrorCode, H3Connection
from aioquic.h3.events import DataReceived, H3Event, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ProtocolNegotiated, QuicEvent
from relay import LENGTH, Relay, destination, owner

from fastrecv.adapters.asyncio import Transport, create_datagram_endpoint

__all__ = ["Server", "Steered", "Web", "configuration"]

DRAIN = 25.0  # seconds that connections have to end in, less than the graceful timeout
ALONE = 3.0  # seconds without a datagram from a successor until there is none
PROBE = 0.2  # seconds between two datagrams that ask for one
IDLE = 30.0  # seconds until a silent connection ends


class Web(QuicConnectionProtocol):
    """One connection, and its requests."""

    _http: H3Connection | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ProtocolNegotiated):
            self._http = H3Connection(self._quic)
        if self._http is None:  # the handshake goes on
            return
        for part in self._http.handle_event(event):
            self._answer(self._http, part)
        self._transmit_soon()

    def _answer(self, http: H3Connection, part: H3Event) -> None:
        if isinstance(part, HeadersReceived):
            method = dict(part.headers).get(b":method")
            status = b"200" if method in (b"GET", b"POST") else b"405"
            echoing = method == b"POST" and not part.stream_ended
            http.send_headers(part.stream_id, [(b":status", status)], end_stream=not echoing and method != b"GET")
            if method == b"GET":
                said = f"process {os.getpid()} answers {self._quic.get_peer_address()}\n"
                http.send_data(part.stream_id, said.encode(), end_stream=True)
        elif isinstance(part, DataReceived) and self._quic._stream_can_send(part.stream_id):
            http.send_data(part.stream_id, part.data, end_stream=part.stream_ended)


class Steered(QuicServer):
    """aioquic's server, whose connection ids lead back: by a balancer to its socket, by a relay to its process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(create_protocol=self._connected, **options)
        self.relay = Relay(self._handed_over, super().datagram_received, self._send)
        self.handed_over = 0

    def _connected(self, connection: QuicConnection, **options: Any) -> Web:
        """Let a new connection have ids of the relay's making, with the byte by which its first datagram came."""
        steering = connection.original_destination_connection_id[:1]
        _name(connection, lambda: self.relay.mint(steering))
        return Web(connection, **options)

    def datagram_received(self, data: bytes | str, addr: Any) -> None:
        assert isinstance(data, bytes)
        cid = destination(data)
        name = owner(cid)
        if name in (None, self.relay.name) or cid in self._protocols:
            super().datagram_received(data, addr)
        else:
            self.relay.hand_over(name, data, addr)

    def _handed_over(self, data: bytes, addr: Any) -> None:
        self.handed_over += 1
        if destination(data) in self._protocols:  # new connections are for who reads the socket
            super().datagram_received(data, addr)

    def _send(self, data: bytes, addr: Any) -> None:
        assert self._transport is not None
        self._transport.sendto(data, addr)

    @property
    def connections(self) -> set[QuicConnectionProtocol]:
        return set(self._protocols.values())

    def steering(self) -> bytes:
        """What one of the connections is steered by."""
        return next(cid[:1] for cid in self._protocols)


class Leaving(asyncio.DatagramTransport):
    """What connections of a worker that leaves send by: its socket, or another worker's where that sends no more.

    With a worker fewer its socket is bound to no interface any more, so that nothing comes to it (reuseport.retire).
    """

    def __init__(self, sock: socket.socket, relay: Relay) -> None:
        super().__init__()
        self._sock, self._relay = sock, relay

    def sendto(self, data: bytes | bytearray | memoryview, addr: Any = None) -> None:
        try:
            self._sock.sendto(data, addr)
        except OSError:
            self._relay.answer(bytes(data), addr)


def _name(connection: QuicConnection, mint: Callable[[], bytes]) -> None:
    """Let a connection that has just been made have other ids than random ones, for which aioquic has no option."""
    first = connection._host_cids[0]
    first.cid = connection.host_cid = connection._local_initial_source_connection_id = mint()
    replenish = connection._replenish_connection_ids

    def named() -> None:
        known = len(connection._host_cids)
        replenish()
        for made in connection._host_cids[known:]:
            made.cid = mint()

    connection._replenish_connection_ids = named  # type: ignore[method-assign]


def configuration() -> QuicConfiguration:
    """By the environment. ValueError where that names no certificate."""
    files = [os.environ.get(name, "") for name in ("QUIC_CERTIFICATE", "QUIC_KEY")]
    made = QuicConfiguration(alpn_protocols=H3_ALPN, is_client=False, connection_id_length=LENGTH, idle_timeout=IDLE)
    try:
        made.load_cert_chain(*files)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"QUIC_CERTIFICATE is {files[0]!r}, QUIC_KEY {files[1]!r}: set them to PEM files that user {os.geteuid()} "
            f"may read ({error})"
        ) from None
    return made


def _drain() -> float:
    text = os.environ.get("QUIC_DRAIN", str(DRAIN))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 86400:
        raise ValueError(f"QUIC_DRAIN is {text!r}: give seconds, 0 to 86400, fewer than the graceful timeout")
    return seconds


class Server:
    """A worker of `fastrecv run`: serves until it is told to stop, and then its own connections until they end."""

    def __init__(self) -> None:
        self._configuration, self._drain = configuration(), _drain()
        self._transport: Transport | None = None

    async def serve(self, sockets: list[socket.socket]) -> None:
        (self._sock,) = sockets
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        self._transport, self._server = await create_datagram_endpoint(
            lambda: Steered(configuration=self._configuration), sock=self._sock
        )
        await ended.wait()
        self._transport.pause_reading()

    async def stop(self) -> None:
        """The successor reads the socket now, and hands over what is for connections of ours."""
        if self._transport is None:
            return
        for protocol in self._server.connections:
            protocol.connection_made(Leaving(self._sock, self._server.relay))
        await self._wait_for_connections()
        for protocol in self._server.connections:
            protocol.close(ErrorCode.H3_NO_ERROR)
        self._server.relay.close()
        self._transport.close()
        await asyncio.sleep(0)  # its end is a callback

    async def _wait_for_connections(self) -> None:
        """Until all have ended, the time is over, or nobody reads the socket who could hand anything over."""
        now = asyncio.get_running_loop().time
        until, known, heard = now() + self._drain, self._server.handed_over, now()
        with socket.socket(self._sock.family, socket.SOCK_DGRAM) as probe:
            while self._server.connections and now() < until and now() - heard < ALONE:
                self._probe(probe, self._sock.getsockname())
                await asyncio.sleep(PROBE)
                if self._server.handed_over != known:
                    known, heard = self._server.handed_over, now()

    def _probe(self, probe: socket.socket, here: Any) -> None:
        """Send to our own port what looks like a connection's: it comes back over the relay, or nobody reads."""
        loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(here[0], here[0])  # noqa: S104 - looked for, not bound to
        try:
            probe.sendto(b"\x40" + self._server.relay.mint(self._server.steering()), (loopback, *here[1:]))
        except OSError:  # then nothing comes back
            return
