"""The balancer against its twin in user space, on real traffic: TCP and UDP, IPv4, IPv6 and dual-stack."""

from __future__ import annotations

import select
import socket
from ipaddress import ip_address

import numpy as np
import pytest

from fastrecv.balance import Balancer
from fastrecv.balance_explain import explain
from fastrecv.errors import SocketRefusedError
from fastrecv.policies import BUCKETS, Key, Policy, Sender
from tests.kernel.steering import PORT, TCP, UDP, Stage, kinds

# The address that members are bound to, and the network that clients and servers are in.
FAMILIES = {
    "ipv4": ("0.0.0.0", "198.51.100.{}"),  # noqa: S104 - a private namespace
    "ipv6": ("::", "2001:db8:7::{:x}"),
    "dual": ("::", "198.51.100.{}"),
}
families = pytest.mark.parametrize("family", FAMILIES)


def group(stage: Stage, kind: int, family: str, count: int) -> list[socket.socket]:
    return [
        stage.serve(str(number), kind, FAMILIES[family][0], PORT, reuseport=True, only6=family == "ipv6")
        for number in range(count)
    ]


def senders(family: str, count: int) -> list[Sender]:
    rng, net = np.random.default_rng(count), FAMILIES[family][1]
    return [
        Sender(
            ip_address(net.format(1 + int(rng.integers(120)))), 10_000 + number,
            ip_address(net.format(130 + int(rng.integers(60)))), PORT,
        )
        for number in range(count)
    ]  # fmt: skip


def taker(stage: Stage, kind: int, sender: Sender) -> int | None:
    """The member that gets a datagram or a connection of the sender; None where it is refused."""
    with stage.bind(kind, str(sender.source), sender.source_port) as client:
        try:
            client.connect((str(sender.destination), sender.destination_port))
            client.send(b"?")
            ready = select.select([client, *stage.servers.values()], [], [], 5)[0]
            if client in ready:
                client.recv(1)
            (server,) = ready
        except ConnectionRefusedError:
            return None
        (name,) = (name for name, known in stage.servers.items() if known is server)
        if kind == TCP:
            server.accept()[0].close()
        else:
            server.recv(9)
        return int(name)


@kinds
@families
@pytest.mark.parametrize("key", ["source", "source+port", "flow", "destination"])
def test_every_sender_comes_to_the_member_that_user_space_names(stage: Stage, kind: int, family: str, key: Key) -> None:
    policy = Policy(key, seed=7) if key == "destination" else Policy(key, prefix4=29, prefix6=125, seed=7)
    with Balancer(policy) as balancer:
        members = group(stage, kind, family, 4)
        balancer.attach(members[0])
        for slot, member in enumerate(members):
            balancer.register(slot, member)
        balancer.weigh({0: 1, 1: 1, 2: 2, 3: 1})
        asked = senders(family, 60)
        found = [taker(stage, kind, sender) for sender in asked]
        assert found == [explain(balancer, sender).taker for sender in asked]
        assert len(set(found)) == 4
        counts = balancer.counters()
        # A TCP connection runs the program for its SYN and, with cookies, for the last ACK.
        assert sum(counts[slot]["selected"] for slot in range(4)) >= len(asked)
        assert all(counts[slot][name] == 0 for slot in counts for name in ("empty", "fallback", "unreadable", "wrong"))


def test_senders_whose_bucket_stays_never_move_and_as_few_move_as_can(stage: Stage) -> None:
    with Balancer(Policy("source+port")) as balancer:
        members = group(stage, UDP, "ipv4", 5)
        balancer.attach(members[0])
        for slot, member in enumerate(members):
            balancer.register(slot, member)
        asked = senders("ipv4", 200)
        balancer.weigh(dict.fromkeys(range(4), 1))
        before = [taker(stage, UDP, sender) for sender in asked]
        assert balancer.weigh(dict.fromkeys(range(5), 1)) == BUCKETS // 5
        after = [taker(stage, UDP, sender) for sender in asked]
        assert all(new in (old, 4) for old, new in zip(before, after, strict=True))
        assert balancer.weigh(dict.fromkeys(range(4), 1)) == BUCKETS // 5
        assert {taker(stage, UDP, sender) for sender in asked} == {0, 1, 2, 3}


@kinds
@pytest.mark.parametrize(("empty", "found"), [("drop", {None}), ("next", {1}), ("kernel", {0, 1})])
def test_what_becomes_of_senders_whose_slot_is_empty(stage: Stage, kind: int, empty: str, found: set[int]) -> None:
    with Balancer(Policy("flow"), empty=empty) as balancer:  # type: ignore[arg-type] # one of the three
        members = group(stage, kind, "ipv4", 2)
        balancer.attach(members[0])
        balancer.register(5, members[1])
        balancer.weigh({3: 1})
        assert {taker(stage, kind, sender) for sender in senders("ipv4", 30)} == found
        assert balancer.counters()[3]["empty"] >= 30
        balancer.register(3, members[0])
        assert {taker(stage, kind, sender) for sender in senders("ipv4", 31)[-20:]} == {0}
        balancer.unregister(3)
        balancer.unregister(3)
        assert taker(stage, kind, senders("ipv4", 32)[-1]) in found


def test_what_cannot_be_balanced_is_refused_with_the_cure(stage: Stage) -> None:
    with Balancer(Policy()) as balancer:
        alone = stage.bind(UDP, "198.51.100.2", 9000)
        with pytest.raises(
            SocketRefusedError, match=r"198\.51\.100\.2 port 9000 is in no group: set SO_REUSEPORT before"
        ):
            balancer.register(0, alone)
        with pytest.raises(ValueError, match="slot 128: give 0 to 127"):
            balancer.register(128, alone)
        (member,) = group(stage, UDP, "ipv4", 1)
        balancer.register(0, member)
        with pytest.raises(SocketRefusedError, match="port 7007 has slot 0: unregister it there first"):
            balancer.register(1, member)
        with (
            socket.socket(socket.AF_INET, UDP) as unbound,
            pytest.raises(SocketRefusedError, match="is not bound: register it after bind"),
        ):
            balancer.attach(unbound)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"key": "sauce"}, "give source, source"), ({"prefix4": 33}, "give 0 to 32"), ({"seed": -1}, "give 0 to 2")],
)
def test_a_policy_that_makes_no_sense_is_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Policy(**options)  # type: ignore[arg-type] # that is the point


def test_the_hash_spreads_neighbours_evenly() -> None:
    policy = Policy(seed=0)
    found = [policy.bucket(Sender(ip_address(f"10.{a}.{b}.1"), 1, ip_address("10.0.0.1"), 1)) for a in range(64)
             for b in range(256)]  # fmt: skip
    counts = np.bincount(np.array(found, int), minlength=BUCKETS)
    assert abs(counts.var() / counts.mean() - 1) < 0.1, "as many as a random hash puts together, no more"
