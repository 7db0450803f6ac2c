"""The control socket of a service, and `fastrecv workers`: who may, what it survives, counts that are what was sent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastrecv.cli.main import run
from fastrecv.errors import StateError
from fastrecv.netns import Namespace
from fastrecv.workers.counters import FILLS
from fastrecv.workers.requests import Status, ask
from fastrecv.workers.status import Service as Standing
from tests.kernel.commands import one_line
from tests.kernel.privileges import need_open_root, open_to_all
from tests.kernel.supervising import ADDRESS, PORT, Service, app, namespace, say, until
from tests.kernel.test_workers_cli import refused
from tests.kernel.test_workers_life import NOBODY

AS_NOBODY = f"""
import os, socket, sys
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
    sock.connect(sys.argv[1])
    sock.settimeout(10)
    try:
        sock.send(b'{{"command": "stop"}}')
        print(sock.recv(9))
    except (BrokenPipeError, ConnectionResetError):
        print(b"")
"""


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture
def folder(ns: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    app(tmp_path)
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return tmp_path


def door(folder: Path) -> Path:
    return folder / f"{PORT}.sock"


def standing(folder: Path) -> Standing:
    return ask(door(folder), Status())


def settled(folder: Path, datagrams: int) -> Standing:
    """As it stands once so many have been handled or lost by workers."""
    until(lambda: _done(standing(folder)) >= datagrams, lambda: str(standing(folder)))
    return standing(folder)


def _done(found: Standing) -> int:
    return found.total.handled + found.total.failed + found.total.killed


def connected(folder: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(20)
    sock.connect(str(door(folder)))
    return sock


def test_only_its_owner_may_ask_from_the_first_moment_and_another_s_file_stays(folder: Path) -> None:
    with Service(folder, "app:handle") as service:
        until(door(folder).exists, lambda: service.log)
        found = door(folder).stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, os.geteuid())
        service.begun(1)
        assert standing(folder).pid == service.process.pid
        door(folder).unlink()
        door(folder).write_text("another's")
        assert service.stop() == 0
    assert door(folder).read_text() == "another's"


def test_nobody_else_is_answered_even_where_the_file_lets_them(shared: Service) -> None:
    need_open_root()
    path = door(shared.folder)
    open_to_all(shared.folder)
    words = [sys.executable, "-c", AS_NOBODY, str(path)]
    denied = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "PermissionError" in denied.stderr
    path.chmod(0o666)
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "b''\n"
    path.chmod(0o600)
    shared.says(rf"process \d+ of uid {NOBODY} may not control this service")
    assert standing(shared.folder).state == "running"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (b"nonsense", "JSON is malformed"),
        (b"\xff\x00", "JSON is malformed"),
        (b'{"command": "\xff"}', "can't decode byte"),
        (b'{"more": ' + b"[" * 4000, "recursion"),
        (b"{}", "missing required field `command`"),
        (b'{"command": "explode"}', "Invalid value 'explode'"),
        (b'{"command": "scale", "workers": 0}', "Expected `int` >= 1 - at `$.workers`"),
        (b'{"command": "scale", "workers": 129}', "Expected `int` <= 128"),
        (b'{"command": "status", "more": 1}', "unknown field `more`"),
        (b'{"command": "status"' + b" " * 5000 + b"}", "truncated"),
    ],
)
def test_garbage(request_: bytes, message: str, shared: Service) -> None:
    with connected(shared.folder) as client:
        client.send(request_)
        answer = json.loads(client.recv(1 << 20))
        assert list(answer) == ["error"]
        assert message in answer["error"]
        assert client.recv(1) == b""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that tests share, which change nothing."""
    folder = tmp_path_factory.mktemp("shared")
    app(folder)
    with namespace():
        started = Service(folder, "app:handle")
    with started as service:
        service.begun(1)
        yield service
        assert service.stop() == 0


def test_who_says_nothing_or_does_not_listen_keeps_nobody_waiting_for_ever(shared: Service) -> None:
    silent = [connected(shared.folder) for _ in range(16)]  # as many as are heard at once
    with connected(shared.folder) as deaf:
        deaf.send(b'{"command": "status"}')
        gone = connected(shared.folder)
        gone.send(b'{"command": "status"}')
        gone.close()
        assert standing(shared.folder).state == "running"
    for client in silent:
        with client:
            assert client.recv(1) == b""
    assert standing(shared.folder).state == "running"


def test_where_a_service_answers_no_other_begins(shared: Service, folder: Path) -> None:
    path = door(shared.folder)
    said = refused(Service(folder, "app:handle", "--control", path))
    assert said == f"{path} is served already, by process {shared.process.pid}: stop it, or give another path"
    assert standing(shared.folder).pid == shared.process.pid


def test_without_a_folder_there_is_none_and_that_is_said(folder: Path) -> None:
    need_open_root()
    with Service(folder, "app:handle", before=("unshare", "--mount", "sh", "-c", WITHOUT_RUN, "sh")) as service:
        service.says("no control socket: there is no folder for one, give its path to have it")
        service.begun(1)
        assert service.stop() == 0


WITHOUT_RUN = """mount -t tmpfs -o ro none /run && exec env -u RUNTIME_DIRECTORY "$@\""""


def test_where_it_is_unless_something_is_said(folder: Path) -> None:
    need_open_root()
    open_to_all(folder)
    words = [sys.executable, "-c", DEFAULTS, str(folder)]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found == [f"{folder / 'first'}/53.sock", f"{folder / 'fastrecv'}/53.sock", "None", "None"]
    assert stat.S_IMODE((folder / "fastrecv").stat().st_mode) == 0o700


DEFAULTS = f"""
import os, sys
from fastrecv.workers.control import default_path
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
home = sys.argv[1]
for environment in (
    {{"RUNTIME_DIRECTORY": f"{{home}}/first:{{home}}/second", "XDG_RUNTIME_DIR": home}}, {{"XDG_RUNTIME_DIR": home}},
    {{"XDG_RUNTIME_DIR": "/nonexistent"}}, {{}},
):
    print(default_path("53", environment))
"""


def test_what_is_counted_is_what_was_sent(folder: Path) -> None:
    with Service(folder, "app:handle", "-w", 2, "--batch-size", 8) as service:
        service.begun(2)
        for sender in range(20):
            say(*["12345"] * 5, source=f"127.2.0.{sender}")
        settled(folder, 100)
        for done, payload in enumerate(("raise", "die"), 101):
            say(payload)
            found = settled(folder, done)
        total = found.total
        assert (found.state, found.wanted, found.chooser, found.policy) == ("running", 2, "balancer", "source")
        assert (found.address, found.handler) == (f"udp {ADDRESS} port {PORT}", "app:handle")
        assert (total.datagrams, total.bytes, total.truncated) == (102, 508, 0)
        assert (total.handled, total.failed, total.killed) == (100, 1, 1)
        assert (total.errors, total.deaths, total.kernel_drops) == (1, 1, 0)
        assert total.batches == sum(total.fill) >= 102 / 8
        least = sum(count << place for place, count in enumerate(total.fill))
        most = sum(count * ((2 << place) - 1) for place, count in enumerate(total.fill))
        assert least <= total.datagrams <= most
        assert not any(total.fill[4:])  # batches of 8 at most
        assert sum(worker.datagrams for worker in found.workers) == 102
        assert min(worker.datagrams for worker in found.workers) > 0
        until(lambda: standing(folder).unready is None, lambda: service.log)
        assert sorted(worker.restarts for worker in standing(folder).workers) == [0, 1]
        assert [worker.pid for worker in standing(folder).workers] == service.pids(2)
        assert service.stop() == 0


def test_what_waits_and_what_is_dropped_is_known_while_nobody_reads_and_stays_known(folder: Path) -> None:
    sent = 2000
    with Service(folder, "app:handle", "-w", 2) as service:
        service.begun(2)
        pids = service.pids(2)
        with stopped(pids):
            for sender in range(40):
                say(*["x" * 100] * 50, source=f"127.2.0.{sender}")
            found = standing(folder)
            dropped = found.total.kernel_drops
            assert found.total.datagrams == 0
            assert 0 < dropped < sent
            assert sum(worker.kernel_drops for worker in found.workers) == dropped
            for worker in found.workers:
                assert worker.kernel_drops > 0
                assert 0 < worker.queue_bytes <= worker.queue_limit + 4096
        assert settled(folder, sent - dropped).total.handled == sent - dropped
        before = standing(folder).workers
        assert [worker.queue_bytes for worker in before] == [0, 0]
        for wanted in (1, 2):
            assert run(["workers", "scale", str(wanted)]) == 0
            after = standing(folder)
            assert after.total.kernel_drops == dropped
            assert after.total.handled == sent - dropped
        for one, other in zip(before, after.workers, strict=True):
            assert (one.kernel_drops, one.handled, one.fill) == (other.kernel_drops, other.handled, other.fill)
        assert service.stop() == 0


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Processes that do nothing for a while."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run(["workers", *map(str, words)])
    return code, *capsys.readouterr()


def test_stop_says_what_was_lost(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--batch-size", 1, "--graceful-timeout", 0.5, "--timeout", 0)
    with Service(folder, "app:handle", *options) as service:
        service.begun(1)
        say("before", "hang", "after")
        service.noted("before")
        code, out, err = said(capsys, "stop")
        assert (code, out) == (1, "")
        assert err.splitlines()[-1] == "fastrecv: unread queues of workers 0 are lost"
        assert service.process.wait(20) == 1


def test_restart_scale_and_stop_come_back_when_it_is_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Service(folder, "app:handle", "-w", 2) as service:
        service.begun(2)
        before = set(service.pids(2))
        assert said(capsys, "restart") == (
            0, "all workers are new\n", "2 of 2 workers to restart\n1 of 2 workers to restart\n",
        )  # fmt: skip
        assert not before & set(service.pids(2))
        assert [worker.restarts for worker in standing(folder).workers] == [1, 1]
        code, out, err = said(capsys, "scale", 3)
        assert (code, out) == (0, "3 workers\n")
        assert "2 workers, 3 wanted\n" in err
        assert [worker.state for worker in standing(folder).workers] == ["reading"] * 3
        assert said(capsys, "scale", 3) == (0, "3 workers\n", "")
        assert said(capsys, "scale", 1)[:2] == (0, "1 worker\n")
        assert len(standing(folder).workers) == 1
        assert standing(folder).total.deaths == 0
        code, out, err = said(capsys, "stop")
        assert (code, out) == (0, "stopped\n")
        assert "1 of 1 worker to stop\n" in err
        assert service.process.wait(20) == 0
        assert not door(folder).exists()


def test_stop_now_does_not_wait_for_a_hanging_worker(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Service(folder, "app:handle") as service:
        service.begun(1)
        say("hang")
        until(lambda: standing(folder).total.datagrams == 1, lambda: service.log)
        service.send(signal.SIGTERM)
        until(lambda: standing(folder).state == "stopping", lambda: service.log)
        for command in (["restart"], ["scale", 2]):
            code, out, err = said(capsys, *command)
            assert (code, out, one_line(err)) == (1, "", "the service is stopping")
        assert said(capsys, "stop", "--now")[:2] == (0, "stopped\n")
        assert service.process.wait(20) == 0


def test_code_that_cannot_begin_fails_the_restart_and_the_growth(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Service(folder, "app:handle") as service:
        service.begun(1)
        (folder / "app.py").write_text("import nonsense\n")
        code, out, err = said(capsys, "restart")
        assert (code, out) == (1, "")
        assert "No module named 'nonsense'" in err.splitlines()[-1]
        found = standing(folder)
        assert found.unready is None
        assert found.failure is not None
        assert (found.restarting, found.total.deaths) == (0, 1)
        code, out, err = said(capsys, "scale", 2)
        assert (code, out) == (1, "")
        assert one_line(err.splitlines()[-1]).startswith("worker 1 is given up: 'app:handle' cannot be imported")
        assert standing(folder).unready == "worker 1 does not read: it is given up"
        code, out, err = said(capsys, "status")
        assert code == 0
        assert [line.split()[2] for line in out.splitlines()[2:]] == ["reading", "given"]
        assert "worker 1 is given up: 'app:handle' cannot be imported" in err
        assert said(capsys, "scale", 1)[:2] == (0, "1 worker\n")
        assert service.stop() == 0


def test_status_as_json_is_the_whole_record(shared: Service, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "--control", door(shared.folder), "status", "--json")
    found: dict[str, Any] = json.loads(out)
    assert (code, err) == (0, "")
    assert found.keys() == set(Standing.__struct_fields__)
    assert found["pid"] == shared.process.pid
    assert found["workers"][0]["pid"] == shared.pids(1)[0]
    assert found["workers"][0]["reading_seconds"] > 0
    assert len(found["workers"][0]["fill"]) == FILLS


def test_which_service_is_meant(shared: Service, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "status")
    assert (code, out) == (1, "")
    assert one_line(err).startswith(f"no service runs that has its control socket in {folder}, /run/fastrecv: name it")
    code, out, err = said(capsys, "--control", folder / "absent", "stop")
    assert (code, one_line(err)) == (1, f"no service is at {folder / 'absent'}")
    (folder / "notes.sock").write_text("no socket")
    (folder / "other.sock").symlink_to(door(shared.folder))
    assert said(capsys, "status")[0] == 0
    with Service(folder, "app:handle") as service:
        until(lambda: said(capsys, "status")[0] == 1, lambda: service.log)
        code, _, err = said(capsys, "stop")
        where = f"udp {ADDRESS} port {PORT}"
        assert (code, one_line(err)) == (
            1,
            f"2 services run, name one with --control: {door(folder)} ({where}), {folder / 'other.sock'} ({where})",
        )
        assert said(capsys, "--control", door(folder), "stop")[0] == 0
        assert service.process.wait(20) == 0
    assert standing(shared.folder).state == "running"


def test_who_answers_something_else_is_no_service(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(door(folder)))
        listener.listen()
        child = subprocess.Popen([sys.executable, "-c", ANSWER, str(listener.fileno())], pass_fds=[listener.fileno()])
        with pytest.raises(StateError, match="is no service of this version of fastrecv"):
            standing(folder)
        with pytest.raises(StateError, match="has hung up"):
            standing(folder)
        assert child.wait(20) == 0


ANSWER = """
import socket, sys
with socket.socket(fileno=int(sys.argv[1])) as listener:
    for answer in (b"{]", b""):
        client, _ = listener.accept()
        with client:
            client.recv(99)
            client.send(answer) if answer else None
"""
