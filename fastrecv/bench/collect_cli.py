"""The command `python -m fastrecv.bench collect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from fastrecv.bench import collect
from fastrecv.bench.arguments import STDOUT, one_cpu, writable_file
from fastrecv.bench.collect_results import CollectResult, encode
from fastrecv.bench.collect_traffic import STREAMS

__all__ = ["command", "render"]

_LEAST, _MOST = 20_000, 200_000  # of fewer, what nfacctd holds back would be more than a few percent


def _groups(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if name not in STREAMS:
            raise click.BadParameter(f"no stream {name!r}: choose from {', '.join(STREAMS)}")
    if len(set(names)) < len(names):
        raise click.BadParameter("a stream is named twice")
    return names


@click.command("collect")
@click.option("--group", "groups", callback=_groups, default=",".join(STREAMS), show_default=True, metavar="NAME,...",
              help="What exporters send.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1, 1000), default=7, show_default=True,
              help="In each, every collector runs once, in random order.")  # fmt: skip
@click.option("--datagrams", type=click.IntRange(_LEAST, _MOST), default=40_000, show_default=True, help="Of a drain.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the order within rounds.")
@click.option("--cpu", type=int, callback=one_cpu, help="The collectors' CPU.  [default: the last]")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), callback=writable_file,
              help="Keep the result; - is stdout.")  # fmt: skip
@click.pass_context
def command(context: click.Context, /, json_file: Path | None, **chosen: Any) -> None:
    """Measure flow collectors: fastrecv collect, nfcapd, nfacctd and the netflow package, on the same datagrams.

    Exit code 1 where one has not collected every flow, or `fastrecv collect` takes more CPU time a flow than nfcapd for
    files, or than nfacctd for sums. All traffic stays on the loopback device of a private network namespace.
    """
    plan = collect.Plan(**chosen)
    with click.progressbar(
        length=plan.steps, label="collecting", file=sys.stderr, item_show_func=lambda title: title or ""
    ) as bar:
        result = collect.run(plan, lambda title: bar.update(1, title))
    if json_file == STDOUT:
        click.echo(encode(result), nl=False)
    else:
        if json_file:
            json_file.write_bytes(encode(result))
        click.echo(render(result))
    context.exit(1 if result.failed else 0)


def render(result: CollectResult) -> str:
    """The result as text."""
    lines = [f"flows a second of one CPU, median of {result.rounds} rounds, [min, max]"]
    for stream in dict.fromkeys(row.stream for row in result.rows):
        lines += ["", STREAMS[stream].title]
        for row in result.rows:
            if row.stream == stream:
                low, high = 1e9 / max(row.ns), 1e9 / min(row.ns)
                lines.append(f"  {row.title:<42} {row.rate / 1e6:8.3f} M/s  [{low / 1e6:.3f}, {high / 1e6:.3f}]")
    lines += ["", *(f"{title}: not here: {what}" for title, what in result.absent.items())]
    lines += [f"{'passed' if gate.passed else 'FAILED'}  {gate.name}: {gate.detail}" for gate in result.gates]
    for title, profile in result.profiles.items():
        lines += ["", f"where the time goes, {title}", profile]
    return "\n".join(lines)
