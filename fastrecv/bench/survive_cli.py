"""The command `python -m fastrecv.bench survive`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import click

from fastrecv import features
from fastrecv.bench import environment, survive, survive_tables
from fastrecv.bench.numbered import MAX_SENDERS
from fastrecv.bench.survive import Plan, Run
from fastrecv.bench.survive_churn import ACTIONS, Action, Pattern

__all__ = ["MAX_WORKERS", "actions", "command", "progress"]

_EVERY = 5.0  # seconds
MAX_WORKERS = 32


def _actions(_context: click.Context, _parameter: click.Parameter, value: str) -> list[Action]:
    names = [name.strip() for name in value.split(",")]
    chosen: list[Action] = [action for action in ACTIONS if action in names]
    if len(chosen) < len(names):
        raise click.BadParameter(f"choose from {', '.join(ACTIONS)}, each once")
    return chosen


def actions(default: Sequence[Action]) -> Callable[..., Any]:
    """The option by which they are chosen."""
    return click.option("--actions", "chosen", callback=_actions, default=",".join(default), show_default=True,
                        metavar="NAME,...", help=f"What happens: {', '.join(ACTIONS)}.")  # fmt: skip


def progress() -> Callable[[float, Pattern], None]:
    """What says on standard error how far it is, now and then."""
    next_at = _EVERY

    def look(now: float, pattern: Pattern) -> None:
        nonlocal next_at
        if now >= next_at:
            next_at = now + _EVERY
            done = ", ".join(f"{count} x {action}" for action, count in pattern.done.items())
            click.echo(f"{pattern.title}, {now:.0f} s: {done}", err=True)

    return look


@click.command("survive")
@click.option("--seconds", type=click.FloatRange(2, 86400), default=60.0, show_default=True,
              help="That all is spread over, of each pattern.")  # fmt: skip
@click.option("--workers", type=click.IntRange(2, MAX_WORKERS), default=4, show_default=True)
@click.option("--senders", type=click.IntRange(100, MAX_SENDERS), default=10_000, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of what happens when, to whom.")
@actions(ACTIONS)
@click.option("--compare", is_flag=True, help="Beside it, under the same kills and restarts: processes with sockets of "
              "their own, and one asyncio process.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    context: click.Context, seconds: float, workers: int, senders: int, seed: int, chosen: list[Action],
    compare: bool, as_json: bool,
) -> None:  # fmt: skip
    """Kill, restart, resize and hang the workers of `fastrecv run` under a flood, and account for every datagram.

    One process sends numbered datagrams as fast as it can, and waits where a queue might become full. Exit code 1 where
    a datagram was lost with a queue or by a worker that has not died, dropped, recorded twice, or came to a wrong
    worker, where more than one batch a dead worker is missing, where two workers read one queue, or where a resize
    moved more senders than it had to. All of it in a private network namespace.
    """
    for name in ("network namespaces", "the balancer's program"):
        features.check(name)
    plan = Plan(workers, senders, seconds, seed, chosen)
    runs: list[Run] = []

    def keep(run: Run) -> None:
        runs.append(run)
        if not as_json:
            click.echo(survive_tables.described(run))

    try:
        keep(survive.supervised(plan, progress()))
        if compare:
            keep(survive.usual("recvfrom", plan, runs[0].rate, progress()))
            keep(survive.usual("asyncio", plan, runs[0].rate, progress()))
    except RuntimeError as error:
        click.echo(f"fastrecv.bench: {error}", err=True)
        context.exit(1)
    if as_json:
        found = [survive_tables.record(run) for run in runs]
        click.echo(json.dumps({"environment": environment.record(), "plan": plan._asdict(), "runs": found}, indent=2))
    elif compare:
        click.echo("\n" + survive_tables.table(runs))
    context.exit(1 if runs[0].faults else 0)
