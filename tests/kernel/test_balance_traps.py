"""What the kernel does to the slots of a balancer that nobody would expect, each with what the balancer makes of it."""

from __future__ import annotations

import os
import signal
from errno import EBUSY

import numpy as np
import pytest

from fastrecv import groups
from fastrecv.balance import COUNTERS, Balancer
from fastrecv.errors import BpfError, SocketRefusedError
from fastrecv.policies import BUCKETS, Policy
from fastrecv.steerable import cookie_of
from tests.kernel.balancing import (
    again_and_again,
    balanced,
    counted,
    flood,
    group,
    senders,
    takers,
    within,
)
from tests.kernel.steering import PORT, UDP, Stage, kinds

TOUCHED = 20_000  # datagrams that cross a change; each change has some hundreds of them


# Verdicts


def test_a_pass_with_nothing_selected_falls_back_to_the_hash_of_the_kernel(stage: Stage) -> None:
    with Balancer(Policy("flow"), size=1, empty="kernel") as balancer:
        balancer.attach(group(stage, UDP, "ipv4", 3)[0])
        assert set(takers(stage, senders("ipv4", 200))) == {0, 1, 2}
        assert counted(balancer, "empty") == {0: 200}
        assert counted(balancer, "selected") == {}


@kinds
def test_a_drop_is_a_refusal_for_who_is_connected(stage: Stage, kind: int) -> None:
    with Balancer(Policy("flow"), size=1) as balancer:
        balancer.attach(group(stage, kind, "ipv4", 2)[0])
        with stage.bind(kind, "198.51.100.1", 0) as client, pytest.raises(ConnectionRefusedError):  # noqa: PT012 - either
            client.connect(("198.51.100.200", PORT))
            client.send(b"?")
            client.recv(1)
        assert counted(balancer, "empty").keys() == {0}


# One place for a socket


def test_a_socket_has_one_slot_on_the_host(stage: Stage) -> None:
    with Balancer(Policy()) as balancer, Balancer(Policy()) as other:
        member, second = group(stage, UDP, "ipv4", 2)
        balancer.register(3, member)
        with pytest.raises(BpfError) as caught:
            balancer.maps["slots"].update([3], [member.fileno()])
        assert caught.value.errno == EBUSY, "even the same again"
        balancer.register(3, member)
        with pytest.raises(SocketRefusedError, match=r"udp 0\.0\.0\.0 port 7007 has slot 3: unregister it there"):
            balancer.register(4, member)
        with pytest.raises(SocketRefusedError, match="has a slot of another balancer, which may"):
            other.register(0, member)
        with pytest.raises(SocketRefusedError, match=f"slot 3 has socket sk:{cookie_of(member):x}: unregister that"):
            balancer.register(3, second)
        assert (balancer.sockets(), other.sockets()) == ({3: cookie_of(member)}, {})
        balancer.unregister(3)
        other.register(0, member)
        assert other.sockets() == {0: cookie_of(member)}


def test_a_socket_that_a_dispatcher_has_is_refused_a_slot_and_stays_there(stage: Stage) -> None:
    (member,) = group(stage, UDP, "ipv4", 1)
    with Balancer(Policy()) as balancer, stage.opened([member]) as holder:
        with pytest.raises(SocketRefusedError, match="For a dispatcher register one more member of the group"):
            balancer.register(0, member)
        assert int(holder.maps["sockets"][0]) == cookie_of(member)
        assert balancer.sockets() == {}


def test_a_take_over_that_is_refused_leaves_the_slot_to_whom_it_has(stage: Stage) -> None:
    with Balancer(Policy()) as balancer:
        first, second = group(stage, UDP, "ipv4", 2)
        balancer.register(0, first)
        balancer.register(1, second)
        with pytest.raises(SocketRefusedError, match="has slot 1"):
            balancer.register(0, second, take_over=True)
        third = stage.bind(UDP, "0.0.0.0", PORT, reuseport=True)  # noqa: S104 - a private namespace
        with stage.opened([third]), pytest.raises(SocketRefusedError, match="or it is a dispatcher's"):
            balancer.register(0, third, take_over=True)
        assert balancer.sockets() == {0: cookie_of(first), 1: cookie_of(second)}


def test_a_take_over_is_atomic_under_traffic(stage: Stage) -> None:
    with Balancer(Policy("flow"), size=1) as balancer:
        members = group(stage, UDP, "ipv4", 2)
        balancer.attach(members[0])
        balancer.register(0, members[0])
        turns = [lambda member=member: balancer.register(0, member, take_over=True) for member in members[::-1]]
        with again_and_again(*turns) as done:
            found = flood(stage, TOUCHED)
        assert found.total() == TOUCHED, "none was refused, none got lost"
        assert set(found) == {0, 1}
        assert done["rounds"] > 5
        assert counted(balancer, "selected") == {0: TOUCHED}


# How long a slot is kept


def test_the_slot_of_a_closed_socket_is_empty(stage: Stage) -> None:
    with Balancer(Policy()) as balancer:
        members = balanced(stage, balancer, UDP, "ipv4", 2)
        members[0].close()
        assert balancer.sockets() == {1: cookie_of(members[1])}
        (left,) = (slot for slot in balancer.slots() if slot.number == 0)
        assert (left.state, left.socket) == ("empty", None)


def test_a_slot_stays_while_any_process_holds_its_socket(stage: Stage) -> None:
    with Balancer(Policy()) as balancer:
        member, _ = balanced(stage, balancer, UDP, "ipv4", 2)
        cookie = cookie_of(member)
        child = os.fork()
        if not child:
            signal.pause()
        try:
            member.close()
            assert balancer.sockets()[0] == cookie
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert within(5, lambda: 0 not in balancer.sockets())


def test_a_connected_socket_has_left_the_group_and_its_slot(stage: Stage) -> None:
    with Balancer(Policy("flow"), empty="next") as balancer:
        members = balanced(stage, balancer, UDP, "ipv4", 2)
        members[0].connect(("198.51.100.7", 9))
        assert balancer.sockets() == {1: cookie_of(members[1])}
        assert [one.cookie for one in groups.members()] == [cookie_of(members[1])]
        assert set(takers(stage, senders("ipv4", 40))) == {1}
        with pytest.raises(SocketRefusedError, match="is connected: packets cannot be steered to it"):
            balancer.register(0, members[0])


# Tables


def test_a_new_table_is_in_force_at_once_and_whole_under_traffic(stage: Stage) -> None:
    with Balancer(Policy("flow")) as balancer:
        balanced(stage, balancer, UDP, "ipv4", 2)
        with again_and_again(lambda: balancer.weigh({0: 1}), lambda: balancer.weigh({1: 1})) as done:
            found = flood(stage, TOUCHED)
        assert found.total() == TOUCHED
        assert done["rounds"] > 2
        assert counted(balancer, "selected").keys() == {0, 1}
        assert [counted(balancer, name) for name in COUNTERS[1:]] == [{}] * 4


def test_nobody_uses_the_old_table_when_a_change_has_returned(stage: Stage) -> None:
    with Balancer(Policy("flow")) as balancer:
        balanced(stage, balancer, UDP, "ipv4", 2)
        every = np.arange(BUCKETS, dtype=np.uint32)
        for wanted in (0, 1, 0):
            balancer.weigh({wanted: 1})
            used = next(n for n in ("table-0", "table-1") if set(balancer.maps[n].lookup(every).tolist()) == {wanted})
            idle = "table-1" if used == "table-0" else "table-0"
            balancer.maps[idle].update(every, np.full(BUCKETS, 99, np.uint32))
            assert set(takers(stage, senders("ipv4", 200))) == {wanted}
        assert counted(balancer, "empty") == {}
