"""Draining: by table, so that nothing is lost; and sender by sender, so that who is known may finish."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ipaddress import ip_network

import numpy as np
import pytest

from fastrecv.balance import Balancer
from fastrecv.balance_explain import explain
from fastrecv.errors import StateError
from fastrecv.policies import BUCKETS, Policy, Sender
from tests.kernel.balancing import arrivals, balanced, group, homes, senders, takers
from tests.kernel.steering import PORT, UDP, Stage

KNOWN = 1000


def sent(stage: Stage, asked: Sequence[Sender]) -> None:
    for sender in asked:
        with stage.bind(UDP, str(sender.source), sender.source_port) as client:
            client.sendto(sender.payload, (str(sender.destination), PORT))


def rest(sock: socket.socket) -> int:
    """What is still queued, read to the end."""
    found = 0
    while True:
        try:
            sock.recv(9)
        except BlockingIOError:
            return found
        found += 1


# By table


def test_a_slot_is_drained_read_unregistered_and_closed_and_nothing_is_lost(stage: Stage) -> None:
    with Balancer(Policy("source+port")) as balancer:
        members = balanced(stage, balancer, UDP, "ipv4", 3)
        asked = senders("ipv4", 90)
        before = homes(balancer, asked)
        sent(stage, asked)
        due = 3 * len(asked)
        assert balancer.drain(1) in (BUCKETS // 3, BUCKETS // 3 + 1)
        assert {slot.number: (slot.state, slot.buckets > 0) for slot in balancer.slots()} == {
            0: ("active", True), 1: ("draining", False), 2: ("active", True),
        }  # fmt: skip
        sent(stage, asked)
        left = rest(members[1])
        assert left == before.count(1) > 0, "what was queued before, and nothing since"
        balancer.unregister(1)
        stage.servers.pop("1").close()
        sent(stage, asked)
        assert left + len([*arrivals(stage)]) == due
        counters = balancer.counters()
        assert sum(counters[slot]["selected"] for slot in range(3)) == due
        assert not any(counters[slot]["empty"] for slot in counters)
        after = homes(balancer, asked)
        assert all(old in (new, 1) for old, new in zip(before, after, strict=True))


def test_who_cannot_be_drained_is_told(stage: Stage) -> None:
    with Balancer(Policy(), size=2) as balancer:
        with pytest.raises(StateError, match="slot 5 has no senders"):
            balancer.drain(5)
        balancer.drain(0)
        with pytest.raises(StateError, match="slot 0 has no senders"):
            balancer.drain(0)
        with pytest.raises(StateError, match="slot 1 is the only one that has senders: nobody could take them"):
            balancer.drain(1)
        assert balancer.weights == {1: 1}


def test_weights_are_in_force_and_kept_by_a_resize(stage: Stage) -> None:
    with Balancer(Policy("source+port")) as balancer:
        balanced(stage, balancer, UDP, "ipv4", 3)
        balancer.weigh({0: 1, 1: 3})
        asked = senders("ipv4", 2000)
        found = takers(stage, asked)
        assert found == homes(balancer, asked)
        deviation = np.sqrt(2000 * 0.25 * 0.75)
        assert abs(found.count(0) - 500) < 5 * deviation
        balancer.resize(3)
        assert balancer.weights == {0: 1, 1: 3, 2: 1}
        assert set(takers(stage, asked)) == {0, 1, 2}
        balancer.resize(1)
        assert balancer.weights == {0: 1}
        assert set(takers(stage, asked)) == {0}


def test_ten_thousand_senders_are_shared_as_the_weights_say() -> None:
    """The user-space twin alone: within five standard deviations of a binomial draw."""
    with Balancer(Policy("source+port")) as balancer:
        weights = {0: 1, 1: 1, 2: 2, 3: 4}
        balancer.weigh(weights)
        homed = homes(balancer, senders("ipv6", 10_000))
    for slot, weight in weights.items():
        share = weight / 8
        assert abs(homed.count(slot) - 10_000 * share) < 5 * np.sqrt(10_000 * share * (1 - share))


# Sender by sender


def leaving(stage: Stage, count: int = KNOWN) -> Balancer:
    balancer = Balancer(Policy("source+port"), senders=count)
    balanced(stage, balancer, UDP, "ipv4", 3)
    return balancer


def test_while_no_slot_leaves_nobody_is_recorded_and_then_those_of_that_slot_alone(stage: Stage) -> None:
    with leaving(stage) as balancer:
        asked = senders("ipv4", 90)
        homed = homes(balancer, asked)
        takers(stage, asked)
        assert len(balancer.maps["senders"].items()[0]) == 0
        balancer.leaving.begin(1)
        assert balancer.leaving.known(1) == (0, None)
        takers(stage, asked)
        known = balancer.leaving.known(1)
        assert known.senders == homed.count(1)
        assert known.quiet is not None
        assert known.quiet < 5
        assert len(balancer.maps["senders"].items()[0]) == homed.count(1)


def test_senders_that_are_known_stay_until_it_ends_and_others_go(stage: Stage) -> None:
    with leaving(stage) as balancer:
        early, late = senders("ipv4", 180)[:90], senders("ipv4", 180)[90:]
        before = homes(balancer, [*early, *late])
        balancer.leaving.begin(1)
        takers(stage, early)
        balancer.drain(1)
        after = homes(balancer, [*early, *late])
        assert 1 not in after
        expected = [old if old == 1 else new for old, new in zip(before[:90], after[:90], strict=True)] + after[90:]
        assert takers(stage, [*early, *late]) == expected
        assert expected.count(1) == balancer.leaving.known(1).senders > 0
        explained = [explain(balancer, sender) for sender in early[:20]]
        assert [told.taker for told in explained] == expected[:20]
        stays = next(told for told in explained if told.slot == 1)
        assert "it is known in slot 1, which is being drained, which has socket" in stays.reason
        (slot,) = (slot for slot in balancer.slots() if slot.number == 1)
        assert (slot.state, slot.leaving, slot.buckets) == ("draining", True, 0)
        balancer.leaving.end(1)
        assert takers(stage, [*early, *late]) == after
        assert balancer.leaving.known(1) == (0, None)
        assert balancer.leaving.slots() == set()


def test_two_slots_leave_and_each_ends_for_itself(stage: Stage) -> None:
    with leaving(stage) as balancer:
        asked = senders("ipv4", 90)
        before = homes(balancer, asked)
        balancer.leaving.begin(0)
        balancer.leaving.begin(1)
        takers(stage, asked)
        balancer.weigh({2: 1})
        assert takers(stage, asked) == before
        balancer.leaving.end(0)
        assert balancer.leaving.slots() == {1}
        assert takers(stage, asked) == [old if old == 1 else 2 for old in before]


def test_a_slot_that_gets_senders_again_leaves_no_more(stage: Stage) -> None:
    with leaving(stage) as balancer:
        asked = senders("ipv4", 90)
        balancer.leaving.begin(1)
        takers(stage, asked)
        balancer.drain(1)
        balancer.weigh({0: 1, 1: 1, 2: 1})
        assert balancer.leaving.slots() == set()
        assert balancer.leaving.known(1).senders == 0
        assert takers(stage, asked) == homes(balancer, asked)


def test_more_senders_than_were_expected_go_by_the_table(stage: Stage) -> None:
    with leaving(stage, 20) as balancer:
        asked = senders("ipv4", 3000)
        before = homes(balancer, asked)
        balancer.leaving.begin(1)
        takers(stage, asked)
        known = balancer.leaving.known(1).senders
        assert 0 < known <= 40 < before.count(1)
        balancer.drain(1)
        after = homes(balancer, asked)
        found = takers(stage, asked)
        assert 0 not in [found.count(0), found.count(2)]
        assert all(taken in (new, old) for taken, old, new in zip(found, before, after, strict=True))
        assert found.count(1) <= known
        assert None not in found


def test_what_an_end_that_was_killed_has_left_holds_nobody_back(stage: Stage) -> None:
    """It had marked the slot, and not forgotten its senders yet; another slot leaves, or the same again."""
    with leaving(stage) as balancer:
        asked = senders("ipv4", 90)
        balancer.leaving.begin(1)
        takers(stage, asked)
        balancer.drain(1)
        balancer.leaving._mark(set())
        after = homes(balancer, asked)
        balancer.leaving.begin(0)
        assert takers(stage, asked) == after
        assert [explain(balancer, sender).taker for sender in asked[:20]] == after[:20]
        balancer.leaving.begin(1)
        assert balancer.leaving.known(1).senders == 0
        assert takers(stage, asked) == after


def test_who_has_a_slot_by_prefix_is_not_taken_for_a_sender_of_the_one_that_leaves(stage: Stage) -> None:
    with Balancer(Policy("source+port", mapped="source"), senders=KNOWN) as balancer:
        balanced(stage, balancer, UDP, "ipv4", 2)
        asked = senders("ipv4", 60)
        balancer.place(ip_network("198.51.100.0/24"), 1)
        balancer.leaving.begin(0)
        assert set(takers(stage, asked)) == {1}
        assert balancer.leaving.known(0) == (0, None), "or their coming would keep it from ever being quiet"


def test_a_balancer_that_knows_no_senders_is_drained_by_table(stage: Stage) -> None:
    with Balancer(Policy(), size=2) as balancer:
        group(stage, UDP, "ipv4", 1)
        with pytest.raises(StateError, match="knows no senders: create it with --senders, or drain by table"):
            balancer.leaving.begin(0)
        assert balancer.leaving.slots() == set()
