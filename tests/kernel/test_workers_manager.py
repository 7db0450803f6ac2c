"""`fastrecv run` under a service manager: what it is told, and what it passes, over real sockets (sd_notify(3))."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrecv.netns import Namespace
from tests.kernel.privileges import need_open_root
from tests.kernel.supervising import ADDRESS, PORT, Service, app_for_all, namespace, say, status, until
from tests.kernel.test_workers_life import NOBODY

START = """
import os, sys
notify, usec, whose, *fds = sys.argv[1].split(",")
os.environ.update(NOTIFY_SOCKET=notify, WATCHDOG_USEC=usec, WATCHDOG_PID=whose or str(os.getpid()))
if fds:
    for place, fd in enumerate(fds):
        os.dup2(int(fd), 3 + place)
    os.environ.update(LISTEN_FDS=str(len(fds)), LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES=":".join("a" * len(fds)))
os.execv(sys.argv[2], sys.argv[2:])
"""
PRIVATE = ("NOTIFY_SOCKET=", "WATCHDOG_", "LISTEN_")


class Manager:
    """Its socket. said : all messages in their order; states : those that are neither STATUS nor WATCHDOG."""

    def __init__(self, address: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(address)
        self.name = address.replace("\0", "@")
        self._said: list[str] = []

    @property
    def said(self) -> list[str]:
        while True:
            try:
                self._said.append(self._sock.recv(4096, socket.MSG_DONTWAIT).decode())
            except BlockingIOError:
                return self._said

    def words(self, kind: str) -> list[str]:
        return [message for message in self.said if message.startswith(kind)]

    @property
    def states(self) -> list[str]:
        return [message for message in self.said if not message.startswith(("STATUS=", "WATCHDOG="))]

    def hears(self, kind: str, times: int = 1) -> None:
        until(lambda: len(self.words(kind)) >= times, lambda: f"{kind} is not {times} times in {self.said}")

    def before(self, *fds: int, watchdog: float = 0.3, whose: str = "") -> tuple[str, ...]:
        """The words before the command, by which it is started as this manager does."""
        words = ",".join([self.name, str(int(1e6 * watchdog)), whose, *map(str, fds)])
        return (sys.executable, "-c", START, words)

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *exception: object) -> None:
        self._sock.close()


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture
def folder(ns: Namespace, tmp_path: Path) -> Path:
    return app_for_all(tmp_path)


@pytest.fixture
def passed(ns: Namespace) -> Iterator[list[int]]:
    """Two sockets of a group, as systemd opens them for two ListenDatagram= and ReusePort=yes."""
    made = []
    for _ in range(2):
        made.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        made[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made[-1].bind((ADDRESS, PORT))
    yield [sock.fileno() for sock in made]
    for sock in made:
        sock.close()


def environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def test_activated_and_watched_and_reloaded_as_by_systemd(folder: Path, passed: list[int]) -> None:
    need_open_root()
    say("before")
    with (
        Manager(str(folder / "notify")) as manager,
        Service(
            folder, "app:handle", "--user", "nobody", bind=None, before=manager.before(*passed), pass_fds=passed
        ) as service,
    ):
        manager.hears("READY=1")
        pids = service.pids(2)
        for pid in pids:
            assert status(pid)["Uid"].split() == [str(NOBODY)] * 4
            assert not [word for word in environment(pid) if word.startswith(PRIVATE)]
        assert len([word for word in environment(service.process.pid) if word.startswith(PRIVATE)]) == 6
        service.noted("before")
        manager.hears("STATUS=2 of 2 workers read, ")
        manager.hears("WATCHDOG=1", 5)

        asked = time.monotonic_ns()
        service.send(signal.SIGHUP)
        manager.hears("READY=1", 2)
        assert not set(service.pids(2)) & set(pids)
        (reloading,) = manager.words("RELOADING=1\nMONOTONIC_USEC=")
        assert asked // 1000 <= int(reloading.rpartition("=")[2]) <= time.monotonic_ns() // 1000

        say("after")
        service.noted("before", "after")
        until(lambda: any(" 2 handled, 0 failed, 0 in" in message for message in manager.said), lambda: service.log)
        assert service.stop() == 0
        assert manager.states == ["READY=1", reloading, "READY=1", "STOPPING=1"]


def test_a_reload_that_fails_is_over_and_the_watchdog_of_another_is_left_alone(folder: Path) -> None:
    with (
        Manager("\0fastrecv-test-manager") as manager,  # its own in each namespace
        Service(folder, "app:handle", before=manager.before(whose="1")) as service,
    ):
        manager.hears("READY=1")
        (folder / "app.py").write_text("import nonsense\n")
        service.send(signal.SIGHUP)
        manager.hears("READY=1", 2)
        assert "no more workers are restarted, the others stay" in service.log
        assert service.stop(signal.SIGQUIT) == 0
        assert [state.split("=")[0] for state in manager.states] == ["READY", "RELOADING", "READY", "STOPPING"]
        assert not manager.words("WATCHDOG")


def test_a_manager_that_has_gone_is_no_reason_to_fail(folder: Path) -> None:
    with Service(folder, "app:handle", before=(sys.executable, "-c", START, "/nonexistent/notify,100000,")) as service:
        service.begun(1)
        say("served")
        service.noted("served")
        assert service.stop() == 0
