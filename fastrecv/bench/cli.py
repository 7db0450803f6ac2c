"""The command line: `python -m fastrecv.bench`.

Exit codes: 0 measured; 1 a gate failed; 2 usage; 77 a privilege or a kernel feature is missing; 130, 143 interrupted.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from click.core import ParameterSource
from pyroute2.netlink.exceptions import NetlinkError

from fastrecv.bench import (
    collect_cli,
    measuring,
    outage_cli,
    receive_cli,
    receive_results,
    resize,
    results,
    soak_cli,
    steer_cli,
    survive_cli,
    workers_cli,
    xdp_cli,
)
from fastrecv.bench import compare as comparing
from fastrecv.bench.arguments import writable_file
from fastrecv.bench.floods import FLOODS
from fastrecv.bench.lab import BenchBusyError
from fastrecv.bench.prefixes import MAX_ENTRIES
from fastrecv.bench.programs import PROGRAMS
from fastrecv.bench.scale_out import cli as scale_out_cli
from fastrecv.bench.stage import ForeignProgramError, Plan, SelectionError
from fastrecv.errors import NotSupported

__all__ = ["main"]

EXIT_GATE, EXIT_USAGE, EXIT_MISSING = 1, 2, 77

_GROUPS = {"udp": ["udp4", "udp6"], "syn": ["syn4", "syn6"], "all": list(FLOODS)} | {name: [name] for name in FLOODS}
_SECONDS = {False: 18.0, True: 60.0}  # by default: of a flood; in wire mode of a configuration, as in the cover letter
_SCALE = "1,10,200,1000,10000,100000"
_SCALE_SECONDS = 40.0


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
    callback=measuring.finite,
    help="Of blocks for a flood, profiling on top; wire: for each of its configurations.  [default: 18; wire: 60]",
)
@click.option("--no-profile", is_flag=True, help="Leave out the CPU shares (perf); wire mode has none.")
@measuring.sources
@measuring.options
@measuring.report
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
    context.exit(measuring.measure(plan, options["json_file"], options["plot"], options["report"]))


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
    callback=measuring.finite,
    default=_SCALE_SECONDS,
    show_default=True,
    help="For each flood.",
)
@measuring.sources
@measuring.options
@measuring.report
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
    context.exit(measuring.measure(plan, options["json_file"], options["plot"], options["report"]))


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
    if report and result.kind == "steer":
        raise click.UsageError("a result of `steer` has no HTML page: take --plot")
    click.echo(measuring.render(result))
    measuring.write(result, report, plot)


bench.add_command(outage_cli.command)
bench.add_command(receive_cli.command)
bench.add_command(collect_cli.command)
bench.add_command(resize.command)
bench.add_command(steer_cli.command)
bench.add_command(survive_cli.command)
bench.add_command(soak_cli.command)
bench.add_command(scale_out_cli.command)
bench.add_command(workers_cli.command)
bench.add_command(xdp_cli.command)


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
