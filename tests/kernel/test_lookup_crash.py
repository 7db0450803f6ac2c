"""Processes that change a dispatcher are killed: at every step of every change, and at random while two of them work.

Whatever they leave behind is whole: one of the rule sets that somebody has written, in force just as it is written.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from fastrecv import lookup_life, pins
from fastrecv.bpf import Link
from fastrecv.errors import StateError
from fastrecv.lookup import Dispatcher
from tests.kernel.crashing import (
    Pair,
    Watched,
    assert_clients_arrive,
    assert_gone,
    assert_in_force,
    assert_loads_anew,
    assert_tidy,
    attached,
    directory,
    helper,
    rules,
    served,
    steps,
    told,
)
from tests.kernel.steering import Stage

hows = pytest.mark.parametrize("how", ["killed", "raised"])


@hows
def test_a_load_that_ends_at_any_step_has_loaded_or_leaves_what_the_next_removes(
    stage: Stage, bpffs: Path, how: str
) -> None:
    seen = Counter[bool]()
    for place in steps("load", how, stage, bpffs):
        loaded = (directory(stage, bpffs) / "link").exists()
        seen[loaded] += 1
        if not loaded:
            assert how == "killed" or not [*directory(stage, bpffs).glob("*")], place
            assert_loads_anew(stage, bpffs)
        assert_tidy(directory(stage, bpffs))
        with Dispatcher(bpffs=bpffs) as dispatcher:
            assert_in_force(dispatcher, {})
            assert dispatcher.bindings == []
        lookup_life.unload(bpffs=bpffs)
        assert_gone(stage, bpffs)
    assert seen[False] > 20
    assert seen[True]
    lookup_life.unload(bpffs=bpffs)  # the one that was not hindered
    assert_gone(stage, bpffs)


@hows
def test_an_unload_that_ends_at_any_step_has_detached_or_leaves_all_in_force(
    stage: Stage, bpffs: Path, how: str
) -> None:
    cookies = served(stage)
    lookup_life.load(bpffs=bpffs)
    seen = Counter[bool]()
    for _ in steps("unload", how, stage, bpffs):
        loaded = (directory(stage, bpffs) / "link").exists()
        seen[loaded] += 1
        if not loaded:
            assert_loads_anew(stage, bpffs)
        assert_tidy(directory(stage, bpffs))
        with Dispatcher(bpffs=bpffs) as dispatcher:
            assert told(dispatcher.bindings) == ((1 if loaded and sum(seen.values()) > 1 else None), False)
            dispatcher.replace_bindings(rules(1))
            assert_in_force(dispatcher, cookies)
    assert min(seen[False], seen[True]) > 3
    assert_gone(stage, bpffs)


def test_an_unload_has_detached_when_it_returns_whoever_holds_the_link_open(stage: Stage, bpffs: Path) -> None:
    lookup_life.load(bpffs=bpffs)
    with Link.open(directory(stage, bpffs) / "link") as link:
        assert link.info.netns_inode == stage.namespace.inode
        lookup_life.unload(bpffs=bpffs)
        assert link.info.netns_inode == 0
        assert_gone(stage, bpffs)


@hows
@pytest.mark.parametrize("change", ["replace", "register", pytest.param("upgrade", marks=pytest.mark.proof)])
def test_a_change_that_ends_at_any_step_is_finished_or_taken_back(
    stage: Stage, bpffs: Path, change: str, how: str
) -> None:
    cookies = served(stage)
    cookies["new"] = cookies["set2"]
    lookup_life.load(bpffs=bpffs)
    with Dispatcher(bpffs=bpffs) as dispatcher:
        for label in ("set1", "set2"):
            dispatcher.register(label, [stage.servers[label]])
        dispatcher.replace_bindings(rules(1))
    (before,) = attached(stage)
    seen = Counter[bool]()
    healed = 0
    for place in steps(change, how, stage, bpffs):
        (now,) = attached(stage)
        seen[now != before] += 1
        expected = rules(2) if change == "replace" and now != before else rules(1)
        with Dispatcher(bpffs=bpffs, read_only=True) as reading:
            assert reading.bindings == expected, place
            assert_in_force(reading, cookies)
        with Watched(bpffs=bpffs) as dispatcher:
            healed += dispatcher.healed
            assert dispatcher.bindings == expected, place
            assert_in_force(dispatcher, cookies)
            assert_tidy(directory(stage, bpffs))
            assert_clients_arrive(stage, dispatcher)
            with contextlib.suppress(StateError):
                dispatcher.unregister("new")
            dispatcher.replace_bindings(rules(1))
            before = dispatcher.program.info.id
    assert seen[False] > 10
    print(f"\n{change}, {how} at {seen.total()} steps: {seen[True]} in force all the same, {healed} put right")
    if change != "register":
        assert healed > 10
        assert seen[True] > 5
    lookup_life.unload(bpffs=bpffs)
    assert_gone(stage, bpffs)


@hows
def test_putting_things_right_may_end_at_any_step_too(
    stage: Stage, bpffs: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(link: Path, target: str) -> None:
        raise InterruptedError(f"{link.name} is not turned to {target}")

    cookies = served(stage)
    lookup_life.load(bpffs=bpffs)
    numbers = [3]

    def half_done() -> None:
        """A change that ended between the update of the link and the turn of `current`."""
        numbers.append(7 - numbers[-1])
        with monkeypatch.context() as patched, Dispatcher(bpffs=bpffs) as dispatcher:
            patched.setattr(pins, "point", refuse)
            with pytest.raises(InterruptedError):
                dispatcher.replace_bindings(rules(numbers[-1]))

    half_done()
    opened = 0
    for place in steps("open", how, stage, bpffs):
        opened += 1
        for kind in (True, False):
            with Dispatcher(bpffs=bpffs, read_only=kind) as dispatcher:
                assert told(dispatcher.bindings) == (numbers[-1], False), place
                assert_in_force(dispatcher, cookies)
        assert_tidy(directory(stage, bpffs))
        half_done()
    assert opened > 10
    assert_tidy(directory(stage, bpffs))
    lookup_life.unload(bpffs=bpffs)
    assert_gone(stage, bpffs)


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.proof)])
def test_two_processes_change_the_state_and_are_killed_at_random_and_it_is_always_whole(
    stage: Stage, bpffs: Path, seconds: float
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"\nseed {seed}")
    draw, found = random.Random(seed), Counter[str]()
    cookies = served(stage)

    def look(read_only: bool) -> None:
        try:
            with Watched(bpffs=bpffs, read_only=read_only) as dispatcher:
                found["whole, put right" if dispatcher.healed else "whole"] += 1
                assert_in_force(dispatcher, cookies)
                if not read_only:
                    assert_tidy(directory(stage, bpffs))
                    assert_clients_arrive(stage, dispatcher)
        except StateError as error:
            if "no dispatcher is loaded" not in str(error):
                raise
            found["not loaded"] += 1

    with (
        helper("working", stage, bpffs, str(seed), "1") as one,
        helper("working", stage, bpffs, str(seed + 1), "2") as other,
    ):
        pair = Pair([one, other])
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if draw.random() < 0.5:
                pair.listen_for(draw.uniform(0, 0.06))
                pair.kill(draw.choice(pair.fds))
            else:  # in the midst of a change
                pair.pinning = None
                while pair.pinning is None and time.monotonic() < deadline:
                    pair.listen(0.1)
                pair.listen_for(draw.uniform(0, 0.003))
                pair.kill(pair.pinning)
            assert len(pair.fds) == 2
            if draw.random() < 0.1:
                look(draw.random() < 0.5)
        pair.end()
    look(read_only=True)
    look(read_only=False)
    with contextlib.suppress(StateError):
        lookup_life.load(bpffs=bpffs)
    look(read_only=False)
    lookup_life.unload(bpffs=bpffs)
    assert_gone(stage, bpffs)
    assert pair.kills > seconds
    print(f"{pair.kills} kills; seen by the test: {dict(found)}; the longest operation took {pair.longest:.2f} s")
    for what, times in sorted(pair.did.items()):
        print(f"{times:7,} {what}")
