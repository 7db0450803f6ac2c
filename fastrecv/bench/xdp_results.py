"""What a run of the AF_XDP bench leaves behind, and what follows from it: rates by loss, ratios, gates.

A rate at a loss is that of RFC 2544, 26.1: the highest at which no more was lost than that. Where nothing is lost
even at the last of them, the source brought no more. It is taken in every round; the median over rounds is stated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from fastrecv.bench import stats
from fastrecv.bench.results import Gate

__all__ = ["LOSSES", "TARGETS", "Ratio", "Row", "Target", "Window", "XdpResult", "encode", "judge"]

LOSSES = (0.0, 0.001, 0.01)
_JUDGED = 0.001
"""The loss at which ratios are stated and judged."""
_WAITED = 0.02  # of a window; a reader that has waited so long for its CPU was disturbed
_DISTURBED = 0.05  # of the windows


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    pass


class Target(NamedTuple):
    """With 0.1 % lost at most, `row` must have this many times the rate of `reference`."""

    row: str
    reference: str
    least: float


TARGETS = (
    Target(row="xdp", reference="socket", least=2.5),
    Target(row="xdp", reference="xdp-c", least=0.9),
)


class Window(_Record, kw_only=True):
    """So many frames offered to one contender. asked : frames a second. ns : from one to the next, as they were sent.

    arrived : at the interface. lost : by counter of the kernel. waited_ns : that the reader could have run and another
    task had its CPU (/proc/PID/schedstat, the kernel's Documentation/scheduler/sched-stats.rst).
    """

    round: int
    asked: float
    ns: float
    sent: int
    arrived: int
    received: int
    lost: dict[str, int]
    waited_ns: int = 0

    @property
    def offered(self) -> float:
        """Frames a second, as they were sent."""
        return 1e9 / self.ns

    @property
    def rate(self) -> float:
        """Datagrams received a second of sending."""
        return self.offered * self.received / self.sent

    @property
    def loss(self) -> float:
        return (self.sent - self.received) / self.sent

    @property
    def wrong(self) -> str:
        """What does not add up, in words; "" where every frame is found again."""
        if self.arrived == self.sent == self.received + sum(self.lost.values()):
            return ""
        lost = ", ".join(f"{count:,} {name}" for name, count in self.lost.items())
        return f"{self.sent:,} sent, {self.arrived:,} arrived, {self.received:,} received; lost: {lost}"


class Row(_Record, kw_only=True):
    """One contender. drained_ns : of every drain; drained : datagrams of one."""

    name: str
    title: str
    of: Literal["socket", "xdp"]
    payload: int  # bytes
    drained: int = 0
    drained_ns: list[int] = []
    windows: list[Window] = []

    @property
    def ns_each(self) -> float:
        """Nanoseconds of user space a datagram, system calls included: the median over drains."""
        return float(np.median(self.drained_ns)) / self.drained

    def best(self, loss: float) -> dict[int, float]:
        """By round, the highest rate with at most this loss; without those rounds in which there was none."""
        found: dict[int, float] = {}
        for window in self.windows:
            if window.loss <= loss:
                found[window.round] = max(window.rate, found.get(window.round, 0.0))
        return found

    def rate(self, loss: float) -> float:
        """The median of `best` over all rounds, in datagrams a second; a round in which there was none counts as 0."""
        rounds = {window.round for window in self.windows}
        found = self.best(loss)
        return float(np.median([found.get(number, 0.0) for number in rounds])) if rounds else 0.0


class Ratio(_Record, kw_only=True):
    """Of the rates of a row and another at 0.1 % loss: the median of those within rounds, and its 95 % interval."""

    row: str
    reference: str
    estimate: float
    low: float
    high: float


class XdpResult(_Record, kw_only=True):
    """One run. cpu : the reader's. dropping_ns : of a frame that XDP_DROP takes, by round: source and wire alone."""

    schema: Literal[1] = 1
    kind: Literal["xdp"] = "xdp"
    version: str
    started: str  # ISO 8601, UTC
    argv: list[str]
    seed: int
    cpu: int
    source_cpu: int
    rounds: int
    seconds: float  # of a window
    rates: list[float]
    room: int
    environment: dict[str, str]
    rows: list[Row] = []
    dropping_ns: list[float] = []
    ratios: list[Ratio] = []
    gates: list[Gate] = []
    warnings: list[str] = []

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    @property
    def failed_gates(self) -> list[Gate]:
        return [gate for gate in self.gates if not gate.passed]


def judge(result: XdpResult) -> None:
    """Fill in ratios, gates and what makes them doubtful, from what was measured."""
    result.gates.append(_exact(result.rows))
    by_name = {row.name: row for row in result.rows}
    pairs = [(row.name, row.name.replace("xdp", "socket", 1)) for row in result.rows if row.of == "xdp"]
    for name, reference in dict.fromkeys([*((t.row, t.reference) for t in TARGETS), *pairs]):
        if found := _ratio(by_name[name], by_name[reference]):
            result.ratios.append(found)
    result.gates += [_judged(target, result) for target in TARGETS]
    windows = [window for row in result.rows for window in row.windows]
    disturbed = sum(window.waited_ns > _WAITED * window.ns * window.sent for window in windows)
    if disturbed > _DISTURBED * len(windows):
        result.warnings.append(
            f"other tasks had the reader's CPU for more than {100 * _WAITED:g} % of the time in {disturbed:,} of "
            f"{len(windows):,} windows, and what a ring or queue had no room for meanwhile was lost: measure on a "
            "quiet machine"
        )


def _exact(rows: Iterable[Row]) -> Gate:
    name, frames = "every frame found again", 0
    for row in rows:
        for window in row.windows:
            if window.wrong:
                detail = f"round {window.round}, {row.name} at {window.asked:,.0f}/s: {window.wrong}"
                return Gate(name=name, passed=False, detail=detail)
            frames += window.sent
    return Gate(name=name, passed=True, detail=f"{frames:,} frames received, or counted as lost by the kernel")


def _ratio(row: Row, reference: Row) -> Ratio | None:
    """None where the reference has no rate; a round in which only the row has none counts as 0."""
    ours, theirs = row.best(_JUDGED), reference.best(_JUDGED)
    if not theirs:
        return None
    times = [1e9 / ours[number] if number in ours else math.inf for number in theirs]
    change = stats.estimate([1e9 / rate for rate in theirs.values()], times)
    estimate, low, high = (1 + percent / 100 for percent in (change.estimate, change.low, change.high))
    return Ratio(row=row.name, reference=reference.name, estimate=estimate, low=low, high=high)


def _judged(target: Target, result: XdpResult) -> Gate:
    titles = {row.name: row.title for row in result.rows}
    name = f"{target.least} x {titles[target.reference]}"
    for ratio in result.ratios:
        if (ratio.row, ratio.reference) == (target.row, target.reference):
            interval = f"[{ratio.low:.2f}, {ratio.high:.2f}]"
            detail = f"{titles[target.row]} with at most 0.1 % lost: {ratio.estimate:.2f} x, 95 % interval {interval}"
            return Gate(name=name, passed=ratio.estimate >= target.least, detail=detail)
    return Gate(name=name, passed=False, detail=f"{titles[target.reference]} lost more than 0.1 % at every rate")


def encode(result: XdpResult) -> bytes:
    return msgspec.json.encode(result) + b"\n"
