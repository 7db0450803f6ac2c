"""Balanced groups that are dispatched as well, by an anchor; and the connections of listeners that close."""

from __future__ import annotations

import select
import socket
from collections import Counter

import pytest

from fastrecv import groups
from fastrecv.balance import Balancer
from fastrecv.balance_explain import explain
from fastrecv.policies import Policy
from fastrecv.steerable import cookie_of
from tests.kernel.balancing import (
    balanced,
    counted,
    families,
    group,
    homes,
    senders,
    taker,
    takers,
)
from tests.kernel.steering import PORT, TCP, UDP, Stage, bound, kinds

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
