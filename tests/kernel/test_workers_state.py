"""Handlers whose state outlives their workers: after any end of a worker the next one has all that was handled."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastrecv.bench.numbered import NumberedSource
from fastrecv.netns import Namespace
from fastrecv.workers.snapshots import NAME
from tests.kernel.supervising import ADDRESS, BATCH, PORT, Service, finished, namespace, say, until

SENDERS = 200
LARGE = 6 << 20  # bytes: a few milliseconds of writing
KILLS = 80

HANDLERS = """
import asyncio, hashlib, os, time
from pathlib import Path

import numpy as np
from fastrecv.bench.numbered import NUMBERED

FOLDER = Path({folder!r})

def note(text):
    with (FOLDER / "notes").open("a") as file:
        file.write(f"{{os.getpid()}} {{text}}\\n")

class Counting:
    '''How many datagrams of each sender; each worker's share goes into a file at its end.'''
    def start(self):
        self.counts = np.zeros({senders}, "<u8")
        self.fd = os.open(FOLDER / f"{{os.getpid()}}.rows", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def handle(self, batch):
        records = batch.records(NUMBERED)
        os.write(self.fd, records.tobytes())
        self.counts += np.bincount(records["sender"], minlength={senders}).astype("<u8")
    def snapshot(self):
        return self.counts.tobytes()
    def restore(self, data):
        self.counts = np.frombuffer(data, "<u8").copy()
    def stop(self):
        np.save(FOLDER / f"{{os.getpid()}}.npy", self.counts)

class Large(Counting):
    '''A state that takes long to write, with the checksum of all of it.'''
    def snapshot(self):
        body = self.counts.tobytes() * ({large} // self.counts.nbytes)
        return hashlib.blake2b(body).digest() + body
    def restore(self, data):
        whole = hashlib.blake2b(data[64:]).digest() == data[:64]
        note(f"whole {{len(data)}}" if whole else "torn")
        super().restore(data[64 : 64 + 8 * {senders}])

class Words:
    '''What it was told, in order.'''
    def __init__(self):
        self.words, self.changed = [], False
    def handle(self, batch):
        for payload, _ in batch.datagrams():
            if payload != b"again":
                self.words.append(payload.decode())
                self.changed = True
            note(",".join(self.words))
    def snapshot(self):
        if not self.changed:
            note("unchanged")
            return None
        self.changed = False
        return ",".join(self.words).encode()
    def restore(self, data):
        self.words = data.decode().split(",")
        note(f"restored {{data.decode()}}")

class Async(Words):
    async def snapshot(self):
        await asyncio.sleep(0)
        return super().snapshot()
    async def restore(self, data):
        await asyncio.sleep(0)
        super().restore(data)

class Stopping(Words):
    def stop(self):
        time.sleep(0.3)
        self.words.append("stopped")
        self.changed = True

class StopFails(Words):
    def stop(self):
        raise ValueError("no stop")

class Fails(Words):
    def snapshot(self):
        if self.words[-1] == "wrong":
            raise ValueError("no snapshot")
        if self.words[-1] == "text":
            return "text"
        return super().snapshot()
    def restore(self, data):
        super().restore(data)
        self.words = []
        raise ValueError("no restore")
"""

WRITERS = """
import os, random, signal, sys, time
from hashlib import blake2b
from fastrecv.workers.counters import Counters
from fastrecv.workers.snapshots import Snapshots, begun

def state(number, length):
    body = number.to_bytes(8, "little") * (length // 8)
    return blake2b(body).digest() + body

def write(counters, fd, number):
    kept = Snapshots(fd, counters.row(0))
    while True:
        number += 1
        kept.write(state(number, 65536 + number * 7919 % {large}))

torn = between = 0
with Counters() as counters:
    fd = begun(counters.row(0))
    last = 0
    for kill in range({kills}):
        pid = os.fork()
        if pid == 0:
            write(counters, fd, last)
        time.sleep(random.uniform(0.001, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = Snapshots(fd, counters.row(0)).read()
        if found is not None:
            number = int.from_bytes(found[64:72], "little")
            between += number > last
            whole = found == state(number, len(found) - 64) and number >= last
            torn += not whole
            last = number
print(torn, between)
"""


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture
def folder(ns: Namespace, tmp_path: Path) -> Path:
    (tmp_path / "stateful.py").write_text(HANDLERS.format(folder=str(tmp_path), senders=SENDERS, large=LARGE))
    return tmp_path


def counting(folder: Path, handler: str, workers: int) -> Service:
    options = ("-w", workers, "--batch-size", BATCH, "--receive-buffer", 64 << 20)
    return Service(folder, f"stateful:{handler}", *options)


def held(service: Service) -> int:
    """Of how many slots the supervisor keeps the state."""
    return sum(NAME in fd.readlink().name for fd in Path(f"/proc/{service.process.pid}/fd").iterdir())


def test_what_was_handled_is_in_the_state_of_the_next_worker_when_workers_are_killed_under_a_flood(
    ns: Namespace, folder: Path
) -> None:
    kills = 3
    with counting(folder, "Counting", 2) as service, NumberedSource(ns, SENDERS, ADDRESS, PORT) as source:
        service.begun(2)
        for kill in range(kills):
            time.sleep(0.2)
            os.kill(service.pids(2)[kill % 2], signal.SIGKILL)
            service.begun(3 + kill)
        found = finished(service, source, ns)
        recorded = np.bincount(service.recorded()[0]["sender"], minlength=SENDERS)
    counts = sum(np.load(path) for path in folder.glob("*.npy"))
    assert found.taken > 10_000
    assert found.destroyed == found.failed == 0
    assert found.handled <= counts.sum() <= found.handled + kills * BATCH
    assert (counts <= recorded).all()  # nothing twice
    assert recorded.sum() - counts.sum() <= kills * BATCH


def test_a_kill_while_a_large_state_is_written_leaves_a_whole_one(ns: Namespace, folder: Path) -> None:
    workers, rounds = 2, 2
    with counting(folder, "Large", workers) as service, NumberedSource(ns, SENDERS, ADDRESS, PORT) as source:
        service.begun(workers)
        for turn in range(1, rounds + 1):
            time.sleep(0.1)
            for pid in service.pids(workers):
                os.kill(pid, signal.SIGKILL)
            service.begun(workers * (turn + 1))
        source.stop()
        until(lambda: len(service.notes()) >= workers * rounds, lambda: service.log)
        restored = [text for _, text in service.notes()]
        assert restored == [f"whole {64 + LARGE // (8 * SENDERS) * 8 * SENDERS}"] * workers * rounds
        assert service.stop(signal.SIGQUIT) == 0  # reading what waits would take long


def test_whoever_writes_may_be_killed_at_any_instant() -> None:
    program = WRITERS.format(large=LARGE, kills=KILLS)
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    torn, between = map(int, said.stdout.split())
    assert torn == 0
    assert between > KILLS / 4  # many have published before they were killed


@pytest.mark.parametrize("handler", ["Words", "Async"])
def test_a_rolling_restart_hands_the_state_to_new_code_and_a_slot_that_comes_again_has_none(
    handler: str, folder: Path
) -> None:
    with Service(folder, f"stateful:{handler}", "--batch-size", 1) as service:
        service.begun(1)
        say("one", "two", "again")
        service.noted("one", "one,two", "one,two", "unchanged")
        code = (folder / "stateful.py").read_text()
        (folder / "stateful.py").write_text(code.replace("restored {data", "new code has {data"))
        service.send(signal.SIGHUP)
        service.says("all workers are new")
        say("three")
        expected = ["one", "one,two", "one,two", "unchanged", "unchanged", "new code has one,two", "one,two,three"]
        service.noted(*expected)  # once unchanged at the end of the first
        os.kill(service.pids(1)[0], signal.SIGKILL)
        say("again")
        expected += ["new code has one,two,three", "one,two,three", "unchanged"]
        service.noted(*expected)
        assert service.rows()["errors"][0] == 0
        assert service.stop() == 0


def test_a_slot_that_leaves_takes_its_state_along(folder: Path) -> None:
    with Service(folder, "stateful:Words", "-w", 1) as service:
        service.begun(1)
        service.send(signal.SIGTTIN)
        service.says("workers 0, 1 share the senders")
        for sender in range(1, 30):
            say("word", source=f"127.2.0.{sender}")
        until(lambda: service.rows()["handled"].sum() == 29, lambda: service.log)
        assert service.rows()["snapshot"][:2].all()
        assert held(service) == 2
        service.send(signal.SIGTTOU)
        service.says("worker 1 has left")
        assert held(service) == 1
        service.send(signal.SIGTTIN)
        service.says("workers 0, 1 share the senders", 2)
        assert service.rows()["snapshot"][0] != 0
        assert service.rows()["snapshot"][1] == 0
        assert not any(text.startswith("restored") for _, text in service.notes())
        assert service.stop() == 0


def test_stop_is_over_and_kept_before_the_next_worker_begins(folder: Path) -> None:
    with Service(folder, "stateful:Stopping") as service:
        service.begun(1)
        say("one")
        service.noted("one")
        service.send(signal.SIGHUP)
        service.says("all workers are new")
        service.noted("one", "restored one,stopped")
        assert service.stop() == 0


def test_a_stop_that_fails_keeps_nobody_from_beginning(folder: Path) -> None:
    with Service(folder, "stateful:StopFails") as service:
        service.begun(1)
        say("one")
        service.noted("one")
        service.send(signal.SIGHUP)
        service.says("all workers are new")
        service.noted("one", "restored one")
        assert "ValueError: no stop" in service.log
        assert service.stop() == 0


def test_without_snapshot_or_restore_that_work_the_worker_goes_on(folder: Path) -> None:
    with Service(folder, "stateful:Fails", "--batch-size", 1, "--on-error", "exit") as service:
        service.begun(1)
        say("one", "wrong", "text")
        service.noted("one", "one,wrong", "one,wrong,text")
        os.kill(service.pids(1)[0], signal.SIGKILL)
        say("two")
        service.noted("one", "one,wrong", "one,wrong,text", "restored one", "two")
        row = service.rows()[0]
        assert (row["handled"], row["failed"], row["errors"], row["starts"]) == (4, 0, 3, 2)
        assert service.log.count("snapshot() has failed: what was kept before stays") == 1  # once a second at most
        assert service.log.count("restore() has failed: the handler goes on without what was kept") == 1
        assert re.search(r"ValueError: no snapshot\n(.*\n)*.*ValueError: no restore", service.log)
        assert service.stop() == 0
