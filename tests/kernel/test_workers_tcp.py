"""Connections and worker processes: who accepts them, whoever dies, leaves, comes or is replaced."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastrecv.errors import StateError
from fastrecv.policies import Policy
from fastrecv.workers import opening
from fastrecv.workers.settings import Settings
from fastrecv.workers.steering import Steering
from tests.kernel.privileges import only
from tests.kernel.steering import TCP
from tests.kernel.supervising import ADDRESS, PORT, POWERLESS, Service, namespace, until
from tests.kernel.test_workers_life import ACTIVATE, lives

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
        asyncio.get_running_loop().remove_reader(sockets[0])
        for _ in range(5):  # close() loses what was accepted and has no transport yet (Server._attach, CPython 3.11)
            await asyncio.sleep(0)
        server.close()

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

WEB = """
import os, uvicorn

async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": f"{os.getpid()} hello\\n".encode()})

def serve(sockets):
    uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning")).run(sockets)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "echo.py").write_text(ECHO)
    (tmp_path / "web.py").write_text(WEB)
    with namespace():
        yield tmp_path


@contextlib.contextmanager
def serving(
    folder: Path, workers: int, handler: str = "echo:Echo", before: tuple[str, ...] = (), bind: str | None = BIND,
    **popen: Any,
) -> Iterator[Service]:  # fmt: skip
    with Service(folder, handler, "-w", workers, bind=bind, before=before, **popen) as service:
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


def fetched(source: int) -> int | None:
    """Who answers a request over HTTP; asked for once more where the connection is closed before the answer.

    uvicorn closes what it has accepted and not read yet when it stops: a client may repeat a GET (RFC 9110, 9.2.2).
    """
    for _ in range(2):
        web = http.client.HTTPConnection(ADDRESS, PORT, 15, (f"127.2.0.{source}", 0))
        with contextlib.closing(web), contextlib.suppress(ConnectionResetError, BrokenPipeError):
            web.request("GET", "/")
            return int(web.getresponse().read().split()[0])
    return None


class Crowd:
    """Sources that connect, ask and close, again and again. failed : connections that were refused or lost."""

    def __init__(self, ask: Callable[[int], int | None] = asked) -> None:
        self._ask = ask
        self.answers: list[tuple[int, int]] = []
        self.failed: list[str] = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(first,)) for first in range(1, 4)]

    def _run(self, first: int) -> None:
        while not self._end.is_set():
            for source in range(first, SOURCES + 1, 3):
                try:
                    pid = self._ask(source)
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


def everybody(owners: dict[int, set[int]]) -> set[int]:
    return {pid for pids in owners.values() for pid in pids}


@pytest.mark.parametrize("powerless", [False, True])
def test_no_connection_fails_while_workers_are_restarted_come_and_leave(folder: Path, powerless: bool) -> None:
    before = (sys.executable, "-c", POWERLESS) if powerless else ()
    with serving(folder, 2, before=before) as service:
        with Crowd() as crowd:
            first = set(service.pids(2))
            owners = crowd.goes_round()
            assert everybody(owners) == first
            assert all(len(pids) == 1 for pids in owners.values())
            service.send(signal.SIGHUP)
            service.says("all workers are new")
            restarted = crowd.goes_round()
            assert not everybody(restarted) & first
            assert all(len(pids) == 1 for pids in restarted.values())
            service.send(signal.SIGTTIN)
            service.says("workers 0, 1, 2 share the senders")
            three = crowd.goes_round()
            assert everybody(three) == set(service.pids(3))
            if not powerless:
                moved = [source for source in three if three[source] != restarted[source]]
                assert all(three[source] == {service.pids(3)[2]} for source in moved)
            service.send(signal.SIGTTOU)
            service.says("worker 2 has left")
            assert crowd.goes_round() == restarted
        assert crowd.failed == []
        assert service.stop() == 0


def test_no_request_fails_while_a_web_server_is_restarted_and_resized(folder: Path) -> None:
    pytest.importorskip("uvicorn")
    with serving(folder, 2, "web:serve") as service:
        with Crowd(fetched) as crowd:
            before = crowd.goes_round()
            service.send(signal.SIGHUP)
            service.says("all workers are new")
            after = crowd.goes_round()
            assert everybody(before).isdisjoint(everybody(after))
            service.send(signal.SIGTTOU)
            service.says("worker 1 has left")
            assert everybody(crowd.goes_round()) == set(service.pids(1))
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


def test_what_comes_to_a_listener_of_systemd_waits_for_the_next_service(folder: Path) -> None:
    with socket.socket() as passed:
        passed.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        passed.bind((ADDRESS, PORT))
        passed.listen()
        activated = (sys.executable, "-c", ACTIVATE, str(passed.fileno()))
        clients = [Client(source) for source in range(1, 11)]
        for workers in (2, 1):
            with serving(folder, workers, bind=None, before=activated, pass_fds=[passed.fileno()]) as service:
                for client in clients:
                    client.send()
                    assert client.answer() == service.pids(1)[0]  # whose listener was there alone
                    client.close()
                assert {asked(source) for source in range(1, 21)} == set(service.pids(workers))
                assert service.stop() == 0
            clients = [Client(source) for source in range(1, 11)]
        for client in clients:
            client.close()


def test_a_port_that_others_have(folder: Path) -> None:
    settings = Settings(handler="a:b", bind=BIND)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((ADDRESS, PORT))
        other.listen()
        with pytest.raises(StateError, match=f"others have tcp {ADDRESS} port {PORT} already: stop them"):
            opening.members(settings, [])
    with socket.socket() as alone:
        alone.bind((ADDRESS, PORT))
        alone.listen()
        with pytest.raises(OSError, match=f"cannot bind to {ADDRESS} port {PORT}: it is in use by a program that"):
            opening.members(settings, [])
    with only(), pytest.raises(PermissionError, match=r"port 53: ports below .* take CAP_NET_BIND_SERVICE"):
        opening.members(Settings(handler="a:b", bind=f"tcp:{ADDRESS}:53"), [])


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


def test_a_listener_has_left_for_all_though_a_check_of_new_code_has_it_still(folder: Path) -> None:
    with Service(folder, "echo:Echo", "-w", 2, bind=BIND) as service:
        service.begun(2)
        said = folder / "check"
        (folder / "sitecustomize.py").write_text(
            "import os, pathlib, time\nif 'FASTRECV_SUCCESSION' in os.environ:\n"
            f"    pathlib.Path({str(said)!r}).touch()\n    time.sleep(1000)\n"
        )
        service.send(signal.SIGUSR2)
        until(said.exists, lambda: service.log)
        service.send(signal.SIGTTOU)
        service.says("worker 1 has left")
        service.send(signal.SIGTTIN)
        service.says("workers 0, 1 share")
        assert service.stop() == 0
