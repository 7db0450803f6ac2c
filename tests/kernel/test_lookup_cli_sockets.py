"""`fastrecv lookup register`, `register-pid`, `unregister` and `serve`: where sockets come from, and who may."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrecv.netns import Namespace
from tests.kernel.commands import COMMAND, WEB, Command, one_line
from tests.kernel.privileges import CAP_BPF, only
from tests.kernel.steering import TCP, UDP, Stage

HOME = "198.51.100.2"


def registered(command: Command) -> list[tuple[str, str, str, int]]:
    """Label, family, protocol and the number of the sockets, of all that have any."""
    return sorted(
        (row["label"], row["family"], row["protocol"], len(row["sockets"]))
        for row in command("status", "--json").json["destinations"]
        if row["sockets"]
    )


# Inherited descriptors


@pytest.mark.parametrize(
    ("kind", "host", "only6", "said"),
    [
        (TCP, HOME, False, "web ipv4 tcp"),
        (UDP, HOME, False, "web ipv4 udp"),
        (TCP, "2001:db8:7::2", True, "web ipv6 tcp"),
        (UDP, "::", False, "web ipv6 udp, web ipv4 udp"),
    ],
)
def test_an_inherited_socket_is_registered_for_what_it_can_serve(
    loaded: Command, stage: Stage, kind: int, host: str, only6: bool, said: str
) -> None:
    service = stage.serve("service", kind, host, 8008, only6=only6)
    fd = service.fileno()
    assert loaded.done("register", "web", "--fd", fd) == f"registered {said}; nothing is bound yet to {said}\n"
    loaded.done("bind", "web", "any", "198.51.100.0/24", "80")
    loaded.done("bind", "web", "any", "2001:db8:7::/64", "80")
    assert loaded.done("register", "web", "--fd", fd) == f"registered {said}\n"
    for family, asked in (("ipv4", "198.51.100.1"), ("ipv6", "2001:db8:7::1")):
        if family in said:
            assert stage.ask(kind, asked, 80) == "service"


def test_what_a_label_had_goes_unless_the_new_is_added(loaded: Command, stage: Stage) -> None:
    group = [stage.serve(name, TCP, HOME, 8008, reuseport=True) for name in "abc"]
    first, second, third = (member.fileno() for member in group)
    loaded.done("register", "web", "--fd", first, "--fd", second)
    assert registered(loaded) == [("web", "ipv4", "tcp", 2)]
    loaded.done("register", "web", "--fd", third, "--add")
    assert registered(loaded) == [("web", "ipv4", "tcp", 3)]
    loaded.done("register", "web", "--fd", second)
    assert registered(loaded) == [("web", "ipv4", "tcp", 1)]


def test_a_socket_that_packets_cannot_be_steered_to_is_refused_with_the_cure(loaded: Command, stage: Stage) -> None:
    listening, other = stage.serve("a", TCP, HOME, 8008), stage.serve("b", TCP, HOME, 8009)
    deaf, loose = stage.bind(TCP, HOME, 8010), stage.stack.enter_context(socket.socket(socket.AF_INET, UDP))
    foreign = stage.stack.enter_context(socket.socket(socket.AF_UNIX, TCP))
    reading, writing = os.pipe()
    for descriptors, said in (
        ([9999], "descriptor 9999 is not open"),
        ([reading], f"descriptor {reading} is not a socket"),
        ([deaf.fileno()], f"tcp {HOME} port 8010 does not listen: register it after listen()"),
        ([loose.fileno()], "udp 0.0.0.0 port 0 is not bound: register it after bind()"),
        ([foreign.fileno()], "a socket of family AF_UNIX: packets are steered to IPv4 and IPv6 sockets only"),
        (
            [listening.fileno(), other.fileno()],
            f"both tcp {HOME} port 8008 and tcp {HOME} port 8009 would serve 'web': give one of them, or the members "
            "of one reuseport group",
        ),
    ):
        options = [word for fd in descriptors for word in ("--fd", fd)]
        assert loaded.refused("register", "web", *options) == said
    os.close(reading)
    os.close(writing)
    assert registered(loaded) == []


def test_a_socket_of_another_namespace_is_refused(loaded: Command) -> None:
    with contextlib.closing(Namespace()) as other:
        with other, contextlib.ExitStack() as stack:
            sock = stack.enter_context(socket.socket(socket.AF_INET, UDP))
            sock.bind(("127.0.0.1", 8008))
            kept = stack.pop_all()
        with kept:
            said = loaded.refused("register", "web", "--fd", sock.fileno())
    assert said == "udp 127.0.0.1 port 8008 lives in another network namespace: see --netns"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no socket: give --fd, or run as a systemd service with a .socket unit"),
        (("web",), "no socket: give --fd, or run as a systemd service with a .socket unit"),
        (("--fd", "3"), "descriptors have no names: give a label"),
        (("drop", "--fd", "3"), "'drop' is a verdict, not a label: choose another name"),
        (("web", "--fd", "-1"), "-1 is not in the range"),
        (("web", "--fd", str(1 << 31)), "2147483648 is not in the range"),
        (("web", "--fd", "3", "--add", "--to", "/x"), "and replaces what the label had: leave out --add, --netns"),
        (("web", "--fd", "3", "--netns", "/proc/self/ns/net", "--to", "/x"), "with --to the server decides where"),
    ],
)
def test_register_without_what_it_needs_is_a_usage_error(
    loaded: Command, arguments: tuple[str, ...], said: str
) -> None:
    assert said in loaded.misused("register", *arguments)


# systemd


def activated(command: Command, sockets: list[socket.socket], *words: str, **variables: str) -> tuple[int, str, str]:
    """`register` as systemd runs it: the sockets are descriptors 3, 4, ..., LISTEN_PID is the process's own."""
    places = " ".join(f"{3 + number}<&{sock.fileno()}" for number, sock in enumerate(sockets))
    script = f'LISTEN_PID=${{LISTEN_PID:-$$}} exec "$@" {places}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *COMMAND, "lookup", "register", *words, "--bpffs", str(command.bpffs)],
        env=os.environ | {"LISTEN_FDS": str(len(sockets))} | variables, pass_fds=[sock.fileno() for sock in sockets],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "names", "said"),
    [
        ((), "web:dns", "registered web ipv4 tcp\nregistered dns ipv4 udp; nothing is bound yet to dns ipv4 udp\n"),
        ((), "web:web", "registered web ipv4 tcp, web ipv4 udp\n"),
        (("web",), "this:that", "registered web ipv4 tcp, web ipv4 udp\n"),
        (("web",), "", "registered web ipv4 tcp, web ipv4 udp\n"),
    ],
)
def test_sockets_of_a_systemd_unit_are_registered_by_their_names_or_for_one_label(
    loaded: Command, stage: Stage, words: tuple[str, ...], names: str, said: str
) -> None:
    sockets = [stage.serve("service", TCP, HOME, 8008), stage.serve("dns", UDP, HOME, 8053)]
    loaded.done("bind", "web", "any", "198.51.100.0/24", "80")
    assert activated(loaded, sockets, *words, LISTEN_FDNAMES=names) == (0, said, "")
    assert stage.ask(TCP, "198.51.100.1", 80) == "service"


@pytest.mark.parametrize("names", ["", "unknown", "web:unknown"])
def test_sockets_of_a_systemd_unit_without_names_take_a_label(loaded: Command, stage: Stage, names: str) -> None:
    sockets = [stage.serve("service", TCP, HOME, 8008), stage.serve("dns", UDP, HOME, 8053)]
    given = activated(loaded, sockets[: names.count(":") + 1], LISTEN_FDNAMES=names)
    said = "the descriptors have no names: give a label"
    assert given == (2, "", f"fastrecv lookup register: {said} (see fastrecv lookup register --help)\n")
    assert registered(loaded) == []


def test_sockets_that_systemd_meant_for_another_process_are_not_taken(loaded: Command, stage: Stage) -> None:
    service = stage.serve("service", TCP, HOME, 8008)
    code, out, err = activated(loaded, [service], "web", LISTEN_PID="1")
    assert (code, out) == (1, "")
    assert one_line(err).startswith("LISTEN_PID is 1, this is process ")
    assert err.endswith(": the sockets are another's; use exec\n")
    assert registered(loaded) == []


@pytest.mark.parametrize("names", ["web:two words", "web:drop", "web:web2"])
def test_where_one_of_the_passed_sockets_is_refused_none_is_registered(
    loaded: Command, stage: Stage, names: str
) -> None:
    deaf = stage.bind(TCP, HOME, 8010)
    second = deaf if names.endswith("web2") else stage.serve("other", TCP, HOME, 8009)
    code, out, err = activated(loaded, [stage.serve("service", TCP, HOME, 8008), second], LISTEN_FDNAMES=names)
    assert (code, out) == (1, "")
    assert one_line(err)
    assert registered(loaded) == []


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"LISTEN_FDS": "two"}, "LISTEN_FDS is 'two': not a number of descriptors"),
        ({"LISTEN_FDS": "-1"}, "LISTEN_FDS is '-1': not a number of descriptors"),
        ({"LISTEN_FDS": "9999999"}, "LISTEN_FDS is '9999999': not a number of descriptors"),
        ({"LISTEN_FDS": "2", "LISTEN_FDNAMES": "web"}, "LISTEN_FDNAMES names 1 descriptors, LISTEN_FDS says 2"),
        ({"LISTEN_FDS": "1", "LISTEN_FDNAMES": "web:dns"}, "LISTEN_FDNAMES names 2 descriptors, LISTEN_FDS says 1"),
    ],
)
def test_what_systemd_would_not_have_said_is_refused(
    loaded: Command, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert loaded.refused("register") == said


def test_no_passed_socket_is_no_socket(loaded: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "0")
    assert "no socket: give --fd" in loaded.misused("register")
    monkeypatch.delenv("LISTEN_PID")
    assert "LISTEN_PID is not set" in loaded.refused("register")


# Running processes


@contextlib.contextmanager
def holding(*sockets: socket.socket) -> Iterator[subprocess.Popen[str]]:
    """A process that has these sockets and does nothing."""
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        pass_fds=[sock.fileno() for sock in sockets], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "\n"
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("by_file", [False, True], ids=["pid", "pid-file"])
def test_the_sockets_of_a_running_process_are_registered(
    loaded: Command, stage: Stage, tmp_path: Path, by_file: bool
) -> None:
    service = stage.serve("service", TCP, HOME, 8008)
    loaded.done("bind", *WEB)
    with holding(service) as child:
        (tmp_path / "pid").write_text(f"{child.pid}\n")
        process = tmp_path / "pid" if by_file else child.pid
        assert loaded.done("register-pid", process, "web", "tcp", HOME, 8008) == "registered web ipv4 tcp\n"
        assert stage.ask(TCP, "198.51.100.1", 80) == "service"


def test_the_members_of_a_group_count_as_one_and_are_replaced_or_joined(loaded: Command, stage: Stage) -> None:
    group = [stage.serve(name, UDP, HOME, 8053, reuseport=True) for name in "abc"]
    with holding(*group[:2]) as child, holding(group[2]) as other:
        loaded.done("register-pid", child.pid, "dns", "udp", HOME, 8053)
        assert registered(loaded) == [("dns", "ipv4", "udp", 2)]
        loaded.done("register-pid", other.pid, "dns", "udp", HOME, 8053, "--add")
        assert registered(loaded) == [("dns", "ipv4", "udp", 3)]
        loaded.done("register-pid", other.pid, "dns", "udp", HOME, 8053)
        assert registered(loaded) == [("dns", "ipv4", "udp", 1)]


@pytest.mark.parametrize(
    ("protocol", "host", "port"), [("tcp", HOME, 9), ("tcp", "198.51.100.3", 8008), ("udp", HOME, 8008)]
)
def test_a_process_without_such_a_socket_is_refused_with_those_it_has(
    loaded: Command, stage: Stage, protocol: str, host: str, port: int
) -> None:
    with holding(stage.serve("a", TCP, HOME, 8008), stage.serve("b", UDP, "2001:db8:7::2", 53)) as child:
        assert loaded.refused("register-pid", child.pid, "web", protocol, host, port) == (
            f"process {child.pid} has no {protocol} socket on {host} port {port}; it has "
            f"tcp {HOME} port 8008, udp 2001:db8:7::2 port 53"
        )
    with holding() as child:
        said = loaded.refused("register-pid", child.pid, "web", protocol, host, port)
    assert said.endswith("; it has none that could be registered")
    assert registered(loaded) == []


def test_a_process_that_is_this_one_or_has_ended_is_refused(loaded: Command) -> None:
    arguments = ("web", "tcp", HOME, 8008)
    assert loaded.refused("register-pid", os.getpid(), *arguments) == f"{os.getpid()} is this very process"
    with holding() as child:
        pass
    assert loaded.refused("register-pid", child.pid, *arguments) == f"there is no process {child.pid}"


def test_a_process_that_is_not_the_users_to_trace_is_a_missing_privilege(loaded: Command) -> None:
    with holding() as child:
        with only(CAP_BPF):
            said = loaded("register-pid", 1, "web", "tcp", HOME, 8008)
        assert child.poll() is None
    assert (said.code, said.out) == (77, "")
    assert one_line(said.err) == (
        "the sockets of process 1 are not yours to take: that needs CAP_SYS_PTRACE, or its user and all capabilities "
        "that it has"
    )


@pytest.mark.parametrize("content", ["", "0", "-1", "web", "1 2", "9" * 99, "²", "\0\x80"])
def test_what_holds_no_process_id_is_a_usage_error(loaded: Command, tmp_path: Path, content: str) -> None:
    (tmp_path / "pid").write_text(content, encoding="latin-1")
    said = loaded.misused("register-pid", tmp_path / "pid", "web", "tcp", HOME, "8008")
    assert said.endswith(f"'{tmp_path}/pid' holds no process id")
    (tmp_path / "pid").unlink()
    said = loaded.misused("register-pid", tmp_path / "pid", "web", "tcp", HOME, "8008")
    assert said.endswith("is no process id, nor a file that holds one: No such file or directory")


# Unregister


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ((), ["web ipv4 tcp", "web ipv4 udp", "web ipv6 udp"]),
        (("--family", "ipv4"), ["web ipv4 tcp", "web ipv4 udp"]),
        (("--family", "ipv6"), ["web ipv6 udp"]),
        (("--protocol", "udp"), ["web ipv4 udp", "web ipv6 udp"]),
        (("--protocol", "tcp", "--family", "ipv4"), ["web ipv4 tcp"]),
    ],
)
def test_sockets_of_a_label_are_forgotten_by_family_and_protocol(
    loaded: Command, stage: Stage, options: tuple[str, ...], gone: list[str]
) -> None:
    loaded.done("bind", *WEB)
    tcp, udp = stage.serve("a", TCP, HOME, 8008), stage.serve("b", UDP, "::", 8009)
    for label in ("web", "kept"):
        loaded.done("register", label, "--fd", tcp.fileno(), "--fd", udp.fileno())
    said = loaded.done("unregister", "web", *options)
    assert sorted(said.removeprefix("unregistered ").strip().split(", ")) == gone
    assert {" ".join(row[:3]) for row in registered(loaded) if row[0] == "web"} == {
        "web ipv4 tcp", "web ipv4 udp", "web ipv6 udp"
    } - set(gone)  # fmt: skip
    assert len([row for row in registered(loaded) if row[0] == "kept"]) == 3
    assert loaded("bindings", "--json").json["bindings"][0]["label"] == "web", "its bindings stay"
    assert loaded.refused("unregister", "web", *options) == "no socket is registered there for 'web'"


# Handed over


def test_a_socket_is_handed_over_to_a_server_which_ends_when_told(
    loaded: Command, stage: Stage, tmp_path: Path
) -> None:
    path = tmp_path / "door"
    service = stage.serve("service", TCP, HOME, 8008)
    arguments = ("register", "web", "--fd", service.fileno(), "--to", path)
    hint = f"start `fastrecv lookup serve {path}`"
    assert loaded.refused(*arguments) == f"nobody serves {path} (No such file or directory): {hint}"
    loaded.done("bind", *WEB)
    with loaded.process("serve", path) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "no --owner was given: root alone may register\n"
            assert server.stdout.readline() == f"serving {path}\n"
            assert loaded.done(*arguments) == "registered web ipv4 tcp\n"
            assert registered(loaded) == [("web", "ipv4", "tcp", 1)]
            with loaded.process("serve", path) as second:
                out, err = second.communicate(timeout=30)
            assert (second.returncode, out) == (1, "")
            assert f"{path} is served already, by process {server.pid}: stop it" in one_line(err)
            server.send_signal(signal.SIGTERM)
            out, err = server.communicate(timeout=30)
        finally:
            server.kill()
    assert (server.returncode, err) == (0, "")
    assert "stopped" in out.splitlines()


@pytest.mark.parametrize(
    ("owner", "said"),
    [
        ("web", "'web': give LABEL=USER"),
        ("web=no-such-user", "there is no user 'no-such-user'"),
        ("drop=root", "'drop' is a verdict, not a label"),
    ],
)
def test_an_owner_is_a_label_and_a_user(loaded: Command, owner: str, said: str) -> None:
    assert said in loaded.misused("serve", "/nonexistent/door", "--owner", owner)
