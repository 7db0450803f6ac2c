"""What the kernel does to balanced groups that nobody would expect, each with what the balancer makes of it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from errno import EADDRINUSE, EBUSY, EPERM
from ipaddress import ip_network

import numpy as np
import pytest

from fastrecv import groups
from fastrecv.balance import COUNTERS, Balancer
from fastrecv.balance_explain import explain
from fastrecv.errors import BpfError, SocketRefusedError, StateError
from fastrecv.listeners import cookie_of
from fastrecv.policies import BUCKETS, Policy
from tests.kernel.balancing import arrivals, balanced, families, group, homes, senders, taker, takers
from tests.kernel.privileges import CAP_BPF, only
from tests.kernel.steering import PORT, SO_ATTACH_REUSEPORT_EBPF, TCP, UDP, Stage, bound, kinds

SO_LOCK_FILTER = 44  # include/uapi/asm-generic/socket.h
IPPROTO_MPTCP = 262  # include/uapi/linux/in.h
TOUCHED = 20_000  # datagrams that cross a change; each change has some hundreds of them


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def counted(balancer: Balancer, name: str) -> dict[int | None, int]:
    return {slot: counts[name] for slot, counts in balancer.counters().items() if counts[name]}


@contextlib.contextmanager
def again_and_again(*steps: Callable[[], object]) -> Iterator[Counter[str]]:
    """Do these in turn in a thread of its own; gives how often all were done."""
    ended, done = threading.Event(), Counter[str]()

    def work() -> None:
        while not ended.is_set():
            for step in steps:
                step()
            done["rounds"] += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield done
    finally:
        ended.set()
        thread.join()


def flood(stage: Stage, count: int) -> Counter[int]:
    """Send from connected sockets, which hear of every refusal; whose members got them."""
    clients = [stage.bind(UDP, f"198.51.100.{last}", 0) for last in range(1, 21)]
    for client in clients:
        client.connect(("198.51.100.200", PORT))
    found = Counter[int]()
    for number in range(count):
        clients[number % len(clients)].send(b"?")
        if number % 50 == 49:
            found.update(name for _, name in arrivals(stage))
    found.update(name for _, name in arrivals(stage))
    return found


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
        with pytest.raises(SocketRefusedError, match="has a slot of another balancer, or is a dispatcher's"):
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
        with stage.opened([third]), pytest.raises(SocketRefusedError, match="or is a dispatcher's"):
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


# Balanced and dispatched


@kinds
def test_a_prefix_dispatched_to_an_anchor_comes_to_the_workers(stage: Stage, kind: int) -> None:
    with Balancer(Policy("flow")) as balancer:
        balanced(stage, balancer, kind, "ipv4", 3)
        anchor = stage.serve("9", kind, "0.0.0.0", PORT, reuseport=True)  # noqa: S104 - a private namespace
        anchor.setblocking(kind == TCP)
        with stage.dispatching(bound(kind, "198.51.100.128/25"), anchor):
            asked = senders("ipv4", 60)
            found = [taker(stage, kind, sender) for sender in asked]
            assert found == [explain(balancer, sender).taker for sender in asked]
        assert set(found) == {0, 1, 2}


def test_where_the_hash_of_the_kernel_may_decide_an_anchor_gets_senders(stage: Stage) -> None:
    with Balancer(Policy("flow"), size=1, empty="kernel") as balancer:
        (member,) = group(stage, UDP, "ipv4", 1)
        balancer.attach(member)
        anchor = stage.serve("9", UDP, "0.0.0.0", PORT, reuseport=True)  # noqa: S104 - a private namespace
        anchor.setblocking(False)
        assert 9 in takers(stage, senders("ipv4", 100))
        balancer.register(0, member)
        assert set(takers(stage, senders("ipv4", 100))) == {0}


# Listeners that close


def queued(stage: Stage, balancer: Balancer, family: str, count: int) -> tuple[list[socket.socket], list[int | None]]:
    """Clients whose connections nobody has accepted yet, and the slots that they were explained to come to."""
    asked = senders(family, count, lambda _: b"")
    clients = [stage.bind(TCP, str(sender.source), sender.source_port) for sender in asked]
    for client, sender in zip(clients, asked, strict=True):
        client.connect((str(sender.destination), sender.destination_port))
    return clients, [explain(balancer, sender).taker for sender in asked]


def waiting(stage: Stage) -> dict[int, int]:
    """How many connections each member has in its queue."""
    queues = {one.cookie: one.queue for one in groups.members()}
    return {int(name): queues[cookie_of(server)] for name, server in stage.servers.items()}


def accepted(server: socket.socket) -> set[tuple[str, int]]:
    found = set()
    while select.select([server], [], [], 0)[0]:
        connection, peer = server.accept()
        connection.close()
        found.add((peer[0].removeprefix("::ffff:"), peer[1]))
    return found


@pytest.mark.parametrize("policy", ["source", "flow", "payload[0:4]"])
@families
def test_connections_of_a_listener_that_closes_go_where_their_buckets_have_gone(
    stage: Stage, family: str, policy: str
) -> None:
    """There is no packet then, and no IP header. The sysctl net.ipv4.tcp_migrate_req is off, as it is by default."""
    with Balancer(Policy.parse(policy, seed=9)) as balancer:
        balanced(stage, balancer, TCP, family, 3)
        clients, before = queued(stage, balancer, family, 30)
        assert waiting(stage) == Counter(before)
        balancer.drain(0)
        stage.servers.pop("0").close()
        assert sum(counted(balancer, "selected").values()) == len(clients) + before.count(0)
        found = {number: accepted(stage.servers[str(number)]) for number in (1, 2)}
        assert sum(map(len, found.values())) == len(clients), "all of them, none twice"
        after = homes(balancer, senders(family, 30, lambda _: b""))
        for client, old, new in zip(clients, before, after, strict=True):
            assert old in (0, new)
            assert client.getsockname()[:2] in found[new]


@pytest.mark.parametrize("policy", ["cpu", "random"])
def test_connections_that_came_by_cpu_or_chance_are_not_lost_with_their_listener(stage: Stage, policy: str) -> None:
    with Balancer(Policy.parse(policy)) as balancer:
        balanced(stage, balancer, TCP, "ipv4", 3)
        clients, _ = queued(stage, balancer, "ipv4", 30)
        held = waiting(stage)
        busiest = max(held, key=held.__getitem__)
        balancer.drain(busiest)
        stage.servers.pop(str(busiest)).close()
        assert sum(counted(balancer, "selected").values()) == len(clients) + held[busiest]
        assert sum(len(accepted(server)) for server in stage.servers.values()) == len(clients)


@pytest.mark.parametrize(("empty", "moved"), [("next", True), ("drop", False)])
def test_connections_of_an_empty_slot_follow_the_policy_for_that(stage: Stage, empty: str, moved: bool) -> None:
    with Balancer(Policy("flow", seed=9), empty=empty) as balancer:  # type: ignore[arg-type] # one of the two
        balanced(stage, balancer, TCP, "ipv4", 3)
        clients, before = queued(stage, balancer, "ipv4", 24)
        stage.servers.pop("0").close()
        assert counted(balancer, "empty") == {0: before.count(0)}
        assert counted(balancer, "fallback") == ({1: before.count(0)} if moved else {})
        assert len(accepted(stage.servers["1"])) == before.count(1) + moved * before.count(0)
        assert len(accepted(stage.servers["2"])) == before.count(2)
        reset = 0
        for client in clients:
            try:
                client.recv(1)
            except ConnectionResetError:
                reset += 1
        assert reset == (0 if moved else before.count(0))


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
        Balancer.detach(members[0])
        assert [one.program for one in groups.members()] == [None] * 2
        with pytest.raises(StateError, match=r"the group of udp 0\.0\.0\.0 port 7007 has no program"):
            Balancer.detach(members[1])


@kinds
def test_a_program_attached_before_bind_keeps_the_second_member_out_so_that_is_refused(stage: Stage, kind: int) -> None:
    with Balancer(Policy()) as balancer:
        made = [stage.stack.enter_context(socket.socket(socket.AF_INET, kind)) for _ in range(2)]
        for sock in made:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reason = "does not listen: register it after listen" if kind == TCP else "is not bound: register it after bind"
        with pytest.raises(SocketRefusedError, match=reason):
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
        with pytest.raises(SocketRefusedError, match=r"port 7007 has SO_LOCK_FILTER set: attach to another member"):
            other.attach(members[0])
        assert groups.program_of(members[0]) == balancer.maps.program.info.id
        Balancer.detach(members[0])
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
            (quiet, "tcp 198.51.100.2 port 9003 does not listen: register it after listen()"),
            (
                multipath,
                "198.51.100.2 port 9004 is an MPTCP listener, which BPF maps do not take: open it as plain TCP",
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
            balancer.detach(members[0])
            assert {slot.number: slot.state for slot in balancer.slots()}[1] == "active"


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
