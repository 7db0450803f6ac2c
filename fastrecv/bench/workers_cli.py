"""The command `python -m fastrecv.bench workers`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
import numpy as np

from fastrecv import features
from fastrecv.bench import environment, workers
from fastrecv.bench.tables import markdown
from fastrecv.bench.workers import Plan, Result

__all__ = ["command", "table"]

_TITLES = {
    "bare": "bare Receiver loop", "again": "the same again", "one": "fastrecv run, 1 worker",
    "two": "fastrecv run, 2 workers",
}  # fmt: skip


def table(result: Result) -> str:
    """Datagrams a second by row, and the ratios."""
    ratios = {ratio.row: ratio for ratio in result.ratios}
    lines = []
    for row, ns in result.ns.items():
        rate = 1e9 * result.plan.datagrams / float(np.median(ns))
        found = ratios.get(row)
        against = ["", "", ""] if found is None else [
            _TITLES[found.reference], f"{found.estimate:.3f}", f"[{found.low:.3f}, {found.high:.3f}]"
        ]  # fmt: skip
        lines.append([_TITLES[row], f"{rate:,.0f}", *against])
    return markdown(["drained by", "datagrams/s", "against", "ratio", "95 % interval"], lines)


@click.command("workers")
@click.option("--datagrams", type=click.IntRange(1000, workers.MAX_DATAGRAMS), default=100_000, show_default=True,
              help="Of a drain.")  # fmt: skip
@click.option("--setups", type=click.IntRange(1, 1000), default=12, show_default=True,
              help="In each, processes and sockets are new.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1, 1000), default=3, show_default=True,
              help="Of each set-up; in each, everybody drains once, in random order.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the order within rounds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(context: click.Context, /, as_json: bool, **chosen: Any) -> None:
    """Measure what supervision costs: a worker against a bare Receiver loop, and two workers against one.

    All drain sockets that were filled while they were stopped, so no sender takes a share of the CPUs. Exit code 1
    where a worker handles less than 0.9 of what the bare loop does. All of it in a private network namespace.
    """
    for name in ("network namespaces", "the balancer's program"):
        features.check(name)
    plan = Plan(**chosen)
    try:
        with click.progressbar(length=plan.setups * plan.rounds, label="draining", file=sys.stderr) as bar:
            result = workers.measure(plan, lambda: bar.update(1))
    except RuntimeError as error:
        click.echo(f"fastrecv.bench: {error}", err=True)
        context.exit(1)
    if as_json:
        found = {"plan": plan._asdict(), "ns": result.ns, "ratios": [ratio._asdict() for ratio in result.ratios]}
        click.echo(json.dumps({"environment": environment.record(), **found}, indent=2))
    else:
        click.echo(table(result))
    context.exit(0 if result.good else 1)
