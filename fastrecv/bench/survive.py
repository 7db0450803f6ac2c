"""Whether a service survives: killed, restarted, resized and hung, while every datagram is found again.

Everything in a private namespace, over loopback. What is not as it must be is a fault, in words.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastrecv.bench import survive_account
from fastrecv.bench.numbered import NumberedSource, udp_counters
from fastrecv.bench.survive_account import Account, Readers, Step, Stray
from fastrecv.bench.survive_baselines import Kind, Usual
from fastrecv.bench.survive_churn import ACTIONS, Action, Due, Pace, Pattern, calm, drive, schedule
from fastrecv.bench.survive_service import ADDRESS, PORT, namespace
from fastrecv.bench.survive_supervised import BATCH, BUFFER, Supervised
from fastrecv.netns import Namespace

__all__ = ["COMPARED", "WINDOW", "Plan", "Run", "faults", "supervised", "usual"]

WINDOW = 2 * BUFFER // 1280
"""Datagrams that one queue has room for: SO_RCVBUF is doubled (socket(7)), a small datagram is charged 1,280 bytes."""
COMPARED: tuple[Action, ...] = ("kill", "restart")
_MOVED = 1.1  # times the ideal
_CHANCE = 4.0  # standard deviations


class Plan(NamedTuple):
    """seconds : that what is to happen is spread over; it may take a little longer."""

    workers: int
    senders: int
    seconds: float
    seed: int
    actions: Sequence[Action] = ACTIONS

    def due(self) -> list[Due]:
        return schedule(self.actions, self.seconds, self.seed)


class Run(NamedTuple):
    """What came of it.

    waited : the share of the time that the source waited for queues. done : what was done, how often. deaths : of
    workers, which may have had datagrams in their hands. misdirected : datagrams; strays : the first of them. unknown :
    how often nobody was seen to have a sender between two changes. faults : what is wrong. readers : of `fastrecv run`.
    """

    title: str
    seconds: float
    waited: float
    done: dict[str, int]
    deaths: int
    account: Account
    misdirected: int
    unknown: int
    steps: list[Step]
    faults: list[str]
    readers: Readers = Readers(0, 0)
    strays: Sequence[Stray] = ()

    @property
    def rate(self) -> float:
        """Datagrams a second."""
        return self.account.sent / self.seconds


OnLook = Callable[[float, Pattern], None]
"""Called about a hundred times a second, with the seconds since the beginning."""


def supervised(
    plan: Plan, on_look: OnLook, *, due: Sequence[Due] | None = None, rate: float | None = None,
    spared: frozenset[int] = frozenset(),
) -> Run:  # fmt: skip
    """`fastrecv run` under the plan. Root: namespaces, BPF.

    due : instead of the plan's schedule. rate : datagrams a second, instead of as many as the queues hold. spared :
    slots whose workers are not killed. RuntimeError where the service does not do what it was told to.
    """
    with _folder() as folder, namespace() as space:
        pattern = Supervised(folder, plan.workers, plan.senders, plan.seed, spared)
        run = _measure(pattern, space, plan, plan.due() if due is None else due, rate, on_look)
        run = run._replace(readers=pattern.service.readers())
    return run._replace(faults=faults(run))


def usual(kind: Kind, plan: Plan, rate: float, on_look: OnLook) -> Run:
    """A pattern to compare with, under the plan's kills and restarts. Root. It has no faults: it is as it is.

    rate : datagrams a second.
    """
    with _folder() as folder, namespace() as space:
        pattern = Usual(kind, folder, 1 if kind == "asyncio" else plan.workers, plan.senders, plan.seed)
        return _measure(pattern, space, plan, [one for one in plan.due() if one[1] in COMPARED], rate, on_look)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fastrecv-survive-") as made:
        yield Path(made)


def _measure(
    running: Pattern, space: Namespace, plan: Plan, due: Sequence[Due], rate: float | None, on_look: OnLook
) -> Run:  # fmt: skip
    with running as pattern, NumberedSource(space, plan.senders, ADDRESS, PORT, limit=1) as source:
        pattern.begin(source)
        pace = Pace(source, space, WINDOW, rate)
        seconds = drive(pattern, pace, due, lambda now: on_look(now, pattern))
        sent = source.stop()
        calm(space, sent)
        pattern.stop()
        rows, slots = pattern.recorded()
        phases = survive_account.owners(rows, slots, plan.senders, source.phase + 1)
    return Run(
        pattern.title, seconds, pace.waited, dict(pattern.done), pattern.deaths,
        survive_account.account(sent, udp_counters(space), rows, *pattern.totals(rows)),
        len(survive_account.astray(rows, slots, phases)), sum(int(np.count_nonzero(phase < 0)) for phase in phases),
        survive_account.steps(pattern.changes, phases), [], strays=survive_account.strays(rows, slots, phases),
    )  # fmt: skip


def faults(run: Run) -> list[str]:
    """What is not as it must be, in words."""
    account, deaths = run.account, run.deaths
    found = {
        f"{account.destroyed:,} datagrams were lost with a queue": account.destroyed,
        f"{account.dropped:,} datagrams were dropped, though every queue had room": account.dropped,
        f"{account.repeated:,} datagrams were recorded twice": account.repeated,
        f"{run.misdirected:,} datagrams came to a worker that did not have their sender": run.misdirected,
        f"{run.unknown:,} times nobody was seen to have a sender between two changes": run.unknown,
        f"{account.failed:,} datagrams failed": account.failed,
        f"{run.readers.unexcused:,} datagrams were lost by workers that have not died": run.readers.unexcused,
        f"{run.readers.backward:,} times a worker read on after its successor had begun": run.readers.backward,
        f"{account.in_hands:,} datagrams in the hands of {deaths} dead workers, whose batches are {BATCH}":
            not 0 <= account.killed <= account.in_hands <= BATCH * deaths,
        f"{account.recorded:,} datagrams recorded, of {account.taken:,} taken and {account.handled:,} handled":
            not account.handled <= account.recorded <= account.taken,
    }  # fmt: skip
    found |= {
        f"{step.before} to {step.after} workers moved {step.moved:,} senders, {step.ideal:,.0f} ideally":
            step.moved > _MOVED * step.ideal + _CHANCE * math.sqrt(step.ideal)
        for step in run.steps
    }  # fmt: skip
    return [words for words, wrong in found.items() if wrong]
