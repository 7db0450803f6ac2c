"""The balancer against its twin in user space, on real traffic: TCP and UDP, IPv4, IPv6 and dual-stack."""

from __future__ import annotations

import socket

import pytest

from fastrecv.balance import SLOTS, Balancer
from fastrecv.balance_explain import explain
from fastrecv.errors import SocketRefusedError
from fastrecv.policies import BUCKETS, Policy
from tests.kernel.balancing import balanced, families, group, homes, senders, taker, takers
from tests.kernel.steering import TCP, UDP, Stage, kinds

EXPLAINED = 12  # senders of a test that `explain` is asked about: it reads all tables anew for each


@families
@pytest.mark.parametrize("policy", ["source", "source/29/125", "source+port", "flow", "flow/24/64", "destination"])
def test_every_datagram_comes_to_the_member_that_user_space_names(stage: Stage, family: str, policy: str) -> None:
    with Balancer(Policy.parse(policy, seed=7)) as balancer:
        balanced(stage, balancer, UDP, family, 4)
        balancer.weigh({0: 1, 1: 1, 2: 2, 3: 1})
        asked = senders(family, 600)
        found = takers(stage, asked)
        assert found == homes(balancer, asked)
        assert found[:EXPLAINED] == [explain(balancer, sender).taker for sender in asked[:EXPLAINED]]
        assert policy == "flow/24/64" or set(found) == {0, 1, 2, 3}
        counts = balancer.counters()
        assert [counts[slot]["selected"] for slot in range(4)] == [found.count(slot) for slot in range(4)]
        assert all(counts[slot][name] == 0 for slot in counts for name in ("empty", "fallback", "unreadable", "wrong"))


@families
@pytest.mark.parametrize("policy", ["source", "source/29/125", "source+port", "flow", "destination"])
def test_every_connection_comes_to_the_member_that_user_space_names(stage: Stage, family: str, policy: str) -> None:
    with Balancer(Policy.parse(policy, seed=8)) as balancer:
        balanced(stage, balancer, TCP, family, 4)
        asked = senders(family, 60)
        found = [taker(stage, TCP, sender) for sender in asked]
        assert found == [explain(balancer, sender).taker for sender in asked]
        assert len(set(found)) == 4
        counts = balancer.counters()
        # A connection runs the program for its SYN and, with cookies, for the last ACK.
        assert sum(counts[slot]["selected"] for slot in range(4)) >= len(asked)
        assert all(counts[slot][name] == 0 for slot in counts for name in ("empty", "fallback", "unreadable", "wrong"))


def test_senders_whose_bucket_stays_never_move_and_as_few_move_as_can(stage: Stage) -> None:
    with Balancer(Policy("source+port")) as balancer:
        balanced(stage, balancer, UDP, "ipv4", 5)
        balancer.weigh(dict.fromkeys(range(4), 1))
        asked = senders("ipv4", 2000)
        before = takers(stage, asked)
        assert balancer.weigh(dict.fromkeys(range(5), 1)) == BUCKETS // 5
        after = takers(stage, asked)
        assert all(new in (old, 4) for old, new in zip(before, after, strict=True))
        assert after.count(4) > 0
        assert balancer.weigh(dict.fromkeys(range(4), 1)) == BUCKETS // 5
        assert set(takers(stage, asked)) == {0, 1, 2, 3}


@kinds
@pytest.mark.parametrize(("empty", "found"), [("drop", {None}), ("next", {1}), ("kernel", {0, 1})])
def test_what_becomes_of_senders_whose_slot_is_empty(stage: Stage, kind: int, empty: str, found: set[int]) -> None:
    with Balancer(Policy("flow"), empty=empty) as balancer:  # type: ignore[arg-type] # one of the three
        members = group(stage, kind, "ipv4", 2)
        balancer.attach(members[0])
        balancer.register(5, members[1])
        balancer.weigh({3: 1})
        if empty == "next":
            assert {taker(stage, kind, sender) for sender in senders("ipv4", 5)} == {None}, "slot 5 has no weight"
        balancer.weigh({3: 1000, 5: 1})
        before = balancer.counters()[3]["empty"]
        asked = [one for one in senders("ipv4", 60) if explain(balancer, one).slot == 3][:30]
        assert {taker(stage, kind, sender) for sender in asked} == found
        told = explain(balancer, asked[0])
        assert (told.slot, told.taker) == (3, 5 if empty == "next" else None)
        assert balancer.counters()[3]["empty"] >= 30
        assert balancer.counters()[5]["fallback"] == (
            balancer.counters()[3]["empty"] - before if empty == "next" else 0
        )
        balancer.weigh({3: 1})
        balancer.register(3, members[0])
        assert {taker(stage, kind, sender) for sender in senders("ipv4", 31)[-20:]} == {0}
        balancer.unregister(3)
        balancer.unregister(3)
        assert taker(stage, kind, senders("ipv4", 32)[-1]) in ({None} if empty == "next" else found)


def test_the_next_of_the_last_slot_is_the_first_that_has_a_socket(stage: Stage) -> None:
    with Balancer(Policy("flow"), empty="next") as balancer:
        members = group(stage, UDP, "ipv4", 2)
        balancer.attach(members[0])
        balancer.register(9, members[0])
        balancer.register(60, members[1])
        asked = senders("ipv4", 10)
        for home, expected, slot in [(SLOTS - 1, 0, 9), (8, 0, 9), (10, 1, 60), (59, 1, 60), (61, 0, 9)]:
            balancer.weigh({home: 1000, 9: 1, 60: 1})
            asked = [one for one in senders("ipv4", 30) if explain(balancer, one).slot == home][:10]
            assert takers(stage, asked) == [expected] * len(asked)
            assert explain(balancer, asked[0]).taker == slot


@pytest.mark.parametrize("empty", ["drop", "next"])
def test_senders_that_no_slot_has_are_counted_apart(stage: Stage, empty: str) -> None:
    with Balancer(Policy("flow"), empty=empty) as balancer:  # type: ignore[arg-type] # one of the two
        members = group(stage, UDP, "ipv4", 2)
        balancer.attach(members[0])
        balancer.register(0, members[0])
        balancer.register(2, members[1])
        asked = senders("ipv4", 20)
        assert [taker(stage, UDP, sender) for sender in asked] == [None] * 20
        told = explain(balancer, asked[0])
        assert (told.slot, told.taker) == (None, None)
        assert "which no slot has" in told.reason
        assert balancer.counters()[None]["empty"] == 20


def test_what_cannot_be_balanced_is_refused_with_the_cure(stage: Stage) -> None:
    with Balancer(Policy()) as balancer:
        alone = stage.bind(UDP, "198.51.100.2", 9000)
        with pytest.raises(
            SocketRefusedError, match=r"198\.51\.100\.2 port 9000 is in no group: set SO_REUSEPORT before"
        ):
            balancer.register(0, alone)
        with (
            socket.socket(socket.AF_INET, UDP) as unbound,
            pytest.raises(SocketRefusedError, match=r"is in no group yet: it joins by bind\(\)"),
        ):
            balancer.attach(unbound)


def test_slots_weights_and_sizes_that_cannot_be_change_nothing(stage: Stage) -> None:
    with Balancer(Policy(), size=2) as balancer:
        (member,) = group(stage, UDP, "ipv4", 1)
        before = balancer.maps.table().tobytes()
        for call, reason in [
            (lambda: balancer.register(128, member), "slot 128: give 0 to 127"),
            (lambda: balancer.unregister(-1), "slot -1: give 0 to 127"),
            (lambda: balancer.weigh({0: 1, 128: 1}), "slot 128: give 0 to 127"),
            (lambda: balancer.weigh({0: 1, 1: 0}), "weight 0 of slot 1: give 1 to 1000"),
            (lambda: balancer.weigh({0: 1001}), "weight 1001 of slot 0: give 1 to 1000"),
            (lambda: balancer.resize(129), "size 129: give 0 to 128"),
            (lambda: balancer.drain(128), "slot 128: give 0 to 127"),
        ]:
            with pytest.raises(ValueError, match=reason):
                call()  # type: ignore[no-untyped-call]
        assert (balancer.weights, balancer.sockets()) == ({0: 1, 1: 1}, {})
        assert balancer.maps.table().tobytes() == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"policy": Policy("rxhash")}, "key 'rxhash' is for classic BPF only"),
        ({"size": 129}, "size 129: give 0 to 128"),
        ({"empty": "pass"}, "give drop, kernel, next"),
        ({"senders": -1}, "give 0 to 10,000,000"),
        ({"policy": Policy("cpu"), "senders": 5}, "key 'cpu' knows no senders: leave senders out"),
        ({"policy": Policy("random"), "senders": 5}, "key 'random' knows no senders: leave senders out"),
    ],
)
def test_a_balancer_that_makes_no_sense_is_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Balancer(**{"policy": Policy(), **options})  # type: ignore[arg-type] # that is the point


def test_where_seeds_are_drawn_no_two_are_alike_and_those_that_are_given_stay() -> None:
    with Balancer(Policy()) as one, Balancer(Policy()) as other, Balancer(Policy(seed=0)) as given:
        assert len({one.policy.seed, other.policy.seed, given.policy.seed}) == 3
        assert given.policy.seed == 0
