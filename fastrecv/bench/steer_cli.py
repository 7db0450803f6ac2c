"""The command `python -m fastrecv.bench steer`."""

from __future__ import annotations

from pathlib import Path

import click

from fastrecv.bench import measuring
from fastrecv.bench.floods import MAX_SOURCES
from fastrecv.bench.steer import MIN_SOURCES, STEERED, SteerPlan

__all__ = ["command"]

_SECONDS = 20.0


@click.command("steer")
@click.option("--flood", type=click.Choice([*STEERED, "all"]), default="all", show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(1, 86400),
    callback=measuring.finite,
    default=_SECONDS,
    show_default=True,
    help="For each flood.",
)
@click.option(
    "--sources",
    type=click.IntRange(MIN_SOURCES, MAX_SOURCES),
    default=10_000,
    show_default=True,
    help="Senders of the flood, each with an address, a port and a payload of its own.",
)
@measuring.options
@click.pass_context
def command(
    context: click.Context,
    /,
    flood: str,
    seconds: float,
    sources: int,
    seed: int,
    cpu: int,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Measure what it costs to choose a member of a reuseport group: by the kernel, by classic BPF, by eBPF.

    Beside it, in the same blocks: one socket, and a connected one.
    """
    floods = list(STEERED) if flood == "all" else [flood]
    plan = SteerPlan(floods=floods, seconds=seconds, seed=seed, sources=sources, cpu=cpu)
    context.exit(measuring.measure(plan, json_file, plot))
