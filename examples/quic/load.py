"""What becomes of QUIC connections under load when their ports change and their servers restart.

    python examples/quic/load.py                # web.py under `fastrecv run`, then plain.py on SO_REUSEPORT
    python examples/quic/load.py --connections 100 --workers 4 --seconds 5

Every connection is an aioquic client behind a NAT of its own, with one request that lasts: piece after piece is sent,
and must come back. Meanwhile (1) every NAT changes the port that the server sees, (2) all workers are restarted, one
after the other, (3) every NAT changes it again, (4) the last worker leaves; and new clients come and go. A connection
is broken when it is closed, or when a piece has not come back in time. To balance by connection id takes root, or
CAP_BPF. Exit code 1: a connection to web.py was broken or refused, or nothing could be tried.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

try:
    from callers import HOST, Load
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import NameOID
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed: pip install aioquic, which brings all that is needed here")

HERE = Path(__file__).parent


@dataclass
class Result:
    """What came of it.

    pieces : that came back. broken : connections, by what had happened last. visits, refused : connections that were
    made meanwhile, for a piece each, and those that could not be.
    """

    servers: str
    connections: int
    pieces: int
    broken: dict[str, int]
    visits: int
    refused: int


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
                await self._process.wait()
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
        kind.__name__.lower(), options.connections, load.pieces, load.broken, load.visits, load.refused
    )  # fmt: skip


def _options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="QUIC connections while ports change and servers restart.")
    parser.add_argument("--connections", type=int, default=40, help="clients (default: 40)")
    parser.add_argument("--workers", type=int, default=2, help="server processes (default: 2)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of load before each change (default: 2)")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between two pieces (default: 0.1)")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds for a piece to come back (default: 5)")
    parser.add_argument("--port", type=int, default=4433, help="of the servers, on loopback (default: 4433)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")
    found = parser.parse_args(words)
    sensible = all(0 <= time < math.inf for time in (found.seconds, found.pause, found.patience))
    if found.connections < 1 or found.workers < 2 or not sensible:
        parser.error("give at least one connection and two workers, and no time below 0")
    return found


def _said(result: Result) -> str:
    broken = ", ".join(f"{count} {when}" for when, count in result.broken.items())
    return (
        f"{result.servers}: {sum(result.broken.values())} of {result.connections} connections broken"
        f"{f' ({broken})' if broken else ''}, {result.pieces:,} pieces came back; meanwhile {result.visits} new "
        f"connections, {result.refused} refused"
    )


def main(words: list[str]) -> int:
    options = _options(words)
    try:
        results = [asyncio.run(tried(kind, options)) for kind in (Supervised, Plain)]
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for result in results:
        print(json.dumps(asdict(result)) if options.json else _said(result))
    return 1 if results[0].broken or results[0].refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
