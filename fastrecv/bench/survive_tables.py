"""Runs of the survive bench in words and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastrecv.bench.survive import Run
from fastrecv.bench.tables import markdown

__all__ = ["described", "record", "table"]

_NAMES = {"kill": "SIGKILLs", "restart": "rolling restarts", "resize": "resizes", "hang": "hung handlers",
          "hand-over": "hand-overs"}  # fmt: skip


def described(run: Run) -> str:
    """A run in words, a line each."""
    account = run.account
    done = ", ".join(f"{count} {_NAMES[action]}" for action, count in sorted(run.done.items()))
    lines = [
        f"{run.title}: {account.sent:,} datagrams in {run.seconds:.0f} s ({run.rate:,.0f} a second; for "
        f"{100 * run.waited:.1f} % of the time the source waited for queues), {done}",
        f"  {account.taken:,} taken out of queues, {account.handled:,} handled, {account.in_hands:,} in the hands of "
        f"{run.deaths} that died, {account.failed:,} failed",
        f"  {account.destroyed:,} lost with a queue; dropped: {account.full:,} full queue, {account.refused:,} "
        f"refused, {account.filtered:,} by a filter",
        f"  {account.repeated:,} recorded twice, {run.misdirected:,} by a wrong worker",
    ]
    resized = [step for step in run.steps if step.ideal]
    if resized:
        moved, ideal = sum(step.moved for step in resized), sum(step.ideal for step in resized)
        worst = max(step.moved / step.ideal for step in resized)
        share = f"x {moved / ideal:.2f} of the ideal, x {worst:.2f} at worst"
        lines.append(f"  {len(resized)} resizes moved {moved:,} senders, {share}")
    lines += [f"  FAULT: {fault}" for fault in run.faults]
    if run.faults:
        lines += [
            f"    datagram {stray.number} of sender {stray.sender}, sent in phase {stray.phase}, came to {stray.slot}; "
            f"its workers before and after the next change: {', '.join(map(str, stray.owners))}"
            for stray in run.strays
        ]
    return "\n".join(lines)


def table(runs: Sequence[Run]) -> str:
    """A row a pattern."""
    header = ["pattern", "kills", "restarts", "sent", "handled", "lost with a queue", "in hands", "refused",
              "full queue", "senders moved by a kill", "by a restart"]  # fmt: skip
    return markdown(header, [
        [run.title, *(f"{count:,}" for count in (
            run.done.get("kill", 0), run.done.get("restart", 0), run.account.sent, run.account.handled,
            run.account.destroyed, run.account.in_hands, run.account.refused, run.account.full)),
         _moved(run, "kill"), _moved(run, "restart")]
        for run in runs
    ])  # fmt: skip


def _moved(run: Run, what: str) -> str:
    """Senders that have another worker after it, in the mean; where it had no phase of its own nobody might move."""
    moved = [step.moved for step in run.steps if step.what == what]
    if not moved:
        return "none" if not run.misdirected else "some"
    return f"{sum(moved) / len(moved):,.0f}"


def record(run: Run) -> dict[str, Any]:
    """For JSON."""
    account = run.account._asdict() | {
        "dropped": run.account.dropped, "destroyed": run.account.destroyed, "in_hands": run.account.in_hands,
    }  # fmt: skip
    return run._asdict() | {
        "account": account,
        "readers": run.readers._asdict(),
        "steps": [step._asdict() for step in run.steps],
        "rate": run.rate,
    }
