"""Sockets of processes that may not register them: handed over, checked by uid, registered by who may."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastrecv import lookup_life
from fastrecv.errors import SocketRefusedError, StateError
from fastrecv.handover import hand_over
from fastrecv.lookup import Dispatcher
from fastrecv.rules import RuleSetError
from tests.kernel.privileges import only
from tests.kernel.steering import TCP, UDP, Stage, bound
from tests.kernel.test_lookup_privileges import as_user

OWNER, STRANGER = 65533, 65534


class Served:
    """`fastrecv lookup serve`, a process of its own, as an operator runs it."""

    def __init__(self, path: Path, bpffs: Path) -> None:
        self.path = path
        command = [sys.executable, "-u", "-m", "fastrecv", "lookup", "serve", str(path), "--owner", f"web={OWNER}"]
        self.process = subprocess.Popen(
            [*command, "--bpffs", str(bpffs)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.line() == f"serving {path}"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def stop(self) -> tuple[str, str]:
        self.process.send_signal(signal.SIGTERM)
        return self.process.communicate(timeout=10)


@pytest.fixture
def served(stage: Stage, bpffs: Path) -> Iterator[Served]:
    lookup_life.load(bpffs=bpffs)
    with Dispatcher(bpffs=bpffs) as dispatcher:
        dispatcher.bind(bound(TCP, "198.51.100.1", "web"), bound(UDP, "198.51.100.1", "dns"))
    running = Served(bpffs.with_name(f"{bpffs.name}.sock"), bpffs)
    try:
        yield running
    finally:
        out, error = running.stop()
        lookup_life.unload(bpffs=bpffs)
    assert out.endswith("stopped\n")
    assert error == ""
    assert running.process.returncode == 0
    assert not running.path.exists()


def as_other(user: int, action: Callable[[], object]) -> str:
    """What another user is told: the answer, or the refusal."""
    heard, told = os.pipe()

    def say() -> int:
        try:
            os.write(told, str(action()).encode())
        except OSError as error:
            os.write(told, f"{type(error).__name__}: {error}".encode())
        return 0

    child = as_user(user, user, say)
    os.close(told)
    with os.fdopen(heard) as text:
        answer = text.read()
    assert os.waitpid(child, 0)[1] == 0
    return answer


def test_the_owner_of_a_label_registers_without_any_privilege_and_a_stranger_does_not(
    stage: Stage, served: Served
) -> None:
    server = stage.serve("web", TCP, "198.51.100.2", 8080)
    assert as_other(STRANGER, lambda: hand_over(served.path, "web", [server])) == (
        f"SocketRefusedError: uid {STRANGER} may not register for any label"
    )
    assert re.fullmatch(rf"\? from process \d+, uid {STRANGER}: refused: it may not register .*", served.line())
    assert stage.ask(TCP, "198.51.100.1") == "refused"
    assert as_other(OWNER, lambda: hand_over(served.path, "web", [server])) == "web ipv4 tcp"
    assert re.fullmatch(rf"web from process \d+, uid {OWNER}: registered web ipv4 tcp", served.line())
    assert stage.ask(TCP, "198.51.100.1") == "web"
    assert as_other(OWNER, lambda: hand_over(served.path, "dns", [server])).startswith("SocketRefusedError: uid")


def test_the_command_hands_over_what_it_has_inherited(stage: Stage, served: Served) -> None:
    server = stage.serve("dns", UDP, "198.51.100.2", 5353)
    fd = server.fileno()
    done = subprocess.run(
        [sys.executable, "-m", "fastrecv", "lookup", "register", "dns", "--fd", str(fd), "--to", str(served.path)],
        pass_fds=[fd], check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "registered dns ipv4 udp\n"
    assert stage.ask(UDP, "198.51.100.1") == "dns"


def test_what_makes_no_sense_is_refused_and_the_server_goes_on(stage: Stage, served: Served) -> None:
    server = stage.serve("web", TCP, "198.51.100.2", 8080)
    with socket.socket(socket.AF_INET, UDP) as unbound, pytest.raises(SocketRefusedError, match="is not bound"):
        hand_over(served.path, "web", [unbound])
    with pytest.raises(SocketRefusedError, match="the request came without a socket"):
        hand_over(served.path, "web", [])
    with pytest.raises(RuleSetError, match="'drop' is a verdict, not a label"):
        hand_over(served.path, "drop", [server])
    with raw(served) as peer:
        socket.send_fds(peer, [b"drop"], [server.fileno()])
        assert peer.recv(99) == b"no 'drop' is a verdict, not a label: choose another name"
    with open(os.devnull) as file, raw(served) as peer:  # noqa: PTH123 - a descriptor that is no socket
        socket.send_fds(peer, [b"web"], [file.fileno()])
        assert re.fullmatch(rb"no descriptor \d+ is not a socket", peer.recv(99))
    with raw(served) as peer:
        socket.send_fds(peer, [b"w" * 300], [server.fileno()])
        assert peer.recv(99).startswith(b"no label 'wwww")
    with raw(served) as peer:
        socket.send_fds(peer, [b"\xff"], [server.fileno()])
        assert peer.recv(99).startswith(b"no 'utf-8' codec")
    with raw(served):
        pass  # who leaves without a word
    descriptors = Path(f"/proc/{served.process.pid}/fd")
    assert hand_over(served.path, "web", [server]) == "web ipv4 tcp"
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        hand_over(served.path, "web", [server])
    for _ in range(1000):  # the server closes its copies after it has answered
        if len(list(descriptors.iterdir())) <= before:
            break
        threading.Event().wait(0.005)
    else:
        raise AssertionError("copies stay open")
    server.close()
    stage.servers.clear()
    assert stage.ask(TCP, "198.51.100.1") == "refused", "nobody keeps the socket alive"


@contextlib.contextmanager
def raw(served: Served) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(10)
        peer.connect(str(served.path))
        yield peer


def test_the_server_keeps_one_capability_and_needs_no_more(served: Served) -> None:
    tasks = list(Path(f"/proc/{served.process.pid}/task").iterdir())
    assert tasks
    for task in tasks:  # capabilities are a thread's own
        status = dict(line.split(":\t") for line in (task / "status").read_text().splitlines())
        for held in ("CapEff", "CapPrm"):
            assert int(status[held], 16) == 1 << 39  # CAP_BPF
        assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
        assert status["NoNewPrivs"] == "1"


def test_a_label_that_is_new_is_registered_by_the_server(stage: Stage, served: Served, bpffs: Path) -> None:
    server = stage.serve("new", TCP, "198.51.100.2", 8080)
    with only():
        assert hand_over(served.path, "new", [server]) == "new ipv4 tcp; nothing is bound yet to new ipv4 tcp"
    with Dispatcher(bpffs=bpffs) as dispatcher:
        dispatcher.bind(bound(TCP, "198.51.100.1", "new"))
    assert stage.ask(TCP, "198.51.100.1") == "new"


def test_a_path_that_is_served_or_is_something_else_is_left_alone(served: Served, bpffs: Path, tmp_path: Path) -> None:
    def serve(path: Path) -> tuple[int, str]:
        command = [sys.executable, "-m", "fastrecv", "lookup", "serve", str(path), "--bpffs", str(bpffs)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
        return done.returncode, done.stderr

    assert serve(served.path) == (1, f"fastrecv: {served.path} is served already\n")
    file = tmp_path / "file"
    file.write_text("mine")
    code, error = serve(file)
    assert (code, len(error.splitlines())) == (1, 1)
    assert str(file) in error
    assert file.read_text() == "mine"
    with pytest.raises(StateError, match=r"nobody serves .*: start `fastrecv lookup serve"):
        hand_over(tmp_path / "nobody", "web", [])
