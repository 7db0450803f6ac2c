"""The receive bench: how fast one socket can be drained, by which receiver.

A socket is filled first and drained then, and only the drain is timed, on one pinned CPU: what a datagram costs on its
way into the queue is the same for all and none of the receiver's business. Every drain has a socket and a contender of
its own, warmed by a small one, so that no contender keeps what luck its memory had.

The queue is thousands of datagrams deep and lies in memory, not in a cache, and freeing an injected datagram gives its
page back to a pool that no longer fills anything. Both cost every contender the same nanoseconds, and what
all share draws ratios towards 1: it is the difference between two rows that belongs to the receivers.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from fastrecv import Receiver, features, sockets
from fastrecv.bench import environment
from fastrecv.bench.lab import Lab, quick_grace_periods
from fastrecv.bench.limit import compiled
from fastrecv.bench.prefill import Traffic, Trains
from fastrecv.bench.receive_groups import GROUPS, SOURCES
from fastrecv.bench.receive_results import Comparison, Drained, Group, ReceiveResult, summarise
from fastrecv.bench.receivers import Contender, missing
from fastrecv.bench.results import Gate
from fastrecv.bench.stage import pinned

__all__ = ["NEEDS", "Drain", "Plan", "drain", "run"]

NEEDS = (
    "network namespaces",
    "expedited RCU grace periods",
    "veth devices",
    "UDP sockets in a SOCKMAP",
    "live frames in BPF_PROG_RUN",
)

_PROOF = 3000  # datagrams of the pass that looks at every byte
_NOISY = 2.0  # percent: an A/A row's half-width worth a warning


@dataclass(frozen=True)
class Plan:
    """What a run is to measure. groups : names in GROUPS. datagrams : of a drain."""

    groups: list[str]
    rounds: int
    datagrams: int
    seed: int
    cpu: int

    @property
    def steps(self) -> int:
        """How many drains that makes."""
        return self.rounds * sum(len(GROUPS[name].contenders) for name in self.groups)


@dataclass(frozen=True)
class Drain:
    """One drain: its time, what was sent, what came out, and how many the socket had no room for."""

    ns: int
    sent: int
    drained: int
    dropped: int


OnStep = Callable[[str], None]


def run(plan: Plan, on_step: OnStep) -> ReceiveResult:
    """Measure what the plan says. on_step : called after every drain with the group's name.

    NotSupported when the kernel, the privileges or the compiler lack something.
    """
    for name in NEEDS:
        features.check(name)
    compiled()
    known = environment.record()
    with suppress(PackageNotFoundError):
        known["uvloop"] = version("uvloop")
    result = ReceiveResult(
        version=version("fastrecv"),
        started=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        argv=sys.argv[1:],
        seed=plan.seed,
        cpu=plan.cpu,
        rounds=plan.rounds,
        datagrams=plan.datagrams,
        sources=SOURCES,
        environment=known,
        warnings=environment.warn_about_host(known),
    )
    rng = np.random.default_rng(plan.seed)
    gc.freeze()  # what was imported is no garbage, and every drain has a collection before it
    try:
        with quick_grace_periods(), Lab() as lab, pinned(plan.cpu):
            for name in plan.groups:
                result.groups.append(_measure(name, lab, plan, rng, on_step))
    finally:
        gc.unfreeze()
    result.warnings += [warning for group in result.groups for warning in _noise(group)]
    return result


def _measure(name: str, lab: Lab, plan: Plan, rng: np.random.Generator, on_step: OnStep) -> Group:
    group = GROUPS[name]
    record = Group(
        name=name, title=group.title, payload=group.payload,
        comparisons=[Comparison(title=title, pairs=pairs) for title, pairs in group.comparisons.items()],
    )  # fmt: skip
    running = []
    for contender in group.contenders:
        if library := missing(contender):
            record.missing[contender.title] = library
        else:
            running.append(contender)
            record.rows.append(Drained(name=contender.name, title=contender.title, kind=contender.kind))
    wrong = ""
    with group.traffic(lab) as traffic:
        for _ in range(plan.rounds):
            order = rng.permutation(len(running)).tolist()
            for index in order:
                wrong = wrong or _one(record.rows[index], running[index], traffic, plan.datagrams)
                on_step(name)
            if wrong:
                break
            record.order.append(order)
        if isinstance(traffic, Trains):
            record.gates.append(_same_bytes(traffic, group.payload, rng))
    total = sum(sum(row.drained) for row in record.rows)
    record.gates.append(
        Gate(name="exact counts", passed=not wrong, detail=wrong or f"{total:,} datagrams sent and drained")
    )
    summarise(record)
    return record


def _same_bytes(traffic: Trains, size: int, rng: np.random.Generator) -> Gate:
    """Whether trains, cut by the kernel or by the Receiver, come out as they went in; a pass of its own, not timed."""
    payloads = [rng.bytes(size) for _ in range(_PROOF)]
    wrong = ""
    for gro in (False, True):
        with closing(traffic.open(_PROOF)) as sock, Receiver(sock, gro=gro) as receiver:
            traffic.send(sock, payloads)
            found = []
            while batch := receiver.recv(0):
                found += [data for data, _ in batch.datagrams()]
        if found != payloads:
            wrong = f"{_PROOF:,} datagrams sent, {len(found):,} received that are not the same, gro={gro}"
    return Gate(name="same bytes", passed=not wrong, detail=wrong or f"{_PROOF:,} datagrams, with GRO and without")


def _one(row: Drained, contender: Contender, traffic: Traffic, datagrams: int) -> str:
    """Drain once and keep what it gave where everything adds up; else what does not, in words."""
    done = drain(contender, traffic, datagrams)
    if done.drained == done.sent == datagrams:
        row.ns.append(done.ns)
        row.sent.append(done.sent)
        row.drained.append(done.drained)
        return ""
    wrong = f"round {len(row.ns) + 1}, {row.name}: {done.sent:,} datagrams sent, {done.drained:,} drained"
    if done.dropped:
        wrong += (
            f", {done.dropped:,} refused by the socket: net.ipv4.udp_mem leaves no room for them, ask for fewer with "
            "--datagrams"
        )
    return wrong


def drain(contender: Contender, traffic: Traffic, datagrams: int) -> Drain:
    """Fill a socket and let the contender empty it, on the clock; nothing is drained of a socket that lost some."""
    with closing(traffic.open(datagrams)) as sock, contender.open(sock) as ready:
        for count in (min(contender.warm, datagrams), datagrams):
            sent = traffic.fill(sock, count)
            if dropped := sockets.drops(sock):
                return Drain(0, sent, sent - dropped, dropped)
            timed = ready(sent)
            gc.collect()
            gc.disable()  # as timeit does
            try:
                began = time.perf_counter_ns()
                drained = timed()
                ns = time.perf_counter_ns() - began
            finally:
                gc.enable()
            if drained != sent:
                break
    return Drain(ns, sent, drained, 0)


def _noise(group: Group) -> list[str]:
    """What is unsteady about a group, by the row that ran twice."""
    found = []
    for ratio in group.comparisons[0].ratios:
        if not ratio.row.endswith("-again"):
            continue
        half = 50 * (ratio.high - ratio.low)
        if half > _NOISY:
            found.append(f"{group.name}: the A/A half-width is {half:.1f} %, and less than that is not resolved")
        if not ratio.low <= 1 <= ratio.high:
            off = 100 * abs(ratio.estimate - 1)
            found.append(f"{group.name}: the A/A row is {off:.1f} % off, and its 95 % interval excludes 1, as one in "
                         "twenty does by chance: less than that is not resolved")  # fmt: skip
    return found
