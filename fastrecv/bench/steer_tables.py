"""A result of `steer` as text: a table for each flood, and what it says of the claim that BPF selection costs too much.

The claim is an article's, which gives no figure. Ours is TOO_MUCH, of what the kernel alone spends on a packet: of what
a service spends on it, the same nanoseconds are less.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fastrecv.bench import tables
from fastrecv.bench.results import Configuration, Flood, Interval, Result, Verdict
from fastrecv.bench.stats import MIN_BLOCKS
from fastrecv.bench.tables import interval, markdown, signed
from fastrecv.bench.ways import HASH, MEMBERS

__all__ = ["TOO_MUCH", "judgement", "render"]

TOO_MUCH = 10.0  # percent of the rx pps of the kernel's own hash
_CONNECTED = "connected"


def render(result: Result) -> str:
    """The whole of it."""
    traffic = (
        f"{result.sources:,} senders, each with an address, a port and a payload of its own · groups of {MEMBERS} "
        "sockets, bound to any address, that drop every datagram, or never accept"
    )
    parts = [tables.head(result, traffic), *(_table(flood) for flood in result.floods)]
    parts.append(
        "Δ rx pps: against one socket. Its like: hash; for connected, one-sender. ns a run: of the eBPF program, by "
        "BPF statistics."
    )
    if not result.failed_gates:
        parts += [judgement(flood) for flood in result.floods]
        parts.append(
            "Nobody reads these packets, and no driver brings them: a service spends more on each than is said here."
        )
    return "\n\n".join([*parts, *tables.foot(result)])


def _table(flood: Flood) -> str:
    header = [f"{flood.name}: {flood.title}", "rx pps (mean ± sstdev)", "Δ rx pps", "95 % interval", "verdict",
              "Δ against its like", "ns a run"]  # fmt: skip
    rows = markdown(header, map(_row, flood.configurations))
    return f"{tables.blocks_of(flood)}; noise floor ±{flood.noise.half_width:.2f} %\n\n{rows}"


def _row(row: Configuration) -> list[str]:
    return [
        row.title, f"{row.pps_mean:,.0f} ± {row.pps_sstdev:4.1f} %",
        signed(row.delta.estimate) if row.delta else "", interval(row.delta), row.verdict, _size(row.change),
        f"{row.run.ns_per_run:.0f}" if row.run else "",
    ]  # fmt: skip


def judgement(flood: Flood) -> str:
    """Whether "BPF selection costs too much" holds on this flood, way by way, as far as the intervals carry."""
    claim = f'{flood.name}: "BPF selection costs too much"'
    if len(flood.order) < MIN_BLOCKS:
        return f"{claim}: too few blocks to say"
    rows = {row.name: row for row in flood.configurations}
    chosen = [row for row in flood.configurations if row.against == HASH]
    spent = float(np.median(rows[HASH].ns))
    added = ", ".join(f"{row.name} {_nanoseconds(flood, row)}" for row in chosen)
    sentences = [
        f"{claim}, if that is more than {TOO_MUCH:g} % of the rx pps of the kernel's own hash, {_verdict(chosen)}.",
        f"To the {spent:,.0f} ns that the kernel spends on a packet with that hash, choosing adds: {added}.",
        f"Against one socket, the group by that hash changes rx pps by {_size(rows[HASH].delta, rows[HASH].verdict)}.",
    ]
    if _CONNECTED in rows:
        connected = rows[_CONNECTED]
        sentences.append(
            "A connected socket, in which the article keeps what was chosen, changes them by "
            f"{_size(connected.change, connected.change_verdict)} against an unconnected one."
        )
    return "\n".join(sentences)


def _verdict(chosen: Iterable[Configuration]) -> str:
    """By name: what is above TOO_MUCH with its whole interval, what below it, and what lies across it."""
    found: dict[str, list[str]] = {"holds for": [], "does not hold for": [], "is undecided for": []}
    for row in chosen:
        assert row.change is not None
        above, below = row.change.high < -TOO_MUCH, row.change.low > -TOO_MUCH
        found["holds for" if above else "does not hold for" if below else "is undecided for"].append(row.name)
    return "; ".join(f"{words} {', '.join(names)}" for words, names in found.items() if names)


def _nanoseconds(flood: Flood, row: Configuration) -> str:
    """What a row's way adds to a packet of its like."""
    assert row.against is not None
    assert row.change is not None
    like = float(np.median(flood.row(row.against).ns))
    return f"{like * (1 / (1 + row.change.estimate / 100) - 1):+.0f} ns{_resolved(row.change_verdict)}"


def _size(change: Interval | None, verdict: Verdict | None = None) -> str:
    return "" if change is None else f"{signed(change.estimate)} {interval(change)}{_resolved(verdict)}"


def _resolved(verdict: Verdict | None) -> str:
    return " (not resolved)" if verdict == "not resolved" else ""
