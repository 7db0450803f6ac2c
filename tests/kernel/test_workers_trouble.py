"""A supervisor that goes short of descriptors, or finds its world otherwise than it should be, lives on."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.supervising import Service, app, namespace, say


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    app(tmp_path)
    with namespace():
        yield tmp_path


def limit(service: Service, descriptors: int) -> None:
    """New descriptors of the supervisor are below this number."""
    resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE, (descriptors, 1024))


def held(service: Service) -> set[int]:
    return {int(entry.name) for entry in Path(f"/proc/{service.process.pid}/fd").iterdir()}


def starve(service: Service) -> None:
    limit(service, 6)
    assert held(service) >= set(range(6))


def feed(service: Service) -> None:
    limit(service, 1024)


def test_who_cannot_be_started_now_is_started_later(folder: Path) -> None:
    with Service(folder, "app:handle") as service:
        service.begun(1)
        starve(service)
        os.kill(service.pids(1)[0], signal.SIGKILL)
        service.says("worker 0 cannot be started: Too many open files")
        say("waits")
        feed(service)
        service.noted("waits")
        assert service.stop() == 0


def test_a_restart_that_nobody_can_be_started_for_leaves_the_workers_as_they_are(folder: Path) -> None:
    with Service(folder, "app:handle") as service:
        service.begun(1)
        starve(service)
        service.send(signal.SIGHUP)
        service.says("no more workers are restarted, the others stay: the new worker 0: Too many open files")
        say("one")
        service.noted("one")
        feed(service)
        service.send(signal.SIGHUP)
        service.says("all workers are new")
        assert service.stop() == 0


def test_no_check_of_new_code_is_no_end(folder: Path) -> None:
    with Service(folder, "app:handle") as service:
        service.begun(1)
        starve(service)
        service.send(signal.SIGUSR2)
        service.says("stays as it is: its successor cannot be looked at: Too many open files")
        feed(service)
        service.send(signal.SIGUSR2)
        service.says("took over")
        assert service.stop() == 0


@pytest.mark.parametrize("spare", [0, 1, 2, 3, 4])
def test_growth_with_few_descriptors_left_leaves_none_behind(spare: int, folder: Path) -> None:
    """For a worker it takes its snapshots, its socket, two ends of its orders, its pidfd."""
    with Service(folder, "app:handle") as service:
        service.begun(1)
        time.sleep(0.1)  # what beginning has taken is given back
        before = held(service)
        limit(service, [number for number in range(64) if number not in before][spare])
        service.send(signal.SIGTTIN)
        service.says("no worker more: Too many" if spare < 2 else "worker 1 cannot be started: Too many")
        assert len(held(service)) - len(before) == (0 if spare < 2 else 2)
        feed(service)
        if spare < 2:
            service.send(signal.SIGTTIN)
        service.says("workers 0, 1 share")
        assert service.stop() == 0


HALF = """
import os
from pathlib import Path

class Half:
    def start(self):
        if Path({folder!r}, "broken").exists():
            raise ValueError("broken")
        try:
            os.mkdir(Path({folder!r}, "first"))
        except FileExistsError:
            os._exit(5)

    def handle(self, batch):
        from app import handle
        handle(batch)
"""
"""The first that starts lives; none can that starts when there is a file of that name."""


def test_broken_code_leaves_the_others_as_they_are_though_one_was_given_up_from_the_start(folder: Path) -> None:
    (folder / "half.py").write_text(HALF.format(folder=str(folder)))
    with Service(folder, "half:Half", "-w", 2) as service:
        service.says("is given up")
        (folder / "broken").touch()
        service.send(signal.SIGHUP)
        service.says("no more workers are restarted, the others stay")
        say("one")
        service.noted("one")
        assert service.stop() == 0
