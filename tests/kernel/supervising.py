"""Services under test: `fastrecv run` in a private namespace, numbered datagrams, and where each of them is."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pyroute2 import IPRoute

from fastrecv.bench.numbered import NUMBERED, NumberedSource, udp_counters
from fastrecv.netns import Namespace
from fastrecv.workers.counters import NAME, ROW
from fastrecv.workers.process import ALONE
from fastrecv.workers.settings import MAX_WORKERS
from tests.kernel.commands import COMMAND

ADDRESS, PORT, BATCH = "127.0.0.1", 2055, 256
_PATIENCE = 20.0  # seconds: a busy machine starts interpreters slowly

RECORDER = """
import os
from pathlib import Path
from fastrecv.bench.numbered import NUMBERED

class Recorder:
    def start(self):
        self.fd = os.open(Path({folder!r}, f"{{os.getpid()}}.rows"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def handle(self, batch):
        os.write(self.fd, batch.records(NUMBERED).tobytes())
"""
"""Writes down what it is given; with {folder}."""

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


def until(found: Callable[[], object], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not found():
        assert time.monotonic() < deadline, what()
        time.sleep(0.01)


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    """A private one, entered, where loopback is up."""
    with contextlib.closing(Namespace()) as made, made:
        with IPRoute() as net:
            net.link("set", index=1, state="up")
        yield made


class Service:
    """`fastrecv run` as a process of its own. folder : on the handlers' path, and where they write."""

    def __init__(
        self, folder: Path, handler: str, *options: object, bind: str | None = f"{ADDRESS}:{PORT}",
        before: Sequence[str] = (), **popen: Any,
    ) -> None:  # fmt: skip
        self.folder = folder
        self._log = folder / "log"
        words = [*before, *COMMAND, "run", handler, *map(str, options), *(("-b", bind) if bind else ())]
        environment = os.environ | ALONE | {"PYTHONPATH": str(folder), "RUNTIME_DIRECTORY": str(folder)}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, **popen
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def says(self, words: str, times: int = 1) -> None:
        until(
            lambda: len(re.findall(words, self.log)) >= times, lambda: f"{words!r} is not {times} times in\n{self.log}"
        )

    def begun(self, workers: int) -> None:
        self.says(r"worker \d+ \[\d+\] reads", workers)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def rows(self) -> NDArray[np.void]:
        """The counters, as they are."""
        for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
            if NAME in fd.readlink().name:
                with fd.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as memory:
                    return np.frombuffer(bytes(memory), ROW, MAX_WORKERS)
        raise AssertionError("no counters")

    def pids(self, workers: int) -> list[int]:
        """Who reads the slots."""
        return [int(pid) for pid in self.rows()["pid"][:workers]]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code."""
        self.send(number)
        return self.process.wait(_PATIENCE)

    def recorded(self) -> NDArray[np.void]:
        """What the Recorders wrote down, but for half a record that a SIGKILL may leave at the end."""
        found = []
        for path in self.folder.glob("*.rows"):
            data = path.read_bytes()
            found.append(np.frombuffer(data[: len(data) // NUMBERED.itemsize * NUMBERED.itemsize], NUMBERED))
        return np.concatenate([np.zeros(0, NUMBERED), *found])

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

    def by_process(self) -> dict[int, NDArray[np.void]]:
        return {int(path.stem): np.frombuffer(path.read_bytes(), NUMBERED) for path in self.folder.glob("*.rows")}

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()


def app(folder: Path) -> str:
    """Write the APP; its module's name."""
    (folder / "app.py").write_text(APP.format(folder=str(folder)))
    return "app"


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
    """A service of Recorders that has begun. Whole queues have room."""
    (folder / "recorder.py").write_text(RECORDER.format(folder=str(folder)))
    options = ("-w", workers, "--batch-size", BATCH, "--receive-buffer", 64 << 20, *options)
    with Service(folder, "recorder:Recorder", *options) as service:
        service.begun(workers)
        yield service


class Account(NamedTuple):
    """Where all datagrams are. taken : dequeued by workers (InDatagrams). destroyed : in no counter."""

    sent: int
    taken: int
    dropped: int
    destroyed: int
    handled: int
    failed: int
    killed: int
    recorded: int
    repeated: int


def account(service: Service, counters: dict[str, int], sent: int, total: re.Match[str]) -> Account:
    rows = service.recorded()
    identity = rows["sender"].astype(np.int64) << 32 | rows["number"]
    taken, dropped = counters["InDatagrams"], counters["InErrors"] + counters["NoPorts"]
    _, handled, failed, killed = map(int, total.groups())
    unique = len(np.unique(identity))
    return Account(sent, taken, dropped, sent - taken - dropped, handled, failed, killed, len(rows), len(rows) - unique)


def finished(service: Service, source: NumberedSource, ns: Namespace, *, first: bool = False) -> Account:
    """Stop the source, then the service, or that first; the account of the run."""
    if first:
        assert service.stop() == 0
    sent = source.stop()
    if not first:
        assert service.stop() == 0
    total = re.search(r"stopped: (\d+) datagrams received, (\d+) handled, (\d+) failed, (\d+) in", service.log)
    assert total is not None
    return account(service, udp_counters(ns), sent, total)
