"""The traps of programs on reuseport groups: what the kernel does, and that a Filter does not fall in."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Sequence
from errno import EADDRINUSE, EPERM
from pathlib import Path

import pytest

from fastrecv.balance import Balancer
from fastrecv.classic import Filter, Instruction
from fastrecv.classic.instructions import RETURN, ld
from fastrecv.errors import BpfError, SocketRefusedError
from fastrecv.policies import Policy, Sender
from fastrecv.reuseport import detach
from tests.kernel.balancing import families, senders
from tests.kernel.groups import NOBODY, attach, serve, served_by_nobody, taker
from tests.kernel.privileges import as_user
from tests.kernel.steering import PORT, TCP, UDP, Stage, kinds

SO_LOCK_FILTER, RET = 44, 0x06  # include/uapi/asm-generic/socket.h, linux/bpf_common.h
ALWAYS_1 = [Instruction(RET, k=1)]
BY_FIRST_BYTE = [ld(0, 1), RETURN]


def by_number(stage: Stage, number: int) -> int:
    return taker(stage, UDP, senders("ipv4", 1, lambda _: bytes([number]))[0])


def everybody(stage: Stage, kind: int, asked: Sequence[Sender]) -> list[int]:
    return [taker(stage, kind, sender) for sender in asked]


@families
def test_a_load_that_fails_gives_0_and_a_filter_has_none(stage: Stage, family: str) -> None:
    made = served_by_nobody(stage, UDP, family, Policy("payload", offset=1000, length=4), 4)
    asked = senders(family, 100)
    found = everybody(stage, UDP, asked)
    assert found == [made.index(sender) for sender in asked]
    assert set(found) == {0, 1, 2, 3}
    attach(stage.servers["0"], [ld(1000), *ALWAYS_1])
    assert set(everybody(stage, UDP, asked)) == {0}
    assert taker(stage, UDP, senders(family, 1, lambda _: bytes(1004))[0]) == 1


@kinds
@families
def test_a_number_that_no_member_has_goes_by_the_kernels_hash(stage: Stage, kind: int, family: str) -> None:
    members = serve(stage, kind, family, 3)
    asked = senders(family, 60)
    by_hash = everybody(stage, kind, asked)
    assert set(by_hash) == {0, 1, 2}
    made = Filter(Policy("source", seed=7), 6)
    made.attach(members[0])
    named = [made.index(sender) for sender in asked]
    assert {0, 1, 2} < set(named)
    found = everybody(stage, kind, asked)
    assert found == [wanted if wanted in (0, 1, 2) else other for wanted, other in zip(named, by_hash, strict=True)]


@kinds
def test_members_are_numbered_as_they_bind_or_for_tcp_listen(stage: Stage, kind: int) -> None:
    for name in ("first", "second"):
        stage.servers[name] = stage.bind(kind, "198.51.100.1", PORT, reuseport=True)
    if kind == TCP:
        stage.servers["second"].listen()
        stage.servers["first"].listen()
    attach(stage.servers["first"], ALWAYS_1)
    assert {stage.ask(kind, "198.51.100.1") for _ in range(20)} == {"first" if kind == TCP else "second"}


@families
def test_the_ack_of_a_syn_cookie_comes_to_the_same_member(stage: Stage, family: str) -> None:
    Path("/proc/sys/net/ipv4/tcp_syncookies").write_text("2\n")  # always
    made = served_by_nobody(stage, TCP, family, Policy("flow"), 5)
    asked = senders(family, 100)
    assert everybody(stage, TCP, asked) == [made.index(sender) for sender in asked]
    netstat = Path("/proc/thread-self/net/netstat").read_text().splitlines()
    counts = dict(zip(netstat[0].split(), netstat[1].split(), strict=True))
    assert counts["SyncookiesSent"] == counts["SyncookiesRecv"] == "100"


def test_when_a_member_leaves_the_last_takes_its_number(stage: Stage) -> None:
    members = serve(stage, UDP, "ipv4", 4)
    attach(members[0], BY_FIRST_BYTE)
    assert [by_number(stage, number) for number in range(4)] == [0, 1, 2, 3]
    stage.servers.pop("3").close()
    assert [by_number(stage, number) for number in range(3)] == [0, 1, 2], "the highest leaves: nobody moves"
    stage.servers.pop("0").close()
    assert [by_number(stage, number) for number in range(2)] == [2, 1]


@kinds
def test_attached_before_bind_it_keeps_others_out_and_a_filter_refuses(stage: Stage, kind: int) -> None:
    serve(stage, kind, "ipv4", 1)
    with socket.socket(socket.AF_INET, kind) as second:
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(SocketRefusedError, match=r"is in no group yet: it joins by bind\(\)"):
            Filter(Policy(), 2).attach(second)
        attach(second, ALWAYS_1)
        with pytest.raises(OSError, match="in use") as caught:
            second.bind(("0.0.0.0", PORT))  # noqa: S104 - a private namespace
        assert caught.value.errno == EADDRINUSE


def test_attached_before_listen_it_keeps_others_out_and_a_filter_refuses(stage: Stage) -> None:
    serve(stage, TCP, "ipv4", 1)
    second = stage.bind(TCP, "0.0.0.0", PORT, reuseport=True)  # noqa: S104 - a private namespace
    with pytest.raises(SocketRefusedError, match=r"port 7007 is in no group yet: .* TCP by listen\(\)"):
        Filter(Policy(), 2).attach(second)
    attach(second, ALWAYS_1)
    with pytest.raises(OSError, match="in use") as caught:
        second.listen()
    assert caught.value.errno == EADDRINUSE


@kinds
def test_classic_and_ebpf_replace_each_other_without_a_word(stage: Stage, kind: int) -> None:
    members = stage.group(kind, "198.51.100.1", PORT, chosen=0)
    assert {stage.ask(kind, "198.51.100.1") for _ in range(10)} == {"a"}
    attach(members[1], ALWAYS_1)
    assert {stage.ask(kind, "198.51.100.1") for _ in range(10)} == {"b"}
    with stage.opened(members, member=0) as programs:
        members[0].setsockopt(socket.SOL_SOCKET, 52, programs.programs["chooses"].fileno())
    assert {stage.ask(kind, "198.51.100.1") for _ in range(10)} == {"a"}


def test_an_ordinary_user_may_attach_a_filter_and_not_load_the_balancers_program(stage: Stage) -> None:
    def load() -> int:
        try:
            Balancer(Policy()).close()
        except BpfError as error:
            return error.errno or 0
        return 0

    assert load() == 0, "root may; and what the child imports is imported, wherever it lies"
    _, status = os.waitpid(as_user(NOBODY, NOBODY, load), 0)
    assert os.waitstatus_to_exitcode(status) == EPERM
    made = served_by_nobody(stage, UDP, "ipv4", Policy(), 3)
    asked = senders("ipv4", 20)
    assert everybody(stage, UDP, asked) == [made.index(sender) for sender in asked]


@kinds
def test_any_member_detaches_and_the_kernels_hash_decides_again(stage: Stage, kind: int) -> None:
    members = serve(stage, kind, "ipv4", 3)
    asked = senders("ipv4", 60)
    by_hash = everybody(stage, kind, asked)
    attach(members[0], ALWAYS_1)
    assert set(everybody(stage, kind, asked)) == {1}
    assert detach(members[2])
    assert not detach(members[0])
    assert everybody(stage, kind, asked) == by_hash


def test_what_cannot_have_a_program_is_refused_with_the_cure(stage: Stage) -> None:
    made = Filter(Policy(), 1)
    alone = stage.bind(UDP, "198.51.100.2", 9000)
    connected = stage.bind(UDP, "198.51.100.3", 9001, reuseport=True)
    connected.connect(("198.51.100.4", 9))
    locked = stage.bind(UDP, "198.51.100.5", 9002, reuseport=True)
    locked.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
    for sock, reason in (
        (alone, r"udp 198\.51\.100\.2 port 9000 is in no group: set SO_REUSEPORT before bind"),
        (connected, "is connected: packets cannot be steered to it"),
        (locked, r"has its filters locked \(SO_LOCK_FILTER\): who did that keeps"),
    ):
        with pytest.raises(SocketRefusedError, match=reason):
            made.attach(sock)
    with pytest.raises(SocketRefusedError, match="is in no group"):
        detach(alone)


def test_mptcp_and_other_families_are_refused_by_name(stage: Stage) -> None:
    made = Filter(Policy(), 1)
    with (
        socket.socket(socket.AF_INET, TCP, socket.IPPROTO_MPTCP) as several,
        pytest.raises(SocketRefusedError, match=r"port 0 is an MPTCP listener, .*: open it as plain TCP"),
    ):
        made.attach(several)
    with socket.socket(socket.AF_UNIX) as local, pytest.raises(SocketRefusedError, match="family AF_UNIX"):
        made.attach(local)


@pytest.mark.parametrize("migrating", [0, 1])
def test_connections_of_a_listener_that_closes_are_lost_or_go_by_the_kernels_hash(stage: Stage, migrating: int) -> None:
    Path("/proc/sys/net/ipv4/tcp_migrate_req").write_text(f"{migrating}\n")
    members = serve(stage, TCP, "ipv4", 2)
    attach(members[0], ALWAYS_1)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(stage.bind(TCP, "198.51.100.9", 0)) for _ in range(4)]
        for client in clients:
            client.connect(("198.51.100.1", PORT))
        assert select.select(members, [], [], 5)[0] == [members[1]]
        members[1].close()
        if migrating:
            assert len([stack.enter_context(members[0].accept()[0]) for _ in clients]) == 4
        else:
            for client in clients:
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
            assert select.select([members[0]], [], [], 0)[0] == []


def test_a_group_that_shrinks_from_the_highest_and_gets_a_new_filter_serves_all_by_name(stage: Stage) -> None:
    members = serve(stage, UDP, "ipv4", 5)
    asked = senders("ipv4", 100)
    for size in (5, 4, 3):
        made = Filter(Policy("source"), size)
        made.attach(members[0])
        for number in range(size, len(stage.servers)):
            stage.servers.pop(str(number)).close()
        assert everybody(stage, UDP, asked) == [made.index(sender) for sender in asked]
