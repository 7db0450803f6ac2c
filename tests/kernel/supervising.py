"""Services under test: `fastrecv run` in a private namespace, numbered datagrams, and where each of them is."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from fastrecv.bench import survive_account, survive_service
from fastrecv.bench.numbered import NumberedSource, udp_counters
from fastrecv.bench.survive_account import Account
from fastrecv.bench.survive_recorder import FOLDER, HANDLER
from fastrecv.bench.survive_service import ADDRESS, PORT, namespace, until
from fastrecv.netns import Namespace
from tests.kernel.privileges import open_to_all

__all__ = [
    "ADDRESS",
    "BATCH",
    "PORT",
    "Service",
    "app",
    "children",
    "finished",
    "namespace",
    "recording",
    "say",
    "until",
]

BATCH = 256

APP = """
import asyncio, os, signal, time
from pathlib import Path

FOLDER = Path({folder!r})

def note(text):
    with (FOLDER / "notes").open("a") as file:
        file.write(f"{{os.getpid()}} {{text}}\\n")

def handle(batch):
    for payload, _ in batch.datagrams():
        if payload == b"hang":
            time.sleep(1000)
        if payload == b"die":
            os._exit(7)
        if payload == b"raise":
            raise ValueError("as it was told")
        if payload == b"bpf":
            from fastrecv.balance import Balancer
            from fastrecv.policies import Policy
            try:
                Balancer(Policy())
            except OSError as error:
                note(f"errno {{error.errno}}")
            continue
        note(payload.decode())

def slow(batch):
    time.sleep(0.02 * len(batch))

class Life:
    async def start(self):
        note("start")
    async def handle(self, batch):
        await asyncio.sleep(0)
        handle(batch)
    def stop(self):
        note("stop")

def serve(sockets):
    going = True
    def stop(*_):
        nonlocal going
        going = False
    signal.signal(signal.SIGTERM, stop)
    (sock,) = sockets
    sock.settimeout(0.05)
    while going:
        try:
            note(sock.recv(99).decode())
        except TimeoutError:
            pass
"""
"""Does as datagrams say; with {folder}."""


POWERLESS = """
import os, sys
from fastrecv import privileges
privileges.keep_only()
os.execv(sys.argv[1], sys.argv[1:])
"""
"""What is executed after it has no capability."""


class Service(survive_service.Service):
    """A service whose handlers note what happens, where they are of the APP."""

    def notes(self) -> list[tuple[int, str]]:
        """What the APP noted: process, text."""
        path = self.folder / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(pid), text) for pid, _, text in (line.partition(" ") for line in lines)]

    def noted(self, *texts: str) -> None:
        """Wait until the APP has noted just these, in any order."""
        wanted = sorted(texts)
        until(
            lambda: sorted(text for _, text in self.notes()) == wanted,
            lambda: f"{texts} and not {self.notes()}\n{self.log}",
        )


def app(folder: Path) -> str:
    """Write the APP; its module's name."""
    (folder / "app.py").write_text(APP.format(folder=str(folder)))
    return "app"


def app_for_all(folder: Path) -> Path:
    """Write the APP where other users may import it, and write, too; the folder."""
    app(folder)
    open_to_all(folder)
    return folder


def say(*payloads: str, source: str = "127.0.0.1") -> None:
    """Datagrams of one sender."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((source, 0))
        for payload in payloads:
            sock.sendto(payload.encode(), (ADDRESS, PORT))


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.contextmanager
def recording(folder: Path, workers: int, *options: object) -> Iterator[Service]:
    """A service of recorders that has begun. Whole queues have room."""
    options = ("-w", workers, "--batch-size", BATCH, "--receive-buffer", 64 << 20, *options)
    with Service(folder, HANDLER, *options, environment={FOLDER: str(folder)}) as service:
        service.begun(workers)
        yield service


def finished(service: Service, source: NumberedSource, ns: Namespace, *, first: bool = False) -> Account:
    """Stop the source, then the service, or that first; the account of the run."""
    if first:
        assert service.stop() == 0
    sent = source.stop()
    if not first:
        assert service.stop() == 0
    totals, (rows, _) = service.totals(), service.recorded()
    return survive_account.account(sent, udp_counters(ns), rows, totals.handled, totals.failed, totals.killed)
