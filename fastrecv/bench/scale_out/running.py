"""A run: throughput with one host, two, and so on, then a steady rate while everything befalls; and what came of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastrecv.bench.scale_out import account
from fastrecv.bench.scale_out.account import Account, Moves
from fastrecv.bench.scale_out.bed import Policy
from fastrecv.bench.scale_out.engine import Held
from fastrecv.bench.scale_out.exporters import RECORDS
from fastrecv.bench.scale_out.hosts import BATCH
from fastrecv.bench.scale_out.scene import Scene
from fastrecv.bench.scale_out.throughput import Throughput, measured

__all__ = ["FAULTS", "Due", "Plan", "Run", "run", "schedule"]

Due = tuple[float, str]
"""Seconds from the beginning, and the name of what Scene does then."""
FAULTS: Sequence[tuple[float, str]] = (
    (0.05, "kill_node"), (0.20, "return_node"), (0.30, "kill_host"), (0.50, "return_host"),
    (0.60, "restart_consumer"), (0.70, "add_host"), (0.80, "restart_consumer"), (0.90, "remove_host"),
)  # fmt: skip
"""Each once, in this order, at about this part of the time. Workers are killed beside it, at random."""
_JITTER = 0.04  # of the time
_KILLS = 12  # workers a minute
_FEWEST = 2  # of them
_MEASURED = 0.1  # of the time: a throughput
_UNLIMITED = 1 << 62
_TICK = 0.02  # seconds


class Plan(NamedTuple):
    """rate : records a second. seconds : that all that befalls is spread over; it may take a little longer."""

    hosts: int
    exporters: int
    seconds: float
    rate: int
    seed: int
    policy: Policy


class Run(NamedTuple):
    """What came of it. cpus : that all processes shared. seconds, records : at the steady rate. held : by the engine.
    spooled : records that the killed host had acknowledged, and that nobody else had while it was away.
    """

    cpus: int
    throughput: Sequence[Throughput]
    seconds: float
    records: int
    done: dict[str, int]
    account: Account
    moves: Moves
    spooled: int
    held: Held
    faults: list[str]


def schedule(seconds: float, seed: int) -> list[Due]:
    """What befalls when, in order of time."""
    rng = np.random.default_rng(seed)
    due = [((at + float(rng.uniform(0, _JITTER))) * seconds, what) for at, what in FAULTS]
    kills = max(_FEWEST, round(_KILLS * seconds / 60))
    due += [((number + float(rng.uniform(0, 1))) / kills * seconds, "kill_worker") for number in range(kills)]
    return sorted(due)


def run(plan: Plan, say: Callable[[str], None]) -> Run:
    """Do it. say : is told what happens. RuntimeError where something does not do what it was told to.

    Root: namespaces, BPF. Needs nats-server, and Linux 5.14 as `fastrecv run` does.
    """
    say(f"{plan.hosts} hosts, three engine nodes and two consumers are started")
    with _folder() as folder, Scene(folder, plan.hosts, plan.exporters, plan.policy, plan.seed) as scene:
        _steady(plan, scene)
        throughput = [_throughput(plan, scene, hosts, say) for hosts in range(1, plan.hosts + 1)]
        before, began = scene.source.sent, time.monotonic()
        _drive(scene, schedule(plan.seconds, plan.seed), began, plan.seconds, say)
        seconds, records = time.monotonic() - began, RECORDS * (scene.source.sent - before)
        say("the end: all is let come to the consumers")
        datagrams = scene.finish()
        found, moves = _judged(plan, scene, datagrams)
        return Run(
            len(os.sched_getaffinity(0)), throughput, seconds, records, dict(scene.done), found, moves, scene.spooled,
            scene.engine.held(), account.faults(found, BATCH),
        )  # fmt: skip


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fastrecv-scale-out-") as made:
        yield Path(made)


def _steady(plan: Plan, scene: Scene) -> None:
    scene.source.pace(max(1, plan.rate // RECORDS))
    scene.source.allow(_UNLIMITED)


def _throughput(plan: Plan, scene: Scene, hosts: int, say: Callable[[str], None]) -> Throughput:
    if hosts > 1:
        scene.share(hosts)
    pids = {
        "hosts": [pid for number in scene.routed for pid in scene.hosts[number].pids],
        "engine": scene.engine.pids, "consumers": scene.consumers.pids,
    }  # fmt: skip
    found = measured(hosts, max(1.0, _MEASURED * plan.seconds), scene.source, scene.consumers, scene.engine, pids)
    _steady(plan, scene)
    say(f"{hosts} of the hosts: {found.rate:,.0f} records a second")
    return found


def _drive(
    scene: Scene, due: Sequence[Due], began: float, seconds: float, say: Callable[[str], None]
) -> None:  # fmt: skip
    """Do all that is due, each thing at its time or as soon after as it can be."""
    for at, what in [*due, (seconds, "")]:
        while time.monotonic() - began < at:
            scene.consumers.look()
            time.sleep(_TICK)
        if what:
            words = getattr(scene, what)()
            say(f"{time.monotonic() - began:.1f} s: {words}; {scene.consumers.count():,} records at the consumers")


def _judged(plan: Plan, scene: Scene, datagrams: int) -> tuple[Account, Moves]:
    acknowledged = [host.acknowledged() for host in scene.hosts.values()]
    hosts = [
        account.at_host(
            number, scene.bed.arrived(number), scene.bed.counters(number), len(rows),
            killed=number in scene.killed, deaths=scene.hosts[number].deaths,
        )
        for number, rows in zip(scene.hosts, acknowledged, strict=True)
    ]  # fmt: skip
    delivered = account.deliveries(scene.consumers.delivered(), sum(host.removed() for host in scene.hosts.values()))
    found = account.judged(plan.exporters, datagrams, hosts, acknowledged, scene.consumers.kept(), delivered)
    return found, account.moves(acknowledged, plan.exporters, scene.source.phase + 1, scene.changes)
