"""What becomes of QUIC connections under load when their ports change and their servers restart.

    python examples/quic/load.py                # web.py under `fastrecv run`, then plain.py on SO_REUSEPORT
    python examples/quic/load.py --connections 100 --workers 4 --seconds 5

Every connection is an aioquic client behind a NAT of its own, with one request that lasts: piece after piece is sent,
and must come back. Meanwhile (1) every NAT changes the port that the server sees, (2) all workers are restarted, one
after the other, (3) every NAT changes it again, (4) the last worker leaves. A connection is broken when it is closed,
or when a piece has not come back in time. To balance by connection id takes root, or CAP_BPF. Exit code 1: a connection
of web.py was broken, or nothing could be tried.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, QuicEvent
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

HERE = Path(__file__).parent
HOST = "127.0.0.1"
PIECE = 200  # bytes


@dataclass
class Result:
    """What came of it. pieces : that came back. broken : connections, by what had happened last."""

    servers: str
    connections: int
    pieces: int
    broken: dict[str, int]


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

    async def run(self, servers: Supervised | Plain) -> None:
        self._clients = [asyncio.create_task(self._client(number)) for number in range(len(self._nats))]
        await self._all_go_on()
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
        await asyncio.gather(*self._clients)

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
        trusting = QuicConfiguration(alpn_protocols=H3_ALPN, cafile=str(self._certificate), server_name="localhost")
        nat = self._nats[number]
        try:
            async with connect(HOST, await nat.open(), configuration=trusting, create_protocol=Client) as client:
                assert isinstance(client, Client)
                await self._talk(client, number)
        except (ConnectionError, TimeoutError):
            self.broken[self._phase] = self.broken.get(self._phase, 0) + 1
        finally:
            nat.close()

    async def _talk(self, client: Client, number: int) -> None:
        client.begin()
        while self._going:
            piece = self._came_back[number].to_bytes(8) * (PIECE // 8)
            await client.echo(piece, self._options.patience)
            self._came_back[number] += 1
            await asyncio.sleep(self._options.pause)


class Process:
    """One that says what it does, line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def begin(cls, folder: Path, *words: object) -> Self:
        told = {"QUIC_CERTIFICATE": str(folder / "certificate.pem"), "QUIC_KEY": str(folder / "key.pem")}
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        return cls(await asyncio.create_subprocess_exec(
            sys.executable, *map(str, words), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=os.environ | told | {"PYTHONPATH": path, "RUNTIME_DIRECTORY": str(folder)},
        ))  # fmt: skip

    async def says(self, words: str, times: int = 1) -> None:
        """Wait until so many lines have had the words. RuntimeError where it ends before."""
        assert self._process.stderr is not None
        said: list[str] = []
        while times:
            line = (await self._process.stderr.readline()).decode()
            if not line:
                raise RuntimeError("".join(said).strip() or "a server has ended without a word")
            said.append(line)
            times -= words in line

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        await self._process.communicate()


class Supervised:
    """web.py under `fastrecv run`."""

    def __init__(self, folder: Path, workers: int) -> None:
        self._folder, self._workers = folder, workers

    async def start(self, port: int) -> None:
        self._service = await Process.begin(
            self._folder, "-m", "fastrecv", "run", "-b", f"{HOST}:{port}", "-w", self._workers,
            "--policy", "quic[1]", "--receive-buffer", 4 << 20, "web:Server",
        )  # fmt: skip
        await self._service.says("reads", self._workers)

    async def restart(self) -> None:
        self._service.send(signal.SIGHUP)
        await self._service.says("all workers are new")

    async def fewer(self) -> None:
        self._service.send(signal.SIGTTOU)
        await self._service.says("share the senders")

    async def stop(self) -> None:
        await self._service.stop()


class Plain:
    """plain.py, so many times."""

    def __init__(self, folder: Path, workers: int) -> None:
        self._folder, self._workers = folder, workers

    async def start(self, port: int) -> None:
        self._port = port
        self._processes = [await self._begun() for _ in range(self._workers)]

    async def _begun(self) -> Process:
        process = await Process.begin(self._folder, HERE / "plain.py", HOST, self._port)
        await process.says("serves")
        return process

    async def restart(self) -> None:
        for place, old in enumerate(self._processes):
            self._processes[place] = await self._begun()
            await old.stop()

    async def fewer(self) -> None:
        await self._processes.pop().stop()

    async def stop(self) -> None:
        for process in self._processes:
            await process.stop()


def certified(folder: Path) -> Path:
    """A certificate for localhost that signs itself, and its key, for an hour."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate = folder / "certificate.pem"
    certificate.write_bytes(made.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return certificate


async def tried(kind: type[Supervised | Plain], options: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load = Load(certified(folder), options)
        servers = kind(folder, options.workers)
        await servers.start(options.port)
        try:
            await load.run(servers)
        finally:
            await servers.stop()
    return Result(
        servers=kind.__name__.lower(), connections=options.connections, pieces=load.pieces, broken=load.broken
    )


def _options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="QUIC connections while ports change and servers restart.")
    parser.add_argument("--connections", type=int, default=40, help="clients (default: 40)")
    parser.add_argument("--workers", type=int, default=2, help="server processes (default: 2)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of load before each change (default: 2)")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between two pieces (default: 0.1)")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds for a piece to come back (default: 5)")
    parser.add_argument("--port", type=int, default=4433, help="of the servers, on loopback (default: 4433)")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    found = parser.parse_args(words)
    if found.connections < 1 or found.workers < 2 or min(found.seconds, found.pause, found.patience) < 0:
        parser.error("give at least one connection and two workers, and no time below 0")
    return found


def main(words: list[str]) -> int:
    options = _options(words)
    try:
        results = [asyncio.run(tried(kind, options)) for kind in (Supervised, Plain)]
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if options.json:
        print(json.dumps([asdict(result) for result in results]))
    else:
        for result in results:
            broken = ", ".join(f"{count} {when}" for when, count in result.broken.items())
            print(
                f"{result.servers}: {sum(result.broken.values())} of {result.connections} connections broken"
                f"{f' ({broken})' if broken else ''}, {result.pieces:,} pieces came back"
            )
    return 1 if results[0].broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
