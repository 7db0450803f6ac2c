"""Whose program a group has, which sockets are members of one, and which privileges all that takes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from errno import EADDRINUSE, EPERM
from ipaddress import ip_network

import pytest

from fastrecv import groups, reuseport
from fastrecv.balance import Balancer
from fastrecv.balance_explain import explain
from fastrecv.errors import BpfError, SocketRefusedError
from fastrecv.policies import BUCKETS, Policy
from fastrecv.steerable import cookie_of
from tests.kernel.balancing import (
    balanced,
    counted,
    group,
    homes,
    senders,
    takers,
)
from tests.kernel.privileges import CAP_BPF, only
from tests.kernel.steering import SO_ATTACH_REUSEPORT_EBPF, TCP, UDP, Stage, kinds

SO_LOCK_FILTER = 44  # include/uapi/asm-generic/socket.h
IPPROTO_MPTCP = 262  # include/uapi/linux/in.h


# Whose program it is


def test_the_attach_of_any_member_replaces_the_program_of_all_silently(stage: Stage) -> None:
    with Balancer(Policy("flow"), size=2) as balancer, Balancer(Policy(), size=1) as other:
        members = group(stage, UDP, "ipv4", 2)
        balancer.attach(members[0])
        mine = balancer.maps.program.info.id
        assert [one.program for one in groups.members()] == [mine] * 2
        other.attach(members[1])
        assert [one.program for one in groups.members()] == [other.maps.program.info.id] * 2
        balancer.attach(members[1])
        assert groups.program_of(members[0]) == mine
        assert reuseport.detach(members[0])
        assert [one.program for one in groups.members()] == [None] * 2
        assert not reuseport.detach(members[1]), "it has none any more"


@kinds
def test_a_program_attached_before_bind_keeps_the_second_member_out_so_that_is_refused(stage: Stage, kind: int) -> None:
    with Balancer(Policy()) as balancer:
        made = [stage.stack.enter_context(socket.socket(socket.AF_INET, kind)) for _ in range(2)]
        for sock in made:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(SocketRefusedError, match=r"the next member's bind\(\) or listen\(\) fail with EADDRINUSE"):
            balancer.attach(made[0])
        for sock in made:
            sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, balancer.maps.program.fileno())
        made[0].bind(("198.51.100.2", 9000))
        with pytest.raises(OSError, match="Address already in use") as caught:
            made[1].bind(("198.51.100.2", 9000))
        assert caught.value.errno == EADDRINUSE


def test_a_locked_filter_keeps_off_who_attaches_and_not_who_detaches(stage: Stage) -> None:
    with Balancer(Policy()) as balancer, Balancer(Policy()) as other:
        members = group(stage, UDP, "ipv4", 2)
        balancer.attach(members[0])
        members[0].setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
        with pytest.raises(
            SocketRefusedError, match=r"port 7007 has its filters locked \(SO_LOCK_FILTER\): who did that keeps"
        ):
            other.attach(members[0])
        assert groups.program_of(members[0]) == balancer.maps.program.info.id
        assert reuseport.detach(members[0])
        assert groups.program_of(members[0]) is None
        other.attach(members[1])
        assert groups.program_of(members[0]) == other.maps.program.info.id


# Sockets that cannot be members


@pytest.mark.parametrize(
    "call", [Balancer.attach, lambda balancer, sock: balancer.register(0, sock)], ids=["attach", "register"]
)
def test_sockets_that_are_no_members_are_refused_by_name_with_the_cure(
    stage: Stage, call: Callable[[Balancer, socket.socket], None]
) -> None:
    late = stage.bind(UDP, "198.51.100.2", 9001)
    late.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    plain = stage.bind(UDP, "198.51.100.2", 9002)
    quiet = stage.bind(TCP, "198.51.100.2", 9003, reuseport=True)
    multipath = stage.stack.enter_context(socket.socket(socket.AF_INET, TCP, IPPROTO_MPTCP))
    multipath.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    multipath.bind(("198.51.100.2", 9004))
    multipath.listen()
    with Balancer(Policy()) as balancer:
        for sock, reason in [
            (late, "udp 198.51.100.2 port 9001 is in no group: its SO_REUSEPORT was set after bind(), set it before"),
            (plain, "udp 198.51.100.2 port 9002 is in no group: set SO_REUSEPORT before bind()"),
            (quiet, "tcp 198.51.100.2 port 9003 is in no group yet: it joins by bind(), TCP by listen()"),
            (
                multipath,
                "port 9004 is an MPTCP listener, which takes no program and no place in a BPF map: open it as plain",
            ),
        ]:
            with pytest.raises(SocketRefusedError) as caught:
                call(balancer, sock)
            assert reason in str(caught.value)
        assert balancer.sockets() == {}


def test_members_are_of_one_effective_user(stage: Stage) -> None:
    made = [stage.stack.enter_context(socket.socket(socket.AF_INET, UDP)) for _ in range(2)]
    for sock in made:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made[0].bind(("198.51.100.2", 9000))
    os.seteuid(65534)
    try:
        made[1].bind(("198.51.100.2", 9000))  # who binds does not matter: root has opened it
        with socket.socket(socket.AF_INET, UDP) as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with pytest.raises(OSError, match="Address already in use"):
                other.bind(("198.51.100.2", 9000))
    finally:
        os.seteuid(0)


def test_the_socket_of_another_group_in_a_slot_is_counted_and_nobody_else_gets_its_senders(stage: Stage) -> None:
    with Balancer(Policy("flow"), empty="next") as balancer:
        balanced(stage, balancer, UDP, "ipv4", 2)
        stranger = stage.bind(UDP, "198.51.100.250", 9000, reuseport=True)
        balancer.register(0, stranger, take_over=True)
        asked = senders("ipv4", 100)
        expected = [None if slot == 0 else 1 for slot in homes(balancer, asked)]
        assert takers(stage, asked) == expected
        assert counted(balancer, "wrong") == {0: expected.count(None)}
        assert counted(balancer, "fallback") == {}


# Privileges


def test_to_make_one_takes_one_capability_and_what_is_held_needs_none(stage: Stage) -> None:
    policy = Policy("flow", mapped="source")
    with only(), pytest.raises(BpfError) as caught:
        Balancer(policy)
    assert caught.value.errno == EPERM
    with only(CAP_BPF):
        made = Balancer(policy, senders=100)
    with made as balancer:
        members = group(stage, UDP, "ipv4", 3)
        with only():
            balancer.attach(members[0])
            for slot, member in enumerate(members[:2]):
                balancer.register(slot, member)
            balancer.register(1, members[2], take_over=True)
            assert balancer.weigh({0: 1, 1: 2}) == BUCKETS
            balancer.place(ip_network("198.51.100.1/32"), 0)
            balancer.leaving.begin(0)
            balancer.drain(0)
            assert balancer.leaving.known(0).senders == 0
            balancer.leaving.end(0)
            asked = senders("ipv4", 20)
            told = [explain(balancer, sender).socket for sender in asked]
            by_cookie = {cookie_of(member): number for number, member in enumerate(members)}
            assert takers(stage, asked) == [by_cookie[socket] for socket in told if socket is not None]
            balancer.unregister(0)
            assert reuseport.detach(members[0])
            assert {slot.number: slot.state for slot in balancer.slots()}[1] == "active"
