"""The command line: `python -m fastrecv.bench`.

Exit codes: 0 measured; 1 a gate failed; 2 usage; 77 a privilege or a kernel feature is missing; 130, 143 interrupted.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from click.core import ParameterSource
from pyroute2.netlink.exceptions import NetlinkError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fastrecv.bench import compare as comparing
from fastrecv.bench import receive_cli, receive_results, resize, results, runner, stats, tables
from fastrecv.bench.arguments import STDOUT, one_cpu, refuse_twice, writable_file
from fastrecv.bench.floods import FLOODS, MAX_SOURCES
from fastrecv.bench.lab import BenchBusyError
from fastrecv.bench.prefixes import MAX_ENTRIES
from fastrecv.bench.programs import PROGRAMS
from fastrecv.bench.results import Result
from fastrecv.bench.stage import ForeignProgramError, Plan, SelectionError, Stage
from fastrecv.errors import NotSupported

__all__ = ["main"]

EXIT_GATE, EXIT_USAGE, EXIT_MISSING = 1, 2, 77

_GROUPS = {"udp": ["udp4", "udp6"], "syn": ["syn4", "syn6"], "all": list(FLOODS)} | {name: [name] for name in FLOODS}
_SECONDS = {False: 18.0, True: 60.0}  # by default: of a flood; in wire mode of a configuration, as in the cover letter
_SCALE = "1,10,200,1000,10000,100000"
_SCALE_SECONDS = 40.0


def _finite(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number of seconds")
    return value


def _programs(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if name not in PROGRAMS:
            raise click.BadParameter(f"no program {name!r}: choose from {', '.join(PROGRAMS)}")
    if len(set(names)) < len(names):
        raise click.BadParameter("a program is named twice")
    return names


def _sizes(_context: click.Context, _parameter: click.Parameter, value: str) -> list[int]:
    try:
        sizes = sorted({int(size) for size in value.split(",")})
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers like {_SCALE}") from None
    if sizes[0] < 1 or sizes[-1] > MAX_ENTRIES or len(sizes) < 2:
        raise click.BadParameter(f"give two or more sizes from 1 to {MAX_ENTRIES:,}")
    return sizes


def _measuring(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that all measuring commands share."""
    writable = click.Path(dir_okay=False, path_type=Path)
    for option in reversed(
        [
            click.option("--sources", type=click.IntRange(1, MAX_SOURCES), default=10_000, show_default=True,
                         help="Source ports of the flood."),
            click.option("--seed", type=click.IntRange(0), default=1, show_default=True,
                         help="Of the order within blocks and of the rule sets."),
            click.option("--cpu", type=int, callback=one_cpu,
                         help="The CPU that takes the flood.  [default: the last]"),
            click.option("--json", "json_file", type=writable, callback=writable_file,
                         help="Keep the result; - is stdout."),
            click.option("--report", type=writable, callback=writable_file, help="Write one self-contained HTML page."),
            click.option("--plot", type=writable, callback=writable_file, help="Write the main plot as SVG."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.option("--flood", type=click.Choice(list(_GROUPS)), default="udp", show_default=True)
@click.option(
    "--mode",
    type=click.Choice(["inject", "wire"]),
    default="inject",
    show_default=True,
    help="inject: frames straight into the stack. wire: across a veth into NAPI, rates by interface counters.",
)
@click.option(
    "--program",
    "programs",
    callback=_programs,
    default="letter",
    show_default=True,
    metavar="NAME,...",
    help=f"Attached programs, measured in the same blocks: {', '.join(PROGRAMS)}.",
)
@click.option(
    "--entries",
    type=click.IntRange(1, MAX_ENTRIES),
    default=200,
    show_default=True,
    help="Size of a program's rule set.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(1, 86400),
    callback=_finite,
    help="Of blocks for a flood, profiling on top; wire: for each of its configurations.  [default: 18; wire: 60]",
)
@click.option("--no-profile", is_flag=True, help="Leave out the CPU shares (perf); wire mode has none.")
@_measuring
@click.pass_context
def bench(context: click.Context, /, **options: Any) -> None:
    """Measure what a BPF sk_lookup program costs under a SYN or UDP flood on this kernel.

    All traffic stays in two private network namespaces that the bench makes itself and that end with it.
    """
    if context.invoked_subcommand is not None:
        given = [name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given:
            raise click.UsageError(f"options of {context.invoked_subcommand} go behind its name")
        return
    wire = options["mode"] == "wire"
    plan = Plan(
        kind="flood",
        floods=_GROUPS[options["flood"]],
        programs=[(name, options["entries"] if PROGRAMS[name].has_entries else 0) for name in options["programs"]],
        seconds=options["seconds"] or _SECONDS[wire],
        seed=options["seed"],
        sources=options["sources"],
        cpu=options["cpu"],
        wire=wire,
        profiled=not options["no_profile"] and not wire,
    )
    context.exit(_measure(plan, options))


@bench.command()
@click.option("--flood", type=click.Choice(list(_GROUPS)), default="udp4", show_default=True)
@click.option(
    "--program",
    type=click.Choice([name for name, method in PROGRAMS.items() if method.has_entries]),
    default="letter",
    show_default=True,
)
@click.option("--entries", callback=_sizes, default=_SCALE, show_default=True, help="The sizes, separated by commas.")
@click.option(
    "--seconds",
    type=click.FloatRange(1, 86400),
    callback=_finite,
    default=_SCALE_SECONDS,
    show_default=True,
    help="For each flood.",
)
@_measuring
@click.pass_context
def scale(context: click.Context, /, **options: Any) -> None:
    """Measure a program against the size of its rule set, all sizes in the same blocks."""
    plan = Plan(
        kind="scale",
        floods=_GROUPS[options["flood"]],
        programs=[(options["program"], size) for size in options["entries"]],
        seconds=options["seconds"],
        seed=options["seed"],
        sources=options["sources"],
        cpu=options["cpu"],
    )
    context.exit(_measure(plan, options))


@bench.command()
@click.argument("first", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("second", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def compare(context: click.Context, /, first: Path, second: Path, as_json: bool) -> None:
    """Compare two kept results, A.json and B.json: the Δ of each configuration, not absolute rates."""
    a, b = results.load(first), results.load(second)
    rows, notes = comparing.compare(a, b)
    click.echo(comparing.as_json(rows, notes) if as_json else comparing.render(rows, notes))
    context.exit(EXIT_GATE if a.failed_gates or b.failed_gates else 0)


@bench.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--report", type=click.Path(dir_okay=False, path_type=Path), callback=writable_file, help="Write the HTML page."
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=writable_file,
    help="Write the main plot as SVG.",
)
def show(file: Path, report: Path | None, plot: Path | None) -> None:
    """Print the tables of a kept result again."""
    if receive_results.is_one(file):
        if report:
            raise click.UsageError("a result of `receive` has no HTML page: take --plot")
        receive_cli.show(file, plot)
        return
    result = results.load(file)
    click.echo(tables.render(result))
    _write(result, report, plot)


bench.add_command(receive_cli.command)
bench.add_command(resize.command)


def _write(result: Result, report: Path | None, plot: Path | None) -> None:
    if not report and not plot:
        return
    from fastrecv.bench import report as reporting  # noqa: PLC0415 - matplotlib takes its time, and a home directory

    if report:
        report.write_text(reporting.render(result), encoding="utf-8")
    if plot:
        plot.write_text(reporting.figure(result), encoding="utf-8")


def _measure(plan: Plan, options: dict[str, Any]) -> int:
    """Run the plan, print the tables, write the files that the options name; the exit code."""
    json_file = options["json_file"]
    refuse_twice(json_file, options["report"], options["plot"])
    with _Progress(plan.flood_seconds) as progress:
        result = runner.run(plan, progress)
    if json_file == STDOUT:
        click.echo(results.encode(result))
    else:
        if json_file:
            json_file.write_bytes(results.encode(result))  # first: nothing that goes wrong with a view may lose it
        click.echo(tables.render(result))
    _write(result, options["report"], options["plot"])
    return EXIT_GATE if result.failed_gates else 0


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
    for row in [again, *(row.configuration for row in stage.rows if row.program is not None)]:
        delta = stats.estimate(baseline.ns, row.ns, stage.record.setups, resamples=200)
        name = "A/A" if row is again else row.name
        parts.append(f"{name} {delta.estimate:+.1f} ±{delta.half_width:.1f} %")
    return f"{len(stage.record.order)} blocks  " + "  ".join(parts)


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds, so that everything is undone


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = bench.main(args=arguments, prog_name="python -m fastrecv.bench", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        return EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("fastrecv.bench: interrupted; nothing was left behind", err=True)
        return 128 + signal.SIGINT
    except (comparing.IncomparableError, results.ResultError) as error:
        click.echo(f"fastrecv.bench: {error}", err=True)
        return EXIT_USAGE
    except (ForeignProgramError, SelectionError, BenchBusyError) as error:
        click.echo(f"fastrecv.bench: {error}", err=True)
        return EXIT_GATE
    except NotSupported as error:
        click.echo(f"fastrecv.bench: {error}", err=True)
        return EXIT_MISSING
    except (OSError, NetlinkError) as error:
        click.echo(f"fastrecv.bench: {error}", err=True)
        return EXIT_GATE
    return int(code or 0)
