"""Connections and worker processes: who accepts them, whoever dies, leaves, comes or is replaced."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrecv.policies import Policy
from fastrecv.workers import opening
from fastrecv.workers.settings import Settings
from fastrecv.workers.steering import Steering
from tests.kernel.privileges import only
from tests.kernel.steering import TCP
from tests.kernel.supervising import ADDRESS, PORT, POWERLESS, Service, namespace, until
from tests.kernel.test_workers_life import lives

BIND = f"tcp:{ADDRESS}:{PORT}"
SOURCES = 24

ECHO = """
import asyncio, os, signal

class Echo:
    async def serve(self, sockets):
        self.busy = set()
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        server = await asyncio.start_server(self.answer, sock=sockets[0])
        await stop.wait()
        server.close()
        await asyncio.sleep(0.1)  # until what it has accepted has a task

    async def stop(self):
        if self.busy:
            await asyncio.wait(self.busy)

    async def answer(self, reader, writer):
        self.busy.add(asyncio.current_task())
        while line := await reader.readline():
            writer.write(f"{os.getpid()} ".encode() + line)
            await writer.drain()
        writer.close()
        self.busy.discard(asyncio.current_task())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "echo.py").write_text(ECHO)
    with namespace():
        yield tmp_path


@contextlib.contextmanager
def serving(folder: Path, workers: int, *options: object, before: tuple[str, ...] = ()) -> Iterator[Service]:
    with Service(folder, "echo:Echo", "-w", workers, *options, bind=BIND, before=before) as service:
        service.begun(workers)
        yield service


class Client:
    """One connection."""

    def __init__(self, source: int = 1) -> None:
        self._sock = socket.socket()
        self._sock.settimeout(15)
        try:
            self._sock.bind((f"127.2.0.{source}", 0))
            self._sock.connect((ADDRESS, PORT))
        except OSError:
            self._sock.close()
            raise

    def send(self, line: str = "hello") -> None:
        self._sock.sendall(f"{line}\n".encode())

    def answer(self, line: str = "hello") -> int | None:
        """The process that has answered what was sent; None where the connection was lost."""
        try:
            pid, _, said = self._sock.recv(99).decode().partition(" ")
        except ConnectionResetError:
            return None
        assert not pid or said == f"{line}\n"
        return int(pid) if pid else None

    def close(self) -> None:
        self._sock.close()


def asked(source: int = 1) -> int | None:
    """Who answers a new connection."""
    with contextlib.closing(Client(source)) as client:
        client.send()
        return client.answer()


class Crowd:
    """Sources that connect, ask and close, again and again. failed : connections that were refused or lost."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, int]] = []
        self.failed: list[str] = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(first,)) for first in range(1, 4)]

    def _run(self, first: int) -> None:
        while not self._end.is_set():
            for source in range(first, SOURCES + 1, 3):
                try:
                    pid = asked(source)
                except OSError as error:
                    self.failed.append(str(error))
                    continue
                if pid is None:
                    self.failed.append("lost")
                else:
                    self.answers.append((source, pid))

    def goes_round(self) -> dict[int, set[int]]:
        """Who has answered each source since; when each has been answered twice."""
        time.sleep(0.1)  # what had been accepted before is answered
        begun = len(self.answers)
        sources = list(range(1, SOURCES + 1)) * 2

        def all_twice() -> bool:
            left = list(sources)
            for source, _ in self.answers[begun:]:
                if source in left:
                    left.remove(source)
            return not left

        until(all_twice, lambda: f"{self.answers[begun:]} {self.failed}")
        found: dict[int, set[int]] = {}
        for source, pid in self.answers[begun:]:
            found.setdefault(source, set()).add(pid)
        return found

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("powerless", [False, True])
def test_no_connection_fails_while_workers_are_restarted_come_and_leave(folder: Path, powerless: bool) -> None:
    before = (sys.executable, "-c", POWERLESS) if powerless else ()
    with serving(folder, 2, before=before) as service:
        with Crowd() as crowd:
            first = set(service.pids(2))
            owners = crowd.goes_round()
            assert set.union(*owners.values()) == first
            assert all(len(pids) == 1 for pids in owners.values())
            service.send(signal.SIGHUP)
            service.says("all workers are new")
            restarted = crowd.goes_round()
            assert not set.union(*restarted.values()) & first
            assert all(len(pids) == 1 for pids in restarted.values())
            service.send(signal.SIGTTIN)
            service.says("workers 0, 1, 2 share the senders")
            three = crowd.goes_round()
            assert set.union(*three.values()) == set(service.pids(3))
            if not powerless:
                moved = [source for source in three if three[source] != restarted[source]]
                assert all(three[source] == {service.pids(3)[2]} for source in moved)
            service.send(signal.SIGTTOU)
            service.says("worker 2 has left")
            assert crowd.goes_round() == restarted
        assert crowd.failed == []
        assert service.stop() == 0


def test_a_worker_that_is_killed_loses_what_it_had_accepted_and_no_more(folder: Path) -> None:
    with serving(folder, 1) as service, contextlib.ExitStack() as stack:
        (pid,) = service.pids(1)
        accepted = [stack.enter_context(contextlib.closing(Client())) for _ in range(5)]
        for client in accepted:
            client.send()
            assert client.answer() == pid
        os.kill(pid, signal.SIGSTOP)
        waiting = [stack.enter_context(contextlib.closing(Client())) for _ in range(5)]
        for client in waiting:
            client.send()
        os.kill(pid, signal.SIGKILL)
        service.begun(2)
        assert [client.answer() for client in accepted] == [None] * 5
        assert {client.answer() for client in waiting} == set(service.pids(1)) != {pid}
        for client in waiting:
            client.close()
        assert service.stop() == 0


def test_a_predecessor_finishes_its_connections_while_its_successor_accepts(folder: Path) -> None:
    with serving(folder, 1) as service, contextlib.closing(Client()) as client:
        (old,) = service.pids(1)
        client.send()
        assert client.answer() == old
        service.send(signal.SIGHUP)
        service.says("all workers are new")
        (new,) = service.pids(1)
        assert asked() == new != old
        client.send("still")
        assert client.answer("still") == old
        client.close()
        until(lambda: not lives(old), lambda: service.log)
        assert service.stop() == 0


def test_told_to_stop_what_waits_is_accepted_and_nothing_else(folder: Path) -> None:
    with serving(folder, 2) as service, contextlib.ExitStack() as stack:
        pids = service.pids(2)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        waiting = [stack.enter_context(contextlib.closing(Client(source))) for source in range(1, 11)]
        for client in waiting:
            client.send()
        service.send(signal.SIGTERM)
        service.says("SIGTERM")
        time.sleep(0.5)  # longer than for handshakes
        with pytest.raises(ConnectionRefusedError):
            Client()
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert {client.answer() for client in waiting} == set(pids)
        for client in waiting:
            client.close()
        assert service.process.wait(15) == 0


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_what_a_listener_that_leaves_has_not_accepted_goes_to_the_others(folder: Path, family: str) -> None:
    host = {"ipv4": ADDRESS, "ipv6": "::1"}[family]
    settings = Settings(handler="a:b", bind=f"tcp:{host if family == 'ipv4' else '[::1]'}:{PORT}", workers=2)
    members = opening.members(settings, [])
    assert [member.type for member in members] == [TCP] * 2
    steering = Steering.begin(Policy.parse("source+port"), members, logging.getLogger("steering"), passed=False)
    with contextlib.closing(steering), contextlib.ExitStack() as stack, only():
        clients = [stack.enter_context(socket.create_connection((host, PORT), 5)) for _ in range(20)]
        for number, client in enumerate(clients):
            client.sendall(bytes([number]))
        stays, leaves = members
        stack.enter_context(stays)
        with leaves:
            assert steering.share({0}, stays)
            steering.leave(1, leaves)
            waits = waiting_in(leaves)
            assert 0 < waits < 20
        asked = set()
        for _ in clients:
            stays.settimeout(5)
            with stays.accept()[0] as accepted:
                accepted.settimeout(5)
                asked |= set(accepted.recv(9))
                accepted.sendall(b"yes")
        assert asked == set(range(20))
        assert [client.recv(9) for client in clients] == [b"yes"] * 20


def waiting_in(listener: socket.socket) -> int:
    """Connections that nobody has accepted: tcpi_unacked of a listener (tcp_get_info, net/ipv4/tcp.c)."""
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
    return int.from_bytes(info[24:28], sys.byteorder)
