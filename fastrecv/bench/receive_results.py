"""What a run of the receive bench leaves behind: one JSON document with the nanoseconds of every drain."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from fastrecv.bench import stats
from fastrecv.bench.results import Gate, ResultError

__all__ = ["Comparison", "Drained", "Group", "Ratio", "ReceiveResult", "encode", "is_one", "load", "summarise"]


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    pass


class Drained(_Record, kw_only=True):
    """One contender. ns, sent, drained : by round, the nanoseconds of the whole drain and the datagrams of it."""

    name: str
    title: str
    kind: Literal["limit", "python", "asyncio", "fastrecv"]
    ns: list[int] = []
    sent: list[int] = []
    drained: list[int] = []

    @property
    def ns_each(self) -> list[float]:
        """Nanoseconds a datagram, by round."""
        return [ns / max(sent, 1) for ns, sent in zip(self.ns, self.sent, strict=True)]

    @property
    def median(self) -> float:
        """Nanoseconds a datagram, the median over rounds."""
        return float(np.median(self.ns_each))

    @property
    def rate(self) -> float:
        """Datagrams a second."""
        return 1e9 / self.median


class Ratio(_Record, kw_only=True):
    """Datagrams a second of one row by those of `reference`: the median over rounds, and its bootstrap interval."""

    row: str
    reference: str
    estimate: float
    low: float
    high: float
    level: float = 0.95


class Comparison(_Record, kw_only=True):
    """One column of ratios: `title` says of what. pairs : row -> the row that it is measured against."""

    title: str
    pairs: dict[str, str]
    ratios: list[Ratio] = []

    def of(self, row: str) -> Ratio | None:
        return next((ratio for ratio in self.ratios if ratio.row == row), None)


class Group(_Record, kw_only=True):
    """What ran in the same rounds. order : per round, the indices of the rows as they ran."""

    name: str
    title: str
    payload: int  # bytes of a datagram
    order: list[list[int]] = []
    rows: list[Drained] = []
    comparisons: list[Comparison] = []
    missing: dict[str, str] = {}  # title of a contender that did not run -> the module that it lacks
    gates: list[Gate] = []

    def row(self, name: str) -> Drained:
        return next(row for row in self.rows if row.name == name)


class ReceiveResult(_Record, kw_only=True):
    """One run of the receive bench. datagrams : of a drain."""

    schema: Literal[1] = 1
    kind: Literal["receive"] = "receive"
    version: str  # of fastrecv
    started: str  # ISO 8601, UTC
    argv: list[str]
    seed: int
    cpu: int
    rounds: int
    datagrams: int
    sources: int
    environment: dict[str, str]
    groups: list[Group] = []
    warnings: list[str] = []

    @property
    def failed_gates(self) -> list[tuple[Group, Gate]]:
        return [(group, gate) for group in self.groups for gate in group.gates if not gate.passed]


def summarise(group: Group) -> None:
    """Fill in the ratios from what was measured; a pair of which one did not run has none."""
    ran = {row.name: row for row in group.rows if row.ns}
    for comparison in group.comparisons:
        comparison.ratios = [
            _ratio(ran[name], ran[reference])
            for name, reference in comparison.pairs.items()
            if name in ran and reference in ran
        ]


def _ratio(row: Drained, reference: Drained) -> Ratio:
    rounds = min(len(row.ns), len(reference.ns))  # a failed gate cuts the last one short
    change = stats.estimate(reference.ns_each[:rounds], row.ns_each[:rounds])  # in percent of the reference's rate
    estimate, low, high = (1 + percent / 100 for percent in (change.estimate, change.low, change.high))
    return Ratio(row=row.name, reference=reference.name, estimate=estimate, low=low, high=high, level=change.level)


class _Kind(msgspec.Struct):
    kind: str = ""


def is_one(path: Path) -> bool:
    """Whether the file says of itself that it is a result of the receive bench."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Kind).kind == "receive"
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False


def encode(result: ReceiveResult) -> bytes:
    return msgspec.json.encode(result) + b"\n"


def load(path: Path) -> ReceiveResult:
    try:
        return msgspec.json.decode(path.read_bytes(), type=ReceiveResult)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{path} is not a result of fastrecv.bench receive: {error}") from None
