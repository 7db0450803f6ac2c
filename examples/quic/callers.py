"""QUIC clients behind NATs whose ports change, with requests that last: the load of load.py."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, QuicEvent

__all__ = ["HOST", "Client", "Load"]

HOST = "127.0.0.1"
PIECE = 200  # bytes


class Servers(Protocol):
    """Who is called, and what can be done to them."""

    async def restart(self) -> None:
        """All processes, one after the other."""

    async def fewer(self) -> None:
        """The last process leaves."""


class Nat:
    """Between one client and the server: the client keeps its port, the server sees another after `rebind`."""

    def __init__(self, port: int) -> None:
        self._server, self._client = (HOST, port), ("", 0)

    async def open(self) -> int:
        """The port for the client."""
        self._inner, self._outer = await _socket(self._from_client), await self._outward()
        name: tuple[str, int] = self._inner.get_extra_info("sockname")
        return name[1]

    async def rebind(self) -> None:
        """Nothing where it was closed."""
        if not self._inner.is_closing():
            before, self._outer = self._outer, await self._outward()
            before.close()
            if self._inner.is_closing():  # meanwhile
                self._outer.close()

    async def _outward(self) -> asyncio.DatagramTransport:
        return await _socket(lambda data, _: self._inner.sendto(data, self._client))

    def _from_client(self, data: bytes, address: tuple[str, int]) -> None:
        self._client = address
        self._outer.sendto(data, self._server)

    def close(self) -> None:
        self._inner.close()
        self._outer.close()


class _Calling(asyncio.DatagramProtocol):
    def __init__(self, received: Callable[[bytes, Any], None]) -> None:
        self.datagram_received = received  # type: ignore[method-assign,assignment] # what it is for


async def _socket(received: Callable[[bytes, Any], None]) -> asyncio.DatagramTransport:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: _Calling(received), local_addr=(HOST, 0))
    return transport


class Client(QuicConnectionProtocol):
    """One connection with one request, whose pieces come back."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._http = H3Connection(self._quic)
        self._expected, self._come = 0, asyncio.Event()

    def begin(self) -> None:
        self._stream = self._quic.get_next_available_stream_id()
        self._http.send_headers(self._stream, [
            (b":method", b"POST"), (b":scheme", b"https"), (b":authority", b"localhost"), (b":path", b"/"),
        ])  # fmt: skip

    async def echo(self, piece: bytes, seconds: float) -> None:
        """Wait until it has come back. TimeoutError, ConnectionError."""
        self._come.clear()
        self._echoed = b""
        self._expected = len(piece)
        self._http.send_data(self._stream, piece, end_stream=False)
        self.transmit()
        async with asyncio.timeout(seconds):
            await self._come.wait()
        if self._echoed != piece:
            raise ConnectionError("closed, or answered with something else")

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ConnectionTerminated):
            self._come.set()
        for part in self._http.handle_event(event):
            if isinstance(part, DataReceived):
                self._echoed += part.data
                if len(self._echoed) >= self._expected:
                    self._come.set()


class Load:
    """So many connections, and what became of them."""

    def __init__(self, certificate: Path, options: argparse.Namespace) -> None:
        self._certificate, self._options = certificate, options
        self._nats = [Nat(options.port) for _ in range(options.connections)]
        self._came_back = [0] * options.connections
        self._phase = "before anything"
        self._going = True
        self.broken: dict[str, int] = {}
        self.visits = self.refused = 0

    async def run(self, servers: Servers) -> None:
        self._clients = [asyncio.create_task(self._client(number)) for number in range(len(self._nats))]
        await self._all_go_on()
        visiting = asyncio.create_task(self._visit_again_and_again())
        for phase, change in (
            ("when ports changed", self._rebind),
            ("in the rolling restart", servers.restart),
            ("when ports changed again", self._rebind),
            ("with a worker fewer", servers.fewer),
        ):
            await asyncio.sleep(self._options.seconds)
            self._phase = phase
            await change()
            await self._all_go_on()
        self._going = False
        await asyncio.gather(*self._clients, visiting)

    @property
    def pieces(self) -> int:
        return sum(self._came_back)

    async def _all_go_on(self) -> None:
        """Wait until two pieces more have come back on each connection, or it is broken."""
        wanted = [count + 2 for count in self._came_back]
        while any(
            count < enough and not client.done()
            for count, enough, client in zip(self._came_back, wanted, self._clients, strict=True)
        ):
            await asyncio.sleep(0.02)

    async def _rebind(self) -> None:
        await asyncio.gather(*(nat.rebind() for nat in self._nats))

    async def _client(self, number: int) -> None:
        try:
            async with self._connected(self._nats[number], 60) as client:
                await self._talk(client, number)
        except (ConnectionError, TimeoutError):
            self.broken[self._phase] = self.broken.get(self._phase, 0) + 1

    async def _talk(self, client: Client, number: int) -> None:
        while self._going:
            piece = self._came_back[number].to_bytes(8) * (PIECE // 8)
            await client.echo(piece, self._options.patience)
            self._came_back[number] += 1
            await asyncio.sleep(self._options.pause)

    async def _visit_again_and_again(self) -> None:
        """New connections, one after the other, for a piece each."""
        while self._going:
            try:
                async with self._connected(Nat(self._options.port), self._options.patience) as client:
                    await client.echo(bytes(PIECE), self._options.patience)
            except (ConnectionError, TimeoutError):
                self.refused += 1
            else:
                self.visits += 1

    @contextlib.asynccontextmanager
    async def _connected(self, nat: Nat, idle: float) -> AsyncIterator[Client]:
        """A client that has begun its request. idle : seconds of silence until it gives up."""
        trusting = QuicConfiguration(
            alpn_protocols=H3_ALPN, cafile=str(self._certificate), server_name="localhost", idle_timeout=idle
        )
        try:
            async with connect(HOST, await nat.open(), configuration=trusting, create_protocol=Client) as client:
                assert isinstance(client, Client)
                client.begin()
                yield client
        finally:
            nat.close()
