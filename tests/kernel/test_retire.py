"""What a member that is closed under a flood loses unseen, and that a retired one loses nothing."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest
from pyroute2 import IPRoute

from fastrecv import groups
from fastrecv.balance import Balancer
from fastrecv.bench.numbered import NumberedSource, udp_counters
from fastrecv.bench.resize import Member, settle
from fastrecv.netns import Namespace
from fastrecv.policies import Policy
from fastrecv.reuseport import retire
from fastrecv.steerable import cookie_of
from tests.kernel.balancing import group, senders, takers
from tests.kernel.privileges import only
from tests.kernel.steering import UDP, Stage


def lost(seconds: float, retired: bool) -> tuple[int, int]:
    """How many members came and went under a flood, and how many datagrams are in no counter afterwards."""
    with contextlib.ExitStack() as stack:
        namespace = stack.enter_context(contextlib.closing(Namespace()))
        stack.enter_context(namespace)
        with IPRoute() as net:
            net.link("set", index=1, state="up")
        balancer = stack.enter_context(Balancer(Policy("source"), size=2))
        members = [Member(slot) for slot in range(2)]
        for member in members:
            stack.callback(member.sock.close)
        for slot, member in enumerate(members):
            balancer.register(slot, member.sock)
        balancer.attach(members[0].sock)
        source = stack.enter_context(NumberedSource(namespace, 2000, "127.0.0.1", 2055))
        deadline, received, closed = time.monotonic() + seconds, 0, 0
        while time.monotonic() < deadline:
            guest = Member(2)
            balancer.register(2, guest.sock)
            balancer.resize(3)
            balancer.resize(2)
            if retired:
                balancer.retire(2, guest.sock)
            guest.end()
            received += len(guest.rows())
            closed += 1
        sent = source.stop()
        settle(namespace, sent)
        for member in members:
            member.end()
            received += len(member.rows())
        counters = udp_counters(namespace)
        return closed, sent - received - sum(counters[name] for name in ("RcvbufErrors", "MemErrors", "NoPorts"))


@pytest.mark.parametrize("seconds", [2.5, pytest.param(20, marks=pytest.mark.proof)])
def test_a_member_that_is_retired_before_it_is_closed_loses_nothing(seconds: float) -> None:
    closed, missing = lost(seconds, retired=True)
    assert closed > 6 * seconds
    assert missing == 0


@pytest.mark.proof
def test_a_member_that_is_only_drained_and_closed_loses_one_now_and_then_unseen() -> None:
    """So the test above can fail: three or four of 200 closes, seen on two CPUs."""
    closed, missing = 0, 0
    while not missing and closed < 2000:
        more, missing = lost(20, retired=False)
        closed += more
    assert missing > 0, f"{closed} members were closed, and nothing was lost: is the kernel mended?"


def test_a_retired_member_matches_nothing_and_is_in_no_group(stage: Stage) -> None:
    members = group(stage, UDP, "ipv4", 3)
    members[2].setblocking(False)
    with only():
        retire(members[2])
    assert set(takers(stage, senders("ipv4", 60))) == {0, 1}
    assert cookie_of(members[2]) not in {one.cookie for one in groups.members()}
    stage.servers.pop("2")
    with socket.socket(socket.AF_INET, UDP) as other:  # its address is free for others all the same
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(members[2].getsockname())
