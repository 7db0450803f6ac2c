"""`fastrecv watch`: its lines, its tables, its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import IO

import pytest

from fastrecv.netns import Namespace
from fastrecv.sockets import drops
from fastrecv.steerable import cookie_of
from fastrecv.watching import Document
from tests.kernel.commands import COMMAND, Command, one_line
from tests.kernel.privileges import CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN, only
from tests.kernel.steering import PORT, TCP, UDP, Stage

HOST, OTHER = "198.51.100.1", "198.51.100.2"
Watching = subprocess.Popen[str]


@contextlib.contextmanager
def running(*arguments: object) -> Iterator[Watching]:
    """The command as a process of its own, in the thread's namespace."""
    words = [*COMMAND, "watch", *map(str, arguments)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: Watching, wanted: Callable[[str], bool]) -> list[str]:
    """The lines that it prints, up to the first that is wanted."""
    found = []
    for line in out(process):
        found.append(line.rstrip("\n"))
        if wanted(line):
            return found
    raise AssertionError(f"ended without that line: {found}")


def out(process: Watching) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def ended(process: Watching, number: signal.Signals) -> tuple[int, str, str]:
    process.send_signal(number)
    rest, complaint = process.communicate(timeout=10)
    return process.returncode, rest, complaint


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_json_lines_come_as_it_happens_until_it_is_stopped(stage: Stage, number: signal.Signals) -> None:
    server = stage.serve("server", UDP, HOST, PORT, reuseport=True)
    with running("--json", "--every", 60) as process:
        (group,) = map(json.loads, read_until(process, lambda line: '"group"' in line))
        assert (group["protocol"], group["address"], group["port"]) == ("udp", HOST, PORT)
        (member,) = group["members"]
        assert (member["cookie"], member["index"], member["queue"]) == (cookie_of(server), 0, 0)
        assert [one["pid"] for one in member["processes"]] == [os.getpid()]
        client = stage.bind(UDP, OTHER, 4242)
        client.sendto(b"x", (HOST, PORT + 1))
        (drop,) = map(json.loads, read_until(process, lambda line: '"drop"' in line))
        assert (drop["reason"], drop["source"], drop["source_port"]) == ("NO_SOCKET", OTHER, 4242)
        listener = stage.serve("listener", TCP, HOST, PORT)
        (state,) = map(json.loads, read_until(process, lambda line: '"state"' in line))
        assert (state["old"], state["new"], state["pid"]) == ("CLOSE", "LISTEN", os.getpid())
        assert state["cookie"] == cookie_of(listener)
        assert ended(process, number) == (0, "", "")


def test_lines_for_people_say_who_and_why(stage: Stage) -> None:
    server = stage.serve("server", UDP, HOST, PORT, reuseport=True)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    six = stage.serve("six", TCP, "2001:db8:7::1", PORT)
    client = stage.bind(UDP, OTHER, 4242)
    with running("--every", 60, "--port", PORT) as process:
        lines = read_until(process, lambda line: line.startswith("udp"))
        assert lines[0] == f"watching port {PORT}; ^C ends it"
        assert lines[2].split() == [
            "group", "id", "members", "program", "index", "socket", "state", "queue", "limit", "drops", "processes",
        ]  # fmt: skip
        where, *cells = lines[3].split("  ")
        words = [cell.strip() for cell in cells if cell]
        limit = f"{server.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF):,}"
        assert where == f"udp {HOST}:{PORT}"
        assert words[1:9] == ["1/128", "-", "0", f"sk:{cookie_of(server):x}", "UNCONN", "0", limit, "0"]
        assert words[9].startswith(f"{os.getpid()} ")
        while drops(server) == 0:
            client.sendto(bytes(500), (HOST, PORT))
        with stage.bind(TCP, "2001:db8:7::2", 4242) as connecting:
            connecting.connect(("2001:db8:7::1", PORT))
            six.accept()[0].close()
        lines = read_until(process, lambda line: "CLOSE_WAIT" in line)
        code, _, complaint = ended(process, signal.SIGINT)
    assert (code, complaint) == (0, "")
    events = [line.split("  ")[1:] for line in lines if line]
    lost = [event for event in events if event[0] == "udp"]
    assert lost == [
        ["udp", f"{OTHER}:4242 -> {HOST}:{PORT}", "dropped: SOCKET_RCVBUFF (the socket's queue is full)",
         f"sk:{cookie_of(server):x}"]
    ]  # fmt: skip
    ways = [event[1:3] for event in events if event[0] == "tcp"]
    assert ["[2001:db8:7::2]:4242 -> [2001:db8:7::1]:7007", "CLOSE -> SYN_SENT"] in ways
    assert ["[2001:db8:7::1]:7007 -> [2001:db8:7::2]:4242", "SYN_RECV -> ESTABLISHED"] in ways


def test_groups_are_shown_anew_every_so_often_until_the_time_is_over(stage: Stage, lookup: Command) -> None:
    first = stage.serve("first", UDP, HOST, PORT, reuseport=True)
    stage.serve("elsewhere", UDP, HOST, PORT + 1, reuseport=True)
    first.setblocking(False)
    said = lookup.bare("watch", "--seconds", 1.5, "--every", 0.1, "--json", "--port", PORT)
    assert (said.code, said.err) == (0, "")
    seen: list[Document] = [json.loads(line) for line in said.out.splitlines()]
    assert {(one["event"], one["port"]) for one in seen} == {("group", PORT)}
    assert 2 <= len(seen) <= 16
    shares = [one["members"][0]["processes"][0]["cpu_percent"] for one in seen]
    assert shares[0] is None
    assert all(share >= 0 for share in shares[1:])


def test_another_namespace_is_watched_from_here(stage: Stage, lookup: Command) -> None:
    stage.serve("here", UDP, HOST, PORT, reuseport=True)
    with closing(Namespace()) as other:
        with other:
            there = stage.bind(UDP, "127.0.0.1", PORT, reuseport=True)
        path = f"/proc/{os.getpid()}/fd/{other.fd}"
        said = lookup.bare("watch", "--seconds", 0.1, "--json", "--netns", path)
    (group,) = map(json.loads, said.out.splitlines())
    assert group["group"] == cookie_of(there)


def test_what_is_missing_is_said_in_one_line(stage: Stage, lookup: Command) -> None:
    with only(CAP_BPF, CAP_PERFMON):
        assert lookup.bare("watch", "--seconds", 0.1).code == 0
    with only(CAP_BPF):
        said = lookup.bare("watch")
    assert (said.code, said.out) == (77, "")
    assert one_line(said.err) == ("reading reuseport groups needs CAP_BPF and CAP_PERFMON: run as root, or grant them")
    with only(CAP_BPF, CAP_PERFMON):
        said = lookup.bare("watch", "--netns", "/proc/1/ns/net")
    assert said.code == 77
    with only(CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN):
        assert lookup.bare("watch", "--seconds", 0.1, "--netns", "/proc/self/ns/net").code == 0


@pytest.mark.parametrize(
    "words",
    [("--port", 0), ("--port", 65536), ("--seconds", 0), ("--seconds", "x"), ("--every", 0), ("--netns", "/dev/null")],
)
def test_words_that_make_no_sense_are_refused(lookup: Command, words: tuple[object, ...]) -> None:
    said = lookup.bare("watch", *words)
    assert (said.code, said.out) == (2, "")
    (line,) = said.err.splitlines()
    assert line.startswith("fastrecv watch: ")


def test_who_stops_reading_ends_it(stage: Stage) -> None:
    stage.serve("server", UDP, HOST, PORT, reuseport=True)
    with running("--json", "--every", 0.1) as process:
        out(process).readline()
        out(process).close()
        assert process.wait(10) == 1
        assert process.stderr is not None
        assert process.stderr.read() == ""
