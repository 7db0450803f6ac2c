"""What each command needs, as the README says it: with just that it works, and with anything less it does not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastrecv.cli.main import run
from fastrecv.netns import Namespace
from tests.kernel.privileges import (
    CAP_BPF,
    CAP_CHOWN,
    CAP_FSETID,
    CAP_NET_ADMIN,
    CAP_SYS_ADMIN,
    CAP_SYS_PTRACE,
    as_user,
    only,
)
from tests.kernel.steering import TCP, Stage

GROUP, MEMBER, STRANGER = 65532, 65533, 65534
BINDING = ("web", "tcp", "198.51.100.0/24", "80")
Command = Callable[..., int]


@pytest.fixture
def command(stage: Stage, bpffs: Path) -> Command:
    def call(*words: object) -> int:
        return run(["lookup", *map(str, words), "--bpffs", str(bpffs)])

    return call


@pytest.fixture
def loaded(command: Command) -> Iterator[None]:
    with only(CAP_CHOWN, CAP_FSETID, *LOAD):
        assert command("load", "--group", GROUP) == 0
    assert command("bind", *BINDING) == 0
    yield
    with contextlib.suppress(OSError):
        command("unload")


def needs(command: Command, capabilities: set[int], *words: object, undo: tuple[object, ...] = ()) -> None:
    """The command works with these capabilities, and with none of them missing."""
    for missing in capabilities:
        with only(*capabilities - {missing}):
            assert command(*words) == 77, f"{words[0]} works without capability {missing}"
    with only(*capabilities):
        assert command(*words) == 0
    if undo:
        assert command(*undo) == 0


LOAD = {CAP_BPF, CAP_NET_ADMIN}
CHANGE = {CAP_BPF}


def by(user: int, group: int, command: Command, words: tuple[str, ...], said: Path) -> int:
    """The exit code of a command of another user; what it printed is in `said`."""
    file = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)

    def action() -> int:
        with (
            os.fdopen(file, "w") as text,
            contextlib.redirect_stdout(text),
            contextlib.redirect_stderr(text),
        ):
            return command(*words)

    _, status = os.waitpid(as_user(user, group, action), 0)
    os.close(file)
    return os.waitstatus_to_exitcode(status)


def test_loading_takes_two_capabilities_and_unloading_none_and_what_fails_leaves_nothing(
    command: Command, bpffs: Path
) -> None:
    for missing in LOAD:
        with only(*LOAD - {missing}):
            assert command("load") == 77
        assert list((bpffs / "fastrecv").iterdir()) == []
    needs(command, LOAD, "load")
    needs(command, set(), "unload")
    assert list((bpffs / "fastrecv").iterdir()) == []


@pytest.mark.usefixtures("loaded")
def test_changing_bindings_takes_one_capability(command: Command, tmp_path: Path) -> None:
    needs(command, CHANGE, "bind", "dns", "udp", "198.51.100.0/24", "53")
    needs(command, CHANGE, "unbind", "dns", "udp", "198.51.100.0/24", "53")
    needs(command, CHANGE, "upgrade")
    file = tmp_path / "rules.json"
    file.write_text(json.dumps({"bindings": [{"label": "a", "protocol": "udp", "prefix": "::/0", "port": "any"}]}))
    needs(command, set(), "load-bindings", file, "--dry-run")
    needs(command, CHANGE, "load-bindings", file)


@pytest.mark.usefixtures("loaded")
def test_registering_takes_no_capability_where_the_label_is_bound_and_cap_bpf_where_not(
    command: Command, stage: Stage
) -> None:
    server = stage.serve("server", TCP, "198.51.100.1", 8080)
    needs(command, set(), "register", "web", "--fd", server.fileno())
    assert stage.ask(TCP, "198.51.100.9", 80) == "server"
    needs(command, set(), "unregister", "web")
    needs(command, {CAP_BPF}, "register", "new", "--fd", server.fileno(), undo=("unregister", "new"))


@pytest.mark.usefixtures("loaded")
def test_sockets_of_another_users_process_take_the_capability_to_trace_it(command: Command, stage: Stage) -> None:
    stage.serve("server", TCP, "198.51.100.1", 8080)

    def wait() -> int:
        os.write(told, b"!")
        signal.pause()
        return 0

    heard, told = os.pipe()
    process = as_user(STRANGER, STRANGER, wait)
    try:
        assert os.read(heard, 1) == b"!"
        needs(command, {CAP_SYS_PTRACE}, "register-pid", process, "web", "tcp", "198.51.100.1", "8080")
        assert stage.ask(TCP, "198.51.100.9", 80) == "server"
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(heard)
        os.close(told)


@pytest.mark.usefixtures("loaded")
def test_another_namespace_takes_a_capability_that_includes_the_others(command: Command, stage: Stage) -> None:
    path = f"/proc/self/fd/{stage.namespace.fd}"
    with contextlib.closing(Namespace()) as elsewhere, elsewhere:
        needs(command, {CAP_SYS_ADMIN}, "status", "--netns", path)
        needs(command, {CAP_SYS_ADMIN}, "bind", "dns", "udp", "198.51.100.0/24", "53", "--netns", path)


EXPLAIN = ("explain", "tcp", "203.0.113.1", "198.51.100.9:80")
READS = [("status",), ("status", "--json"), ("bindings",), ("metrics",), EXPLAIN]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("words", READS, ids=" ".join)
def test_reading_takes_no_capability(command: Command, words: tuple[str, ...]) -> None:
    needs(command, set(), *words)


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("words", READS, ids=" ".join)
def test_members_of_the_group_read_and_change_nothing_and_strangers_do_not_read(
    command: Command, words: tuple[str, ...], tmp_path: Path
) -> None:
    said = tmp_path / "said"
    assert by(MEMBER, GROUP, command, words, said) == 0
    assert "web" in said.read_text()
    assert by(STRANGER, STRANGER, command, words, said) == 77
    assert "permission denied" in said.read_text()
    assert len(said.read_text().splitlines()) == 1
    for change in (("bind", *BINDING), ("unload",), ("unregister", "web")):
        assert by(MEMBER, GROUP, command, change, said) == 77
        assert len(said.read_text().splitlines()) == 1


@pytest.mark.usefixtures("loaded")
def test_to_explain_by_interface_takes_one_capability(command: Command) -> None:
    needs(command, CHANGE, *EXPLAIN, "--interface", "lo")
