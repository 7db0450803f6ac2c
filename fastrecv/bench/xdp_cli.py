"""The command `python -m fastrecv.bench xdp`."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import click

from fastrecv import features
from fastrecv.bench import measuring
from fastrecv.bench.arguments import STDOUT, one_cpu, writable_file

__all__ = ["command"]

_RATES = "0.3,0.5,0.7,0.85,1,1.2,1.4,1.7,2,2.4,2.8,3.2,3.6,4"
_LOWEST, _HIGHEST = 0.05, 20  # millions a second; below, a burst would be waited for so long that it is no stream


def _rates(_context: click.Context, _parameter: click.Parameter, value: str) -> list[float]:
    try:
        found = sorted({float(rate) for rate in value.split(",")})
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers like {_RATES}") from None
    if not all(math.isfinite(rate) and _LOWEST <= rate <= _HIGHEST for rate in found):
        raise click.BadParameter(f"give millions a second, from {_LOWEST} to {_HIGHEST}")
    return [1e6 * rate for rate in found]


def _source_cpu(context: click.Context, _parameter: click.Parameter, value: int | None) -> int:
    """Another CPU than the reader's; the first such by default."""
    allowed = os.sched_getaffinity(0)
    others = sorted(allowed - {context.params["cpu"]})
    if not others:
        raise click.UsageError(f"source and reader need a CPU each, and there is only {sorted(allowed)}")
    if value is None:
        return others[0]
    if value not in others:
        raise click.BadParameter(f"CPU {value} is not one of {others}, which the reader leaves")
    return value


@click.command("xdp")
@click.option("--rates", callback=_rates, default=_RATES, show_default=True, metavar="M,...",
              help="What is offered, in millions of frames a second.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1, 1000), default=7, show_default=True,
              help="In each, every contender is offered every rate once, in random order of contenders.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0.001, 10), callback=measuring.finite, default=0.3, show_default=True,
              help="Of sending at a rate.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the order within rounds.")
@click.option("--cpu", type=int, callback=one_cpu, is_eager=True, help="The reader's CPU.  [default: the last]")
@click.option("--source-cpu", type=int, callback=_source_cpu,
              help="The CPU of source and NAPI poll.  [default: the first other]")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), callback=writable_file,
              help="Keep the result; - is stdout.")  # fmt: skip
@click.pass_context
def command(context: click.Context, /, json_file: Path | None, **chosen: Any) -> None:
    """Measure AF_XDP against the socket layer, live: Receiver, XdpReceiver and a C loop of each, at rising rates.

    Exit code 1 where, with at most 0.1 % lost, the XdpReceiver takes less than 2.5 x the Receiver's rate or less than
    0.9 of the C loop's, or where a frame is in no counter. All traffic stays in two private network namespaces.
    """
    features.check("AF_XDP in copy mode")  # before the import: it says what is missing where libxdp is
    from fastrecv.bench import xdp, xdp_results, xdp_tables  # noqa: PLC0415
    from fastrecv.bench.xdp_contenders import CONTENDERS  # noqa: PLC0415

    plan = xdp.Plan(**chosen)
    with click.progressbar(
        length=plan.rounds * len(CONTENDERS),
        label="offering",
        file=sys.stderr,
        item_show_func=lambda title: title or "",
    ) as bar:
        result = xdp.run(plan, lambda title: bar.update(1, title))
    if json_file == STDOUT:
        click.echo(xdp_results.encode(result))
    else:
        if json_file:
            json_file.write_bytes(xdp_results.encode(result))  # first: nothing that goes wrong later may lose it
        click.echo(xdp_tables.render(result))
    context.exit(1 if result.failed_gates else 0)
