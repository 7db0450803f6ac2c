"""What workers do to their group without any privilege, and what the supervisor, which has none either, puts back."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from fastrecv.balance import Balancer
from fastrecv.classic import Filter
from fastrecv.groups import CLASSIC, Lookout, program_of
from fastrecv.netns import Namespace
from fastrecv.policies import Policy
from fastrecv.reuseport import attach, detach
from fastrecv.steerable import cookie_of, listens
from fastrecv.workers.guarding import Guard
from fastrecv.workers.steering import Steering
from tests.kernel.groups import attach as attach_classic
from tests.kernel.privileges import only
from tests.kernel.steering import PORT, TCP, UDP, Stage, kinds
from tests.kernel.supervising import Service, namespace, say, status

SO_LOCK_FILTER = 44  # include/uapi/asm-generic/socket.h
HOST = "198.51.100.1"
LOG = logging.getLogger("guard under test")
NAMES = tuple(str(number) for number in range(30))

TRAITOR = """
import ctypes, os, signal, socket, time
from pathlib import Path
from fastrecv.bpf import Program
from fastrecv.classic import Filter
from fastrecv.policies import Policy
from fastrecv.reuseport import attach, detach

def serve(sockets):
    (sock,) = sockets
    while True:
        word = sock.recv(99).decode()
        if word == "detach":
            detach(sock)
        if word == "classic":
            Filter(Policy.parse("source"), 1).attach(sock)
        if word == "attach":
            with Program.open({program!r}) as program:
                attach(sock, program)
        if word in ("connect", "disconnect"):
            time.sleep(0.1)  # until more is queued
            sock.connect(("127.0.0.1", 9))
        if word == "disconnect":
            ctypes.CDLL(None).connect(sock.fileno(), bytes(16), 16)  # AF_UNSPEC
        with Path({folder!r}, "notes").open("a") as file:
            file.write(f"{{os.getpid()}} {{word}}\\n")
"""
"""Undoes its group as datagrams say; with {folder} and {program}, the pin of another one."""


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


def traitor(folder: Path, program: Path) -> str:
    (folder / "traitor.py").write_text(TRAITOR.format(folder=str(folder), program=str(program)))
    return "traitor:serve"


class Senders:
    """Who says each word to a service, and which workers have noted it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._said: list[str] = []

    def say(self, *words: str, source: str) -> None:
        say(*words, source=source)
        self._said += words
        self._service.noted(*self._said)

    def owners(self) -> Mapping[str, int]:
        """Say one word each; the process that noted it."""
        before = len(self._service.notes())
        for name in NAMES:
            say(name, source=f"127.2.0.{name}")
        self._said += NAMES
        self._service.noted(*self._said)
        return {name: pid for pid, name in self._service.notes()[before:]}


def test_whatever_program_a_worker_gives_the_group_the_supervisor_puts_its_own_back(
    ns: Namespace, bpffs: Path, tmp_path: Path
) -> None:
    with Balancer(Policy.parse("source"), size=1) as other:
        other.maps.program.pin(bpffs / "other")
        number = other.maps.program.info.id
    with Service(tmp_path, traitor(tmp_path, bpffs / "other"), "-w", 3) as service:
        service.begun(3)
        assert int(status(service.process.pid)["CapEff"], 16) == 0
        senders = Senders(service)
        before = senders.owners()
        assert len(set(before.values())) == 3
        found = {"detach": "no program", "classic": "a classic program", "attach": f"program {number}"}
        for word, said in found.items():
            senders.say(word, source="127.2.0.1")
            service.says(f"the group had {said} in the place of its own, which is put back")
            assert senders.owners() == before
        assert service.stop() == 0


def test_who_connects_his_socket_gets_another_and_his_queue_is_read_to_its_end(
    ns: Namespace, bpffs: Path, tmp_path: Path
) -> None:
    with Service(tmp_path, traitor(tmp_path, bpffs / "none"), "-w", 2, bind="0.0.0.0:2055") as service:
        service.begun(2)
        senders = Senders(service)
        before = senders.owners()
        for turn, (word, why) in enumerate([
            ("connect", "it was connected by its worker"),
            ("disconnect", "its worker has connected it, or bound it to an interface"),
        ]):  # fmt: skip
            senders.say(word, f"after the {word}", f"long after the {word}", source="127.2.0.1")
            service.says(rf"worker [01] has left the group for good: {why}")
            service.begun(3 + turn)
            after = senders.owners()
            moved = {name for name in NAMES if after[name] != before[name]}
            assert moved == {name for name in NAMES if before[name] == before["1"]}
            assert len(set(after.values())) == 2
            before = after
        assert service.log.count("has left the group") == 2
        assert service.stop() == 0


# The guard alone, on sockets of the test's own


def members(stage: Stage, kind: int, count: int = 2) -> dict[int, socket.socket]:
    return {slot: stage.serve(str(slot), kind, HOST, PORT, reuseport=True) for slot in range(count)}


def lookout(kind: int) -> Lookout:
    return Lookout(socket.IPPROTO_TCP if kind == TCP else socket.IPPROTO_UDP, PORT)


def balanced(group: Mapping[int, socket.socket]) -> Balancer:
    made = Balancer.best(Policy.parse("source"), list(group.values()))
    assert isinstance(made, Balancer)
    return made


def looked(by: Balancer | Filter, found: Mapping[int, socket.socket], seen: Lookout | None) -> Guard:
    """One that has looked once, found all members well, and had no privilege."""
    guard = Guard(seen, LOG)
    with only():
        assert guard.look(by, found) == []
        assert guard.look(by, found) == []  # too early
    return guard


@kinds
def test_a_classic_program_is_put_back_but_for_another_classic_one(stage: Stage, kind: int) -> None:
    group = members(stage, kind)
    ours = Filter(Policy.parse("source"), 2)
    ours.attach(group[0])
    with lookout(kind) as seen:
        assert looked(ours, group, seen).repairs.put_back == 0
        detach(group[1])
        assert looked(ours, group, seen).repairs.put_back == 1
        assert program_of(group[0]) == CLASSIC
        with Balancer(Policy.parse("source"), size=2) as other:
            attach(group[1], other.maps.program)
            assert looked(ours, group, seen).repairs.put_back == 1
        assert program_of(group[0]) == CLASSIC
        attach_classic(group[0], Filter(Policy.parse("destination"), 2).instructions)
        assert looked(ours, group, seen).repairs.put_back == 0
        detach(group[1])
        assert looked(ours, group, None).repairs.put_back == 0
        assert program_of(group[0]) is None


def test_locked_filters_of_some_members_hinder_nobody(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    group = members(stage, UDP)
    with balanced(group) as ours, lookout(UDP) as seen:
        for lost, member in enumerate(group.values()):
            member.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
            detach(member)
            assert looked(ours, group, seen).repairs.put_back == 1 - lost
    said = "the group has no program in the place of its own, which cannot be put back: udp 198.51.100.1 port 7007 has"
    assert caplog.messages[1].startswith(said)


def test_locked_filters_cost_no_supervisor_its_life(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    with only():
        group = members(stage, UDP)
        with contextlib.closing(
            Steering.begin(Policy.parse("source"), list(group.values()), LOG, passed=False)
        ) as steering:
            group[0].setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
            assert not steering.share({0}, group[0])
            assert steering.share({0}, group[1])
            steering.end(group, set())
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert messages[0].startswith(f"senders stay where they are: udp {HOST} port {PORT} has its filters locked")
    assert messages[1:] == ["datagrams go on to come for worker 0: its filters are locked"]


def test_a_socket_that_has_left_is_told_each_time_and_logged_once(
    stage: Stage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastrecv.workers.guarding._EVERY", 0.0)
    group = members(stage, UDP)
    ours = Filter(Policy.parse("source"), 2)
    ours.attach(group[0])
    guard = Guard(None, LOG)
    group[1].connect((HOST, 9))
    with only():
        assert [guard.look(ours, group) for _ in range(3)] == [[1]] * 3
    assert guard.repairs.renewed == 1
    assert caplog.messages == ["the socket of worker 1 has left the group for good: it was connected by its worker"]


def test_a_listener_that_was_shut_down_listens_again_in_its_slot(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    group = members(stage, TCP)
    with balanced(group) as ours, lookout(TCP) as seen:
        group[1].shutdown(socket.SHUT_RDWR)
        assert not listens(group[1])
        looked(ours, group, seen)
        assert listens(group[1])
        assert ours.sockets() == {slot: cookie_of(member) for slot, member in group.items()}
    assert caplog.messages[0] == "the listener of worker 1 was shut down by its worker: it listens again"


def test_a_guard_goes_on_with_descriptors_of_another_process_image(stage: Stage) -> None:
    group = members(stage, UDP)
    with balanced(group) as ours:
        with lookout(UDP) as first:
            inherited = os.dup(first.fileno())
        with only(), Lookout.of(inherited) as seen:
            detach(group[0])
            assert looked(ours, group, seen).repairs.put_back == 1
        assert program_of(group[0]) == ours.maps.program.info.id
