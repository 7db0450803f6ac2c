"""What the commands that flood share: their options, the run with its progress, and the views of its result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fastrecv.bench import results, runner, stats, steer_tables, tables
from fastrecv.bench.arguments import STDOUT, one_cpu, refuse_twice, writable_file
from fastrecv.bench.floods import MAX_SOURCES
from fastrecv.bench.results import Result
from fastrecv.bench.stage import Plan, Stage

__all__ = ["finite", "measure", "options", "render", "report", "sources", "write"]

_EXIT_GATE = 1
_SHOWN = 3  # programs whose running estimates a line has room for
_FILE = click.Path(dir_okay=False, path_type=Path)

sources = click.option(
    "--sources",
    type=click.IntRange(1, MAX_SOURCES),
    default=10_000,
    show_default=True,
    help="Source ports of the flood.",
)
report = click.option("--report", type=_FILE, callback=writable_file, help="Write one self-contained HTML page.")


def finite(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number of seconds")
    return value


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Those that all have."""
    for option in reversed(
        [
            click.option("--seed", type=click.IntRange(0), default=1, show_default=True,
                         help="Of all that is drawn: the order within blocks, rule sets, ports, hashes."),
            click.option("--cpu", type=int, callback=one_cpu,
                         help="The CPU that takes the flood.  [default: the last]"),
            click.option("--json", "json_file", type=_FILE, callback=writable_file,
                         help="Keep the result; - is stdout."),
            click.option("--plot", type=_FILE, callback=writable_file, help="Write the main plot as SVG."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def measure(plan: Plan, json_file: Path | None, plot: Path | None, page: Path | None = None) -> int:
    """Run the plan, print the tables, write the files that the options name; the exit code."""
    refuse_twice(json_file, page, plot)
    with _Progress(plan.flood_seconds) as progress:
        result = runner.run(plan, progress)
    if json_file == STDOUT:
        click.echo(results.encode(result))
    else:
        if json_file:
            json_file.write_bytes(results.encode(result))  # first: nothing that goes wrong with a view may lose it
        click.echo(render(result))
    write(result, page, plot)
    return _EXIT_GATE if result.failed_gates else 0


def render(result: Result) -> str:
    """A result as text."""
    return steer_tables.render(result) if result.kind == "steer" else tables.render(result)


def write(result: Result, page: Path | None, plot: Path | None) -> None:
    if not page and not plot:
        return
    from fastrecv.bench import report as reporting  # noqa: PLC0415 - matplotlib takes its time, and a home directory

    if page:
        page.write_text(reporting.render(result), encoding="utf-8")
    if plot:
        plot.write_text(reporting.figure(result), encoding="utf-8")


class _Progress:
    """A bar on stderr with the running estimate, redrawn between blocks only: nothing runs beside a window.

    Where stderr is no terminal, a line for each pass and one every ten seconds.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._console = Console(stderr=True)
        self._every = 0.5 if self._console.is_terminal else 10.0
        self._bar = Progress(TextColumn("{task.fields[flood]:>5}"), BarColumn(30), TimeElapsedColumn(),
                             TextColumn("{task.fields[text]}"), console=self._console, auto_refresh=False,
                             transient=True)  # fmt: skip
        self._told = time.monotonic()

    def __enter__(self) -> _Progress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def __call__(self, flood: str, text: str, stage: Stage | None) -> None:
        """`text` says what begins; or `stage` has one more block behind it."""
        if stage is None:
            if self._console.is_terminal:
                for task in self._bar.task_ids:
                    self._bar.remove_task(task)
                self._bar.add_task("", flood=flood, text=text, total=self._seconds)
                self._bar.refresh()
            else:
                click.echo(f"{flood}: {text}", err=True)
        elif time.monotonic() - self._told > self._every:
            if self._console.is_terminal:
                done = min(stage.record.seconds, self._seconds)
                self._bar.update(self._bar.task_ids[0], completed=done, text=_running(stage), refresh=True)
            else:
                click.echo(f"{flood}: {_running(stage)}", err=True)
            self._told = time.monotonic()


def _running(stage: Stage) -> str:
    """The estimates so far, from few resamples: enough for a glance."""
    baseline, again, *_ = (row.configuration for row in stage.rows)
    parts = []
    for row in [again, *[row.configuration for row in stage.rows if row.program is not None][:_SHOWN]]:
        delta = stats.estimate(baseline.ns, row.ns, stage.record.setups, resamples=200)
        name = "A/A" if row is again else row.name
        parts.append(f"{name} {delta.estimate:+.1f} ±{delta.half_width:.1f} %")
    return f"{len(stage.record.order)} blocks  " + "  ".join(parts)
