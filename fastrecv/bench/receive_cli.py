"""The command `python -m fastrecv.bench receive`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from fastrecv.bench import receive, receive_results, receive_tables
from fastrecv.bench.arguments import STDOUT, one_cpu, refuse_twice, writable_file
from fastrecv.bench.prefill import MAX_DATAGRAMS
from fastrecv.bench.receive_groups import GROUPS
from fastrecv.bench.receive_results import ReceiveResult

__all__ = ["command", "show"]

_ROUNDS, _DATAGRAMS = 31, 10_000


def _groups(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str]:
    names = [name.strip() for name in value.split(",")] if value is not None else list(GROUPS)
    for name in names:
        if name not in GROUPS:
            raise click.BadParameter(f"no group {name!r}: choose from {', '.join(GROUPS)}")
    if len(set(names)) < len(names):
        raise click.BadParameter("a group is named twice")
    return names


_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("receive")
@click.option(
    "--group",
    "groups",
    callback=_groups,
    metavar="NAME,...",
    help=f"What to measure: {', '.join(GROUPS)}.  [default: all]",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 10_000),
    default=_ROUNDS,
    show_default=True,
    help="In each, every contender of a group runs once, in random order.",
)
@click.option(
    "--datagrams",
    type=click.IntRange(100, MAX_DATAGRAMS),
    default=_DATAGRAMS,
    show_default=True,
    help="Of a drain.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the order within rounds.")
@click.option("--cpu", type=int, callback=one_cpu, help="The CPU that does it all.  [default: the last]")
@click.option("--json", "json_file", type=_FILE, callback=writable_file, help="Keep the result; - is stdout.")
@click.option("--plot", type=_FILE, callback=writable_file, help="Write datagrams/s by contender as SVG.")
@click.pass_context
def command(context: click.Context, /, json_file: Path | None, plot: Path | None, **chosen: Any) -> None:
    """Measure how fast one UDP socket is drained: a C loop, Python's sockets, asyncio, uvloop, Receiver."""
    refuse_twice(json_file, plot)
    plan = receive.Plan(**chosen)
    with click.progressbar(
        length=plan.steps, label="draining", file=sys.stderr, item_show_func=lambda group: group or ""
    ) as bar:
        result = receive.run(plan, lambda group: bar.update(1, group))
    if json_file == STDOUT:
        click.echo(receive_results.encode(result))
    else:
        if json_file:
            json_file.write_bytes(receive_results.encode(result))  # first: nothing that goes wrong later may lose it
        click.echo(receive_tables.render(result))
    _draw(result, plot)
    context.exit(1 if result.failed_gates else 0)


def show(file: Path, plot: Path | None) -> None:
    """Print the tables of a kept result again."""
    result = receive_results.load(file)
    click.echo(receive_tables.render(result))
    _draw(result, plot)


def _draw(result: ReceiveResult, plot: Path | None) -> None:
    if plot:
        from fastrecv.bench import receive_plots  # noqa: PLC0415 - matplotlib takes its time, and a home directory

        plot.write_text(receive_plots.figure(result), encoding="utf-8")
