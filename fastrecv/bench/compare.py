"""Two runs side by side: by how much the Δ of each configuration differs, and whether that is more than noise.

Absolute rates of two runs are never compared: the machine drifts between them. A Δ is a ratio within a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from fastrecv.bench import tables
from fastrecv.bench.results import Interval, Result, Verdict
from fastrecv.bench.stats import difference, judge

__all__ = ["Comparison", "IncomparableError", "as_json", "compare", "render"]


# Equal runs were seen to differ by up to 8 % of their Δ, which their intervals do not know: the state of the machine
# moves between runs. Less than this part of a Δ is never called a difference.
_BETWEEN_RUNS = 0.1


class IncomparableError(ValueError):
    """The two results measured different things."""


class Comparison(msgspec.Struct, kw_only=True):
    """One row of both runs. difference : B - A in percentage points."""

    flood: str
    row: str
    title: str
    first: Interval
    second: Interval
    difference: Interval
    verdict: Verdict


def compare(first: Result, second: Result) -> tuple[list[Comparison], list[str]]:
    """The rows that both have, and what else differs. IncomparableError for different modes or floods."""
    for what, a, b in (
        ("kinds of run", first.kind, second.kind),
        ("modes", first.mode, second.mode),
        ("floods", [flood.name for flood in first.floods], [flood.name for flood in second.floods]),
    ):
        if a != b:
            raise IncomparableError(f"the two results are of different {what}: {a} and {b}")
    found = list(_rows(first, second))
    if not found:
        raise IncomparableError("the two results have no configuration in common")
    notes = [f"{name}: taken {run.started}, fastrecv {run.version}" for name, run in (("A", first), ("B", second))]
    notes += [
        f"{name} differ: {a} | {b}"
        for name, a, b in (
            ("kernels", first.environment.get("kernel"), second.environment.get("kernel")),
            ("CPUs", first.environment.get("CPU"), second.environment.get("CPU")),
            ("versions", first.version, second.version),
            ("rule sets", first.prefixes, second.prefixes),
            ("sources", first.sources, second.sources),
            ("CPUs under flood", first.cpu, second.cpu),
            ("seconds a flood", *(round(run.floods[0].seconds) for run in (first, second))),
            ("configurations", *(_names(run) for run in (first, second))),
        )
        if a != b
    ]
    notes.append(
        "an interval speaks of its run alone; equal runs were seen to differ by 8 % of a Δ, so less than a tenth is "
        "not judged: repeat each side"
    )
    for name, result in (("first", first), ("second", second)):
        if result.failed_gates:
            notes.append(f"a gate failed in the {name} run: its numbers mean nothing")
    return found, notes


def _names(result: Result) -> str:
    return ", ".join(row.name for row in result.floods[0].configurations)


def _rows(first: Result, second: Result) -> Iterator[Comparison]:
    for a, b in zip(first.floods, second.floods, strict=True):
        others = {row.name: row for row in b.configurations}
        for row in a.configurations:
            other = others.get(row.name)
            if other is None or row.delta is None or other.delta is None:
                continue
            change = difference(row.delta, other.delta)
            large = abs(change.estimate) > _BETWEEN_RUNS * max(abs(row.delta.estimate), abs(other.delta.estimate))
            noise = max(a.noise, b.noise, key=lambda interval: interval.half_width)
            yield Comparison(
                flood=a.name,
                row=row.name,
                title=row.title,
                first=row.delta,
                second=other.delta,
                difference=change,
                verdict="noise floor" if row.name == "again" else judge(change, noise) if large else "not resolved",
            )


def render(rows: list[Comparison], notes: list[str]) -> str:
    """The comparison as a Markdown table."""
    table = tables.markdown(
        ["flood, configuration", "Δ rx pps, A", "Δ rx pps, B", "B - A", "95 % interval", "verdict on B"],
        ([f"{row.flood}: {row.title}", tables.signed(row.first.estimate, 2), tables.signed(row.second.estimate, 2),
          tables.signed(row.difference.estimate, 2, " pp"), tables.interval(row.difference), row.verdict]
         for row in rows),
    )  # fmt: skip
    return "\n\n".join([table, *(f"NOTE: {note}" for note in notes)])


def as_json(rows: list[Comparison], notes: list[str]) -> str:
    document: dict[str, Any] = {"rows": rows, "notes": notes}
    return msgspec.json.encode(document).decode()
