"""Processes that make, change and end a balancer are killed before every line that they would execute.

Whatever they leave behind is none or a whole one, and the next who comes puts it in order.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from fastrecv import balance, balance_life, balance_maps, buckets, leaving, pins
from fastrecv.errors import StateError
from fastrecv.policies import BUCKETS, Policy
from tests.kernel.balancing import balanced, homes, senders, takers
from tests.kernel.steering import UDP, Stage

pytestmark = [
    pytest.mark.usefixtures("quick"),  # hundreds of balancers are made and ended, table by table
    pytest.mark.alone,  # for that, RCU is expedited on the whole host
]

FILES = {module.__file__ for module in (balance, balance_life, balance_maps, leaving, pins)}
CHANGING = {
    *("create", "_make", "give_to", "make", "pin", "write_document", "destroy", "remove"),
    *("weigh", "settle", "turn_to", "begin", "end", "_mark", "_forget"),
}  # functions whose lines are the steps


def killed_before(action: Callable[[], object]) -> Iterator[str]:
    """Do something in a process that is killed before its first step, its second, ... Gives where, each time."""
    for number in count(1):
        heard, told = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                sys.settrace(_trap(number, told))
                action()
                sys.settrace(None)
                code = 0
            finally:
                os._exit(code)
        os.close(told)
        with os.fdopen(heard) as file:
            place = file.read()
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not place:
            assert ended == 0, "the action has failed by itself"
            return
        assert ended == -signal.SIGKILL
        yield place


def _trap(left: int, told: int) -> Callable[[FrameType, str, Any], Any]:
    def line(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        left -= event == "line"
        if left == 0 and event == "line":
            os.write(told, f"{frame.f_code.co_name}, line {frame.f_lineno}".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        return line

    def call(frame: FrameType, _event: str, _argument: object) -> Any:
        return line if frame.f_code.co_filename in FILES and frame.f_code.co_name in CHANGING else None

    return call


def created(bpffs: Path, seed: int | None = None) -> None:
    with balance_life.create("flows", Policy("source+port", seed=seed), 3, senders=100, bpffs=bpffs) as balancer:
        assert balancer.weights == {0: 1, 1: 1, 2: 1}
        assert buckets.shares(balancer.maps.table()).keys() == {0, 1, 2}


def assert_none_or_whole(bpffs: Path) -> bool:
    names = balance_life.names(bpffs)
    if not names:
        with pytest.raises(StateError, match="there is no balancer 'flows'"), balance_life.opened("flows", bpffs=bpffs):
            pass
        return False
    assert names == ["flows"]
    with balance_life.opened("flows", bpffs=bpffs, read_only=True) as reading:
        assert reading.weights == {0: 1, 1: 1, 2: 1}
    return True


def test_a_create_that_is_killed_leaves_none_or_a_whole_one_and_the_next_goes_on(bpffs: Path) -> None:
    seen = Counter[bool]()
    for place in killed_before(lambda: created(bpffs)):
        whole = assert_none_or_whole(bpffs)
        seen[whole] += 1
        created(bpffs, None if whole else 1000 + seen.total())
        left = {entry.name for entry in (bpffs / "fastrecv" / "balance-flows").iterdir()}
        assert "document-new" not in left, place
        assert len(left) == 13
        balance_life.destroy("flows", bpffs=bpffs)
    assert seen[False] > 30
    assert seen[True] > 0
    balance_life.destroy("flows", bpffs=bpffs)
    assert [*(bpffs / "fastrecv").iterdir()] == []


def test_a_destroy_that_is_killed_leaves_none_or_a_whole_one(bpffs: Path) -> None:
    seen = Counter[bool]()
    created(bpffs)
    for _ in killed_before(lambda: balance_life.destroy("flows", bpffs=bpffs)):
        seen[assert_none_or_whole(bpffs)] += 1
        created(bpffs)
    assert seen[False] > 10
    assert seen[True] > 2
    assert [*(bpffs / "fastrecv").iterdir()] == []


def test_weights_whose_setting_is_killed_are_put_in_force_by_the_next_or_are_as_before(
    stage: Stage, bpffs: Path
) -> None:
    first, second = {0: 1, 1: 1, 2: 1}, {0: 1, 1: 5}
    created(bpffs)
    with balance_life.opened("flows", bpffs=bpffs) as balancer:
        balanced(stage, balancer, UDP, "ipv4", 3)
        before = balancer.maps.table()
        after = buckets.rebalance(before, second)

    def change() -> None:
        with balance_life.opened("flows", bpffs=bpffs) as balancer:
            balancer.weigh(second)

    seen = Counter[tuple[bool, bool]]()
    asked = senders("ipv4", 60)
    for place in killed_before(change):
        with balance_life.opened("flows", bpffs=bpffs, read_only=True) as reading:
            table, weights = reading.maps.table(), reading.weights
            assert weights in (first, second), place
            assert np.array_equal(table, before) or np.array_equal(table, after), place
            assert takers(stage, asked) == homes(reading, asked)
            seen[weights == second, np.array_equal(table, after)] += 1
        with balance_life.opened("flows", bpffs=bpffs) as balancer:
            assert balancer.weights == weights
            assert np.array_equal(balancer.maps.table(), after if weights == second else before), place
            balancer.weigh(first)
            before = balancer.maps.table()
            after = buckets.rebalance(before, second)
    assert seen[False, False] > 0
    assert seen[True, False] > 3, "killed between weights and table"
    assert seen[True, True] > 0
    assert seen[False, True] == 0
    assert len(before) == BUCKETS


def test_a_leaving_whose_end_is_killed_holds_no_sender_back(stage: Stage, bpffs: Path) -> None:
    """Another slot leaves at the time: what is known is looked at."""
    created(bpffs)
    asked = senders("ipv4", 20)
    with balance_life.opened("flows", bpffs=bpffs) as balancer:
        balanced(stage, balancer, UDP, "ipv4", 3)

    def begin() -> list[int]:
        with balance_life.opened("flows", bpffs=bpffs) as balancer:
            balancer.leaving.end(0)
            balancer.weigh({0: 1, 1: 1, 2: 1})
            known = homes(balancer, asked)
            balancer.leaving.begin(1)
            assert takers(stage, asked) == known
            balancer.drain(1)
            balancer.leaving.begin(0)
        return known

    def end() -> None:
        with balance_life.opened("flows", bpffs=bpffs) as balancer:
            balancer.leaving.end(1)

    seen = Counter[bool]()
    known = begin()
    for place in killed_before(end):
        with balance_life.opened("flows", bpffs=bpffs) as balancer:
            leaves = 1 in balancer.leaving.slots()
            seen[leaves] += 1
            now = homes(balancer, asked)
            assert 1 not in now
            assert takers(stage, asked) == [
                1 if leaves and old == 1 else new for old, new in zip(known, now, strict=True)
            ], place
        known = begin()
    assert min(seen[True], seen[False]) > 1
