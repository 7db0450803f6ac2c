"""The HTTP endpoint of a service that runs, and `fastrecv top` on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fastrecv.netns import Namespace
from fastrecv.workers.requests import Status, ask
from tests.kernel.commands import COMMAND
from tests.kernel.supervising import ADDRESS, PORT, Service, app, namespace, say, until
from tests.kernel.test_workers_cli import refused

METRICS = 9100


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture
def folder(ns: Namespace, tmp_path: Path) -> Path:
    app(tmp_path)
    return tmp_path


def served(folder: Path, handler: str, *options: object) -> Service:
    return Service(folder, handler, "--metrics", f"{ADDRESS}:{METRICS}", *options)


def got(path: str) -> tuple[int, str]:
    connection = HTTPConnection(ADDRESS, METRICS, timeout=20)
    connection.request("GET", path)
    response = connection.getresponse()
    found = response.status, response.read().decode()
    connection.close()
    return found


def sums(text: str) -> dict[str, float]:
    """Of each sample over all its labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def test_metrics_say_what_was_sent_and_a_restart_goes_on_meanwhile(folder: Path) -> None:
    with served(folder, "app:handle", "-w", 2, "--batch-size", 4) as service:
        service.begun(2)
        for sender in range(20):
            say(*["12345"] * 5, source=f"127.2.0.{sender}")
        until(lambda: service.rows()["handled"].sum() == 100, lambda: service.log)
        status, text = got("/metrics")
        found = sums(text)
        assert status == 200
        assert found["fastrecv_worker_datagrams_total"] == found["fastrecv_worker_handled_datagrams_total"] == 100
        assert found["fastrecv_worker_received_bytes_total"] == 500
        assert found["fastrecv_worker_batch_datagrams_sum"] == 100
        assert found["fastrecv_worker_batch_datagrams_count"] == service.rows()["batches"].sum()
        assert found["fastrecv_worker_handler_seconds_total"] > 0
        assert found["fastrecv_worker_reading"] == found["fastrecv_service_workers_wanted"] == 2
        for pid in service.pids(2):
            assert f'pid="{pid}"' in text
        service.send(signal.SIGHUP)
        while "all workers are new" not in service.log:
            assert got("/metrics")[0] == got("/readyz")[0] == 200  # nobody is without a reader
        assert sums(got("/metrics")[1])["fastrecv_worker_restarts_total"] == 2
        assert service.stop() == 0


def test_ready_is_who_has_a_reader_at_every_slot_and_does_not_stop(folder: Path) -> None:
    (folder / "late.py").write_text("import time\ntime.sleep(0.5)\nfrom app import slow\n")
    with served(folder, "late:slow", "--batch-size", 1) as service:
        service.says("metrics at http://127.0.0.1:9100/metrics")
        assert got("/healthz") == (200, "ok\n")
        assert got("/readyz") == (503, "worker 0 does not read: it is starting\n")
        service.begun(1)
        assert got("/readyz") == (200, "ok\n")
        os.kill(service.pids(1)[0], signal.SIGKILL)
        until(lambda: got("/readyz") == (503, "worker 0 does not read: it is starting\n"), lambda: service.log)
        service.begun(2)
        assert got("/readyz") == (200, "ok\n")
        say(*["datagram"] * 50)
        service.send(signal.SIGTERM)
        until(lambda: got("/readyz") == (503, "the service is stopping\n"), lambda: service.log)
        assert got("/healthz") == (200, "ok\n")
        assert service.process.wait(20) == 0
    assert "50 handled" in service.log


def test_a_port_that_is_taken_stops_it_before_workers_begin(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind((ADDRESS, METRICS))
        taken.listen()
        service = served(folder, "app:Life")
        assert refused(service) == f"cannot listen on {ADDRESS} port {METRICS}: Address already in use"
    assert service.notes() == []
    assert not (folder / f"{PORT}.sock").exists()


class Terminal:
    """A command on a terminal of 80 columns and 24 lines."""

    def __init__(self, *words: str) -> None:
        self._fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        environment = os.environ | {"TERM": "xterm-256color"}
        self.process = subprocess.Popen([*COMMAND, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self._seen = b""

    def shows(self, words: str) -> None:
        """Wait until it has shown these since the last time."""
        deadline = time.monotonic() + 20
        while words.encode() not in self._seen:
            assert time.monotonic() < deadline, self._seen
            if select.select([self._fd], [], [], 0.1)[0]:
                self._seen += os.read(self._fd, 1 << 16)
        self._seen = b""

    def press(self, key: bytes) -> None:
        os.write(self._fd, key)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


def test_top_shows_a_service_waits_for_it_and_ends_by_a_key(folder: Path) -> None:
    path = folder / f"{PORT}.sock"
    with Terminal("top", "--control", str(path), "--interval", "0.1") as top:
        top.shows("waiting for the service, 0 s")
        with Service(folder, "app:handle") as service:
            service.begun(1)
            top.shows(f"udp {ADDRESS} port {PORT}")
            top.shows(str(ask(path, Status()).workers[0].pid))
            say(*["datagram"] * 10)
            top.shows("█")
            assert service.stop() == 0
        top.shows("waiting for the service, 0 s")
        top.press(b"q")
        assert top.process.wait(20) == 0
