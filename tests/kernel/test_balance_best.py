"""Balancer.best, and a program that somebody has replaced: never silently in the place of another's."""

from __future__ import annotations

import socket

import pytest

from fastrecv import groups
from fastrecv.balance import Balancer
from fastrecv.balance_explain import explain
from fastrecv.classic import Filter
from fastrecv.errors import BpfError, StateError
from fastrecv.policies import Policy
from fastrecv.reuseport import detach
from tests.kernel.balancing import group, senders, taker
from tests.kernel.privileges import CAP_BPF, only
from tests.kernel.steering import PORT, TCP, UDP, Stage, kinds, nets


@kinds
def test_with_the_privileges_it_is_a_balancer(stage: Stage, kind: int) -> None:
    members = group(stage, kind, "ipv4", 3)
    found = Balancer.best(Policy("source"), members)
    assert isinstance(found, Balancer)
    with found:
        assert groups.program_of(members[0]) == found.maps.program.info.id
        asked = senders("ipv4", 40)
        assert [taker(stage, kind, one) for one in asked] == [explain(found, one).taker for one in asked]


@kinds
def test_without_them_it_is_classic_bpf(stage: Stage, kind: int) -> None:
    members = group(stage, kind, "ipv4", 3)
    with only():
        found = Balancer.best(Policy("source"), members)
    assert isinstance(found, Filter)
    assert groups.program_of(members[0]) == groups.CLASSIC
    asked = senders("ipv4", 40)
    assert [taker(stage, kind, one) for one in asked] == [found.index(one) for one in asked]


def test_what_classic_bpf_alone_can_is_classic_and_what_it_cannot_fails_without_privileges(stage: Stage) -> None:
    members = group(stage, UDP, "ipv4", 2)
    assert isinstance(Balancer.best(Policy("mark"), members), Filter)
    assert detach(members[0])
    with only(), pytest.raises(BpfError, match="CAP_BPF"):
        Balancer.best(Policy("quic", length=8), members)
    assert groups.program_of(members[0]) is None
    with pytest.raises(ValueError, match="no members"):
        Balancer.best(Policy(), [])


@pytest.mark.parametrize("present", ["ebpf", "classic"])
def test_a_program_that_is_there_is_replaced_only_when_that_is_said(stage: Stage, present: str) -> None:
    members = group(stage, UDP, "ipv4", 2)
    with Balancer(Policy(), size=2) as other:
        if present == "ebpf":
            other.attach(members[0])
            named = f"has program {other.maps.program.info.id}"
        else:
            Filter(Policy(), 2).attach(members[0])
            named = "has a classic BPF program"
        before = groups.program_of(members[0])
        with pytest.raises(StateError, match=f"port 7007 {named}: detach that, or say replace=True"):
            Balancer.best(Policy(), members)
        assert groups.program_of(members[0]) == before
    found = Balancer.best(Policy(), members, replace=True)
    assert isinstance(found, Balancer)
    with found:
        assert groups.program_of(members[0]) == found.maps.program.info.id


@kinds
@nets
def test_who_may_not_look_shares_his_group_with_nobody(stage: Stage, kind: int, net: str) -> None:
    mine = [stage.serve(str(number), kind, net.format(1), PORT, reuseport=True) for number in range(2)]
    stage.serve("elsewhere", kind, net.format(2), PORT, reuseport=True)
    stage.serve("another port", kind, net.format(1), PORT + 1, reuseport=True)
    with only():
        assert isinstance(Balancer.best(Policy(), mine), Filter)
        other = stage.serve("other", kind, net.format(1), PORT, reuseport=True)
        with pytest.raises(StateError, match=r"others have joined the group of .* replace=True replaces whatever"):
            Balancer.best(Policy(), mine)
        assert isinstance(Balancer.best(Policy(), mine, replace=True), Filter)
        assert isinstance(Balancer.best(Policy(), [*mine, other]), Filter)


def test_a_connected_socket_is_nobody_who_shares_the_group(stage: Stage) -> None:
    members = group(stage, UDP, "ipv4", 2)
    client = stage.bind(UDP, "198.51.100.7", 4242)
    gone = stage.bind(UDP, "0.0.0.0", PORT, reuseport=True)  # noqa: S104 - a private namespace
    gone.connect(client.getsockname())
    assert not groups.has_others(members)


def test_whoever_holds_the_group_puts_its_program_back(stage: Stage) -> None:
    members = group(stage, TCP, "ipv4", 2)
    with Balancer(Policy(), size=2) as balancer, Balancer(Policy(), size=2) as other:
        assert balancer.put_back(members[0]), "it had none"
        assert not balancer.put_back(members[1]), "it is there"
        for spoil in (
            lambda: other.attach(members[1]),
            lambda: Filter(Policy(), 2).attach(members[0]),
            lambda: detach(members[1]),
        ):
            spoil()
            assert balancer.put_back(members[0])
            assert groups.program_of(members[1]) == balancer.maps.program.info.id
        with only(CAP_BPF), pytest.raises(PermissionError, match="CAP_PERFMON"):
            balancer.put_back(members[0])


def test_a_failure_half_way_leaves_the_group_as_it_was(stage: Stage) -> None:
    (member,) = group(stage, UDP, "ipv4", 1)
    with socket.socket(socket.AF_INET, UDP) as unbound, pytest.raises(OSError, match="is in no group yet"):
        Balancer.best(Policy(), [member, unbound])
    assert groups.program_of(member) is None
