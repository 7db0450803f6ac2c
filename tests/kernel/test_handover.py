"""Sockets of processes that may not register them: handed over, checked by uid, registered by who may."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastrecv import handover, lookup_life
from fastrecv.cli.main import run
from fastrecv.errors import SocketRefusedError, StateError
from fastrecv.handover import hand_over
from fastrecv.lookup import Dispatcher
from fastrecv.privileges import OtherThreadsError
from fastrecv.rules import RuleSetError
from tests.kernel.privileges import as_user, only
from tests.kernel.steering import TCP, UDP, Stage, bound

OWNER, STRANGER = 65533, 65534


class Served:
    """`fastrecv lookup serve`, a process of its own, as an operator runs it; numpy has started threads first."""

    def __init__(self, path: Path, bpffs: Path, **options: Any) -> None:
        self.path = path
        command = [sys.executable, "-u", "-m", "fastrecv", "lookup", "serve", str(path), "--owner", f"web={OWNER}"]
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [*command, "--bpffs", str(bpffs)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "4"}, **options,
        )  # fmt: skip
        assert self.line() == f"serving {path}"

    @property
    def threads(self) -> list[Path]:
        return list(Path(f"/proc/{self.process.pid}/task").iterdir())

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
    assert "stopped" in out.splitlines()  # a request's line comes after its answer, so perhaps after this one
    assert error == ""
    assert running.process.returncode == 0
    assert not running.path.exists()


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it did not come about within ten seconds")


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
    wait_until(lambda: len(list(descriptors.iterdir())) <= before)  # it closes its copies after it has answered
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
    with raw(served):
        wait_until(lambda: len(served.threads) > 1)  # one for the peer
        for thread in served.threads:  # capabilities are a thread's own
            status = dict(line.split(":\t") for line in (thread / "status").read_text().splitlines())
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

    code, said = serve(served.path)
    assert (code, said.count("\n")) == (1, 1)
    assert re.match(rf"fastrecv: {served.path} is served already, by process \d+: stop it, or give another", said)
    file = tmp_path / "file"
    file.write_text("mine")
    code, error = serve(file)
    assert (code, len(error.splitlines())) == (1, 1)
    assert str(file) in error
    assert file.read_text() == "mine"
    with pytest.raises(StateError, match=r"nobody serves .*: start `fastrecv lookup serve"):
        hand_over(tmp_path / "nobody", "web", [])


@pytest.mark.parametrize("command", [("serve", "{}/door"), ("metrics", "--listen", "127.0.0.1:0")])
def test_a_process_that_has_other_threads_does_not_begin_to_serve(
    stage: Stage, bpffs: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        with pytest.raises(OtherThreadsError, match="other threads would keep their capabilities"):
            run(["lookup", *(word.format(tmp_path) for word in command), "--bpffs", str(bpffs)])
    finally:
        done.set()
        other.join()
    assert list(tmp_path.iterdir()) == []


# Peers that mean no good


class _Swapped(handover.Server):
    """The moment its socket is there somebody who may change the directory puts a link in its place."""

    target: Path

    def server_bind(self) -> None:
        super().server_bind()
        path = Path(self.socket.getsockname())
        path.unlink()
        path.symlink_to(self.target)


def test_who_owns_the_directory_of_the_socket_cannot_have_the_mode_of_another_file_changed(tmp_path: Path) -> None:
    folder, secret = tmp_path / "strangers", tmp_path / "secret"
    folder.mkdir()
    os.chown(folder, STRANGER, STRANGER)
    secret.touch(0o600)
    _Swapped.target = secret
    with _Swapped(folder / "door", {}, lambda _label, _sockets: "", print):
        assert secret.stat().st_mode & 0o777 == 0o600
    assert secret.exists()


def test_the_socket_is_open_to_all_whatever_the_umask_and_whoever_owns_the_directory(
    stage: Stage, bpffs: Path, tmp_path: Path
) -> None:
    os.chown(tmp_path, STRANGER, STRANGER)
    served = Served(tmp_path / "door", bpffs, umask=0o077)
    try:
        assert served.path.stat().st_mode & 0o777 == 0o777
    finally:
        assert served.stop() == ("stopped\n", "")
    assert served.path.is_socket(), "without capabilities it may not remove what is in another's directory"
    again = Served(served.path, bpffs)
    assert again.stop() == ("stopped\n", "")
    assert again.process.returncode == served.process.returncode == 0


@pytest.mark.parametrize("label", ["web\nweb from process 1: registered", "\x1b[2Jweb", "we\rb", "\x9b2Jweb"])
def test_what_a_peer_says_is_not_printed_as_it_is(stage: Stage, served: Served, label: str) -> None:
    server = stage.serve("web", TCP, "198.51.100.2", 8080)
    with raw(served) as peer:
        socket.send_fds(peer, [label.encode()], [server.fileno()])
        assert peer.recv(999).startswith(b"no label '")
    said = served.line()
    assert said.isprintable()
    assert said.startswith(f"? from process {os.getpid()}, uid 0: refused: label {label!r}")
    assert hand_over(served.path, "web", [server]) == "web ipv4 tcp"
    assert served.line().startswith("web from process "), "the next line is the next request's"


def test_sixty_clients_at_once_are_all_served(stage: Stage, served: Served) -> None:
    server = stage.serve("web", TCP, "198.51.100.2", 8080)
    together, heard = threading.Barrier(60, timeout=30), []

    def ask() -> None:
        together.wait()
        heard.append(hand_over(served.path, "web", [server]))

    clients = [threading.Thread(target=ask) for _ in range(60)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert heard == ["web ipv4 tcp"] * 60
    assert {served.line() for _ in range(60)} == {
        f"web from process {os.getpid()}, uid 0: registered web ipv4 tcp"
    }  # fmt: skip


def test_a_user_who_owns_no_label_costs_no_thread(served: Served) -> None:
    def look() -> str:
        with contextlib.ExitStack() as stack:
            heard = [stack.enter_context(raw(served)).recv(99).decode() for _ in range(40)]
            return f"{set(heard)} {len(served.threads)} thread"

    assert as_other(STRANGER, look) == f"{{'no uid {STRANGER} may not register for any label'}} 1 thread"
    for _ in range(40):
        assert served.line().endswith(f", uid {STRANGER}: refused: it may not register for any label")


@pytest.mark.parametrize("descriptors", [64, 36])  # for all the peers that are served at a time, and for not so many
def test_idle_peers_keep_a_server_with_few_descriptors_busy_and_no_longer_than_they_stay(
    stage: Stage, served: Served, descriptors: int
) -> None:
    resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (descriptors, descriptors))
    server = stage.serve("web", TCP, "198.51.100.2", 8080)

    def idle() -> str:
        connected = 0
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                peer = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                peer.setblocking(False)
                with contextlib.suppress(BlockingIOError):  # the queue is full
                    peer.connect(str(served.path))
                    connected += 1
            wait_until(lambda: len(served.threads) > 25)
        return "many" if connected > 100 else f"only {connected}"

    assert as_other(OWNER, idle) == "many"
    assert hand_over(served.path, "web", [server]) == "web ipv4 tcp"
    assert stage.ask(TCP, "198.51.100.1") == "web"


# What a client is told


def test_more_sockets_than_one_message_holds_are_refused_before_anybody_is_asked(stage: Stage, tmp_path: Path) -> None:
    server = stage.serve("web", TCP, "198.51.100.2", 8080)
    with pytest.raises(SocketRefusedError, match="254 sockets, 253 at most are handed over at once"):
        hand_over(tmp_path / "nobody", "web", [server] * 254)


def test_as_many_sockets_as_one_message_holds_arrive(stage: Stage, served: Served) -> None:
    group = [stage.serve(f"web{number}", UDP, "198.51.100.2", 8080, reuseport=True) for number in range(253)]
    assert hand_over(served.path, "web", group).startswith("web ipv4 udp")


@pytest.mark.parametrize(
    ("hangs_up", "error", "said"),
    [
        (False, StateError, "has not answered within 1 s: see whether it registers"),
        (True, SocketRefusedError, "the server ended before it answered|may not register for any label"),
    ],
)
def test_a_server_that_does_not_answer_is_reported(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs_up: bool, error: type[OSError], said: str
) -> None:
    monkeypatch.setattr(handover, "_PATIENCE", 0.25)
    server = stage.serve("web", TCP, "198.51.100.2", 8080)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(tmp_path / "door"))
        silent.listen()

        def hang_up() -> None:
            silent.accept()[0].close()

        peer = threading.Thread(target=hang_up)
        if hangs_up:
            peer.start()
        with pytest.raises(error, match=said):
            hand_over(tmp_path / "door", "web", [server])
        if hangs_up:
            peer.join()
