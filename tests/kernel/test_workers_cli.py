"""`fastrecv run` with what cannot be: one line that says what to do, an exit code, and nobody left behind."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrecv.cli.main import run
from fastrecv.netns import Namespace
from tests.kernel.commands import one_line
from tests.kernel.supervising import ADDRESS, PORT, POWERLESS, Service, app, children, namespace
from tests.kernel.test_workers_life import ACTIVATE


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture
def folder(ns: Namespace, tmp_path: Path) -> Path:
    app(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a:b", "-b", "localhost:53"], "'localhost:53' is no address to bind to"),
        (["a:b", "-b", "127.0.0.1:53", "--user", "nonsense"], "there is no user 'nonsense'"),
        (["a:b", "-b", "127.0.0.1:53", "--group", "nonsense"], "there is no group 'nonsense'"),
        (["a:b", "-b", "127.0.0.1:53", "-w", "0"], "0 is not in the range"),
        (["a:b", "-b", "127.0.0.1:53", "--policy", "sauce"], "policy 'sauce'"),
        (["a:b", "-b", "127.0.0.1:53", "--timeout", "-1"], "--timeout: -1.0 is out of range"),
        ([], "Missing argument"),
        (["a:b", "-b", "127.0.0.1:53", "-b", "127.0.0.1:54"], "one service has one address: run one for each"),
        (["a.b", "-b", "127.0.0.1:53"], "'a.b' names no handler: give package.module:name"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.endswith("(see fastrecv run --help)")


def refused(service: Service, code: int = 1) -> str:
    """Why it could not begin: its only error."""
    with service:
        pid = service.process.pid
        assert service.process.wait(20) == code
        assert not Path(f"/proc/{pid}").exists()
    (line,) = [line for line in service.log.splitlines() if " INFO " not in line and " WARNING " not in line]
    return one_line(line)


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ("absent:handle", "'absent:handle': there is no module 'absent' on the path of"),
        ("unready:Unready", "'unready:Unready' cannot start: FileNotFoundError: [Errno 2]"),
    ],
)
def test_a_handler_that_cannot_be(handler: str, message: str, folder: Path) -> None:
    (folder / "unready.py").write_text(
        "class Unready:\n    def start(self): open('/nonexistent')\n    def handle(self, batch): pass\n"
    )
    assert refused(Service(folder, handler, "-w", 2)).startswith(message)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((ADDRESS, PORT))  # nobody has it any more


def test_a_limit_under_which_no_state_can_be_kept(folder: Path) -> None:
    (folder / "keeps.py").write_text(
        "class Keeps:\n    def handle(self, batch): pass\n"
        "    def snapshot(self): return b''\n    def restore(self, data): pass\n"
    )
    message = refused(Service(folder, "keeps:Keeps", "--limit", "fsize=1G"))
    assert message == "'keeps:Keeps' has snapshot(), which limit fsize 1073741824 forbids: give 2147483648 at least"


def test_a_port_in_use(folder: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((ADDRESS, PORT))
        said = refused(Service(folder, "app:handle"))
        assert said == f"cannot bind to {ADDRESS} port {PORT}: Address already in use"
    with Service(folder, "app:handle", "-w", 2) as service:
        service.begun(2)
        assert len(children(service.process.pid)) == 2
        (folder / "other").mkdir()
        other = Service(folder / "other", "app:handle")  # it could join the group
        assert refused(other) == f"others have udp {ADDRESS} port {PORT} already: stop them, or bind to another port"
        assert service.stop() == 0


def test_missing_privileges(folder: Path) -> None:
    powerless = (sys.executable, "-c", POWERLESS)
    said = refused(Service(folder, "app:handle", "--user", "nobody", before=powerless), 77)
    assert said == "to become another user or group takes CAP_SETUID and CAP_SETGID: run as root"
    said = refused(Service(folder, "app:handle", bind=f"{ADDRESS}:53", before=powerless), 77)
    assert said == f"cannot bind to {ADDRESS} port 53: Permission denied"


def test_sockets_that_do_not_fit(folder: Path) -> None:
    def bind_is_wrong(service: Service) -> str:
        with service:
            assert service.process.wait(20) == 2
        return service.log.splitlines()[-1]

    assert "bind: give an address: systemd passes no sockets" in bind_is_wrong(Service(folder, "app:handle", bind=None))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as alone, socket.socket() as stream:
        alone.bind((ADDRESS, PORT))
        stream.bind((ADDRESS, PORT))
        stream.listen()

        def service(sock: socket.socket, *options: object, bind: str | None = None) -> Service:
            before = (sys.executable, "-c", ACTIVATE, str(sock.fileno()))
            return Service(folder, "app:handle", *options, bind=bind, before=before, pass_fds=[sock.fileno()])

        def activated(sock: socket.socket, *options: object) -> str:
            return refused(service(sock, *options))

        said = activated(alone, "-w", 2)
        assert said.startswith(f"udp {ADDRESS} port {PORT} has no other socket beside it, so one worker only")
        said = bind_is_wrong(service(alone, bind=f"{ADDRESS}:53"))
        assert "systemd has passed sockets: leave it out" in said
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nowhere:
            assert activated(nowhere).endswith("give sockets bound to an address and a port")
        said = activated(stream)
        assert said == (
            f"'app:handle' takes batches of datagrams, and tcp {ADDRESS} port {PORT} has connections: give it "
            "serve(sockets), a loop that accepts them"
        )
