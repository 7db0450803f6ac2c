"""`fastrecv listen` and `fastrecv connect` on loopback: what one says of a client, the other says, too."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from fastrecv.cli.main import run
from tests.listeners import listening

COMMAND = (sys.executable, "-m", "fastrecv")
protocols = pytest.mark.parametrize("protocol", ["tcp", "udp"])


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM, host: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])


def connected(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert run(["connect", *map(str, words), "--json"]) == code
    said = capsys.readouterr()
    assert said.err == ""
    return sorted((json.loads(line) for line in said.out.splitlines()), key=lambda found: int(found["client"]))


def printed(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    capsys.readouterr()
    assert run([*map(str, words)]) == code
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


@pytest.fixture
def other() -> Iterator[socket.socket]:
    """A TCP server that is not ours."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        yield server


# Who got what


@protocols
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_both_sides_tell_the_same_of_every_client(protocol: str, host: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"{host}:{free_port()}"
    with listening(protocol, where) as listener:
        assert [slot["slot"] for slot in listener.slots] == [0, 1, 2]
        assert {slot["pid"] for slot in listener.slots} == {listener.process.pid}
        assert len({slot["cookie"] for slot in listener.slots} | {slot["fd"] for slot in listener.slots}) == 6
        clients = connected(
            capsys, protocol, where, "--clients", 40, "--source-port", 20_000, "--payload", "hex:00ff7f"
        )
        listener.end()
    events = listener.events("connection" if protocol == "tcp" else "datagram")
    by_source = {event["source"]["port"]: event for event in events}
    assert len(by_source) == len(events) == len(clients) == 40
    for client in clients:
        event = by_source[client["source"]["port"]]
        assert client["server"] == {"slot": event["slot"], "pid": listener.process.pid}
        assert (client["source"], client["destination"]) == (event["source"], event["destination"])
        assert client["sent"] == event["bytes"] == 3
        assert client["failure"] is None
        assert client["answer_ms"] > 0
        if protocol == "tcp":
            assert client["connect_ms"] > 0
            assert 0 <= event["first_byte_ms"] <= event["open_ms"]
            assert (event["ended"], event["in_syn"]) == ("closed", False)
        else:
            assert client["connect_ms"] is None
            assert event["queued_ms"] >= 0
    assert listener.served == [sum(event["slot"] == slot for event in events) for slot in range(3)]
    assert {found["lost"] for found in listener.events("summary")} == {0}


@protocols
def test_a_dual_stack_listener_says_ipv4_addresses_as_such(protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    with listening(protocol, f"[::]:{port}", listeners=1) as listener:
        assert listener.slots[0]["address"] == "::"
        (client,) = connected(capsys, protocol, f"127.0.0.1:{port}")
        listener.end()
    (event,) = listener.events("connection" if protocol == "tcp" else "datagram")
    assert event["source"] == client["source"]
    assert event["destination"] == {"host": "127.0.0.1", "port": port}


@protocols
def test_sources_ports_and_payloads_go_round(protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    where, first = f"127.0.0.1:{free_port()}", free_port() // 2 + 1024
    words = ["--clients", 5, "--source", "127.0.2.0/30", "--source", "127.0.3.9", "--source-port", first]
    with listening(protocol, where) as listener:
        clients = connected(capsys, protocol, where, *words, "--payload", "one", "--payload", "hex:", "--payload", "é")
        listener.end()
    hosts = ["127.0.2.1", "127.0.2.2", "127.0.3.9", "127.0.2.1", "127.0.2.2"]
    assert [client["source"] for client in clients] == [
        {"host": host, "port": first + number} for number, host in enumerate(hosts)
    ]
    assert [client["sent"] for client in clients] == [3, 0, 2, 3, 0]
    assert all(client["server"] for client in clients)
    assert sum(found["bytes"] for found in listener.events("summary")) == 8


@protocols
def test_a_thousand_clients_at_once(protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"127.0.0.1:{free_port()}"
    with listening(protocol, where, "--quiet") as listener:
        clients = connected(capsys, protocol, where, "--clients", 1000)
        listener.end(signal.SIGTERM)
    slots = Counter(client["server"]["slot"] for client in clients)
    assert listener.served == [slots[slot] for slot in range(3)]
    assert listener.said == listener.events("summary")


@protocols
def test_listening_ends_by_itself(protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"127.0.0.1:{free_port()}"
    with listening(protocol, where, "--count", 2) as listener:
        connected(capsys, protocol, where)
        assert listener.process.poll() is None
        connected(capsys, protocol, where)
        listener.end(None)
    assert sum(listener.served) == 2
    with listening(protocol, where, "--seconds", 0.1) as listener:
        listener.end(None)
    assert listener.served == [0, 0, 0]


def test_what_people_see(capsys: pytest.CaptureFixture[str]) -> None:
    where = f"127.0.0.1:{free_port()}"
    listener = subprocess.Popen([*COMMAND, "listen", "udp", where, "--count", "2"], stdout=subprocess.PIPE, text=True)
    with listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == f"process {listener.pid}: 1 socket on udp {where}; stop with Ctrl-C\n"
        while listener.stdout.readline().split()[:1] != ["time"]:
            assert listener.poll() is None
        lines = printed(capsys, "connect", "udp", where, "--clients", 2, "--payload", "a", "--payload", "hex:00")
        told = listener.stdout.read().splitlines()
    assert listener.returncode == 0
    head, *clients, empty, slots, zero, total = lines.splitlines()
    assert head.split() == ["client", "from", "to", "slot", "pid", "bytes", "answer", "ms", "payload"]
    assert sorted(line.split()[0::8] for line in clients) == [["0"], ["1"]]
    assert sorted(line.split()[-1] for line in clients) == ["a", "hex:00"]
    assert (empty, slots.split(), zero.split(), total) == (
        "", ["slot", "pid", "clients", "sources"], ["0", str(listener.pid), "2", "1"], "2 of 2 answered"
    )  # fmt: skip
    assert [line.split()[1:3] for line in told[:2]] == [["0", line.split()[1]] for line in sorted(clients)]
    assert [line.split() for line in told[2:]] == [
        [], ["slot", "datagrams", "bytes", "senders", "lost"], ["0", "2", "2", "1", "0"]
    ]  # fmt: skip


# What goes wrong


@protocols
def test_refused(protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    clients = connected(capsys, protocol, f"127.0.0.1:{free_port()}", "--clients", 2, code=1)
    assert [(client["failure"], client["server"]) for client in clients] == [("refused", None)] * 2
    said = printed(capsys, "connect", protocol, f"127.0.0.1:{free_port()}", code=1)
    assert said.splitlines()[1].endswith("  refused")
    assert said.splitlines()[-1] == "0 of 1 answered, 1 refused"


def test_no_answer(other: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"127.0.0.1:{other.getsockname()[1]}"
    (client,) = connected(capsys, "tcp", where, "--timeout", 0.2, code=1)
    assert client["failure"] == "timed out: no answer in 0.2 s"
    with socket.socket(type=socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        (client,) = connected(capsys, "udp", f"127.0.0.1:{silent.getsockname()[1]}", "--timeout", 0.2, code=1)
    assert client["failure"] == "timed out: no answer in 0.2 s"


@pytest.mark.parametrize(
    ("answer", "failure"),
    [(b"220 example.org\r\n", None), (b"short", None), (b"x" * 5000, None), (b"", "closed without an answer")],
)
def test_servers_of_other_kinds(
    answer: bytes, failure: str | None, other: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve() -> None:
        with other.accept()[0] as accepted:
            accepted.recv(99)
            accepted.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    where = f"127.0.0.1:{other.getsockname()[1]}"
    (client,) = connected(capsys, "tcp", where, code=0 if failure is None else 1)
    thread.join()
    assert (client["server"], client["failure"], client["received"]) == (None, failure, len(answer))


def test_a_server_that_resets(other: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    def serve() -> None:
        with other.accept()[0] as accepted:
            accepted.recv(1, socket.MSG_PEEK)  # and leaves it unread

    thread = threading.Thread(target=serve)
    thread.start()
    (client,) = connected(capsys, "tcp", f"127.0.0.1:{other.getsockname()[1]}", code=1)
    thread.join()
    assert client["failure"] == "reset"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("connect tcp 127.0.0.1", "no port: give ADDRESS:PORT, or [ADDRESS]:PORT for IPv6"),
        ("connect tcp [::1]:0", "no port: give"),
        ("connect tcp localhost:80", "'localhost:80' is no IP address"),
        ("connect sctp 127.0.0.1:7", "'sctp' is not one of 'tcp', 'udp', 'fast-open'"),
        ("connect tcp 127.0.0.1:7 --clients 0", "0 is not in the range 1<=x<=1000"),
        ("connect tcp 127.0.0.1:7 --clients 1001", "1001 is not in the range 1<=x<=1000"),
        ("connect tcp 127.0.0.1:7 --source ::1", "127.0.0.1 is IPv4: give sources of the same IP version"),
        ("connect tcp [::1]:7 --source 127.0.0.1", "::1 is IPv6: give sources of the same IP version"),
        ("connect tcp 127.0.0.1:7 --source 127.0.0.1/8", "127.0.0.0/8 is the prefix"),
        ("connect tcp 127.0.0.1:7 --source-port 65535 --clients 2", "2 clients from port 65535 on go beyond 65535"),
        ("connect tcp 127.0.0.1:7 --payload hex:0", "'hex:0' is no row of bytes in hexadecimal digits"),
        (f"connect tcp 127.0.0.1:7 --payload {'x' * 1401}", "1,401 bytes: give 1,400 at most"),
        (f"connect tcp 127.0.0.1:7 --payload hex:{'00' * 1401}", "1,401 bytes: give 1,400 at most"),
        ("connect fast-open 127.0.0.1:7 --payload hex:", "an empty payload cannot go with a SYN"),
        ("connect tcp 127.0.0.1:7 --timeout 0", "not in the range"),
        ("listen tcp 127.0.0.1", "no port: give"),
        ("listen 127.0.0.1:7", "'127.0.0.1:7' is not one of 'tcp', 'udp'"),
        ("listen udp 127.0.0.1:7 --fast-open", "--fast-open is for tcp"),
        ("listen udp 127.0.0.1:7 --listeners 129", "129 is not in the range 1<=x<=128"),
        ("listen udp 127.0.0.1:7 --seconds 0", "not in the range"),
        ("listen udp 127.0.0.1:7 --count 0", "not in the range"),
        ("listen udp 127.0.0.1:7 --netns /dev/null", "'/dev/null' is no network namespace"),
    ],
)
def test_wrong_words(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words.split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert message in line
    assert line.endswith(" --help)")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("connect tcp 127.0.0.1:7 --source 203.0.113.7", "203.0.113.7 is not an address of this host: ip addr add"),
        ("connect udp [::1]:7 --source 2001:db8:ffff::7", "2001:db8:ffff::7 is not an address of this host: ip addr"),
        ("listen udp 203.0.113.7:7007", "203.0.113.7 is not an address of this host: ip addr add 203.0.113.7 dev lo"),
        ("listen tcp [2001:db8:ffff::7]:7007", "2001:db8:ffff::7 is not an address of this host: ip addr add"),
    ],
)
def test_addresses_of_others(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words.split()) == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert message in line


@protocols
def test_a_port_that_is_taken(protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(type=kind) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        reason = "it is in use by a program that does not share it (SO_REUSEPORT), or by another user's"
        assert run(["listen", protocol, f"127.0.0.1:{port}"]) == 1
        assert capsys.readouterr() == ("", f"fastrecv: cannot bind to 127.0.0.1 port {port}: {reason}\n")
        words = ["connect", protocol, "127.0.0.1:7", "--source", "127.0.0.1", "--source-port", str(port)]
        assert run(words) == 1
        assert capsys.readouterr() == ("", f"fastrecv: cannot bind to 127.0.0.1 port {port}: {reason}\n")


@pytest.mark.parametrize("words", ["connect tcp 127.0.0.1:7 --clients 1000", "listen tcp 127.0.0.1:7007",
                                   "listen udp 127.0.0.1:7007 --listeners 128"])  # fmt: skip
def test_too_few_descriptors(words: str) -> None:
    said = subprocess.run(
        ["sh", "-c", f"ulimit -n 200; exec {' '.join(COMMAND)} {words}"], capture_output=True, text=True, check=False,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (said.returncode, said.stdout) == (1, "")
    assert "descriptors, this process may have 200: ulimit -n " in said.stderr
