"""The command `python -m fastrecv.bench soak`."""

from __future__ import annotations

import json

import click

from fastrecv import features
from fastrecv.bench import environment, soak, survive_tables
from fastrecv.bench.soak import Soak
from fastrecv.bench.survive import Plan
from fastrecv.bench.survive_churn import Action
from fastrecv.bench.survive_cli import MAX_WORKERS, actions, progress

__all__ = ["command", "described"]

_MIB = float(1 << 20)
_SENDERS = 1000
_ACTIONS: tuple[Action, ...] = ("kill", "restart", "resize")


def described(found: Soak) -> str:
    """In words, a line each."""
    last = found.samples[-1]
    lines = [survive_tables.described(found.run._replace(faults=[]))]
    lines += [
        f"  resident memory of the {slope.what} grows by {slope.estimate / _MIB:+.2f} MiB an hour, 95 % interval "
        f"[{slope.low / _MIB:+.2f}, {slope.high / _MIB:+.2f}], over {slope.seconds:.0f} s"
        for slope in found.slopes
    ]
    lines.append(
        f"  the supervisor at the end: {last.resident / _MIB:.1f} MiB, {last.descriptors} descriptors, {last.objects} "
        f"of them of BPF, {last.workers} workers"
    )
    lines += [f"  FAULT: {fault}" for fault in found.faults]
    return "\n".join(lines)


@click.command("soak")
@click.option("--minutes", type=click.FloatRange(0.05, 10_000), default=15.0, show_default=True)
@click.option("--workers", type=click.IntRange(2, MAX_WORKERS), default=4, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of what happens when, to whom.")
@actions(_ACTIONS)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    context: click.Context, minutes: float, workers: int, seed: int, chosen: list[Action], as_json: bool
) -> None:
    """Look for what a service leaks while its workers are killed, restarted and resized.

    It gets 10,000 datagrams a second. Exit code 1 where the supervisor has more descriptors or BPF objects than at
    first, at the same number of workers; where processes, BPF programs, links, pins or shared memory are left behind;
    or where `survive` would say so. The growth of resident memory is told with its interval, and judged by nobody.
    Rolling restarts come in the first third of the time.
    """
    for name in ("network namespaces", "the balancer's program"):
        features.check(name)
    try:
        found = soak.run(Plan(workers, _SENDERS, 60 * minutes, seed, chosen), progress())
    except RuntimeError as error:
        click.echo(f"fastrecv.bench: {error}", err=True)
        context.exit(1)
    if as_json:
        record = {
            "run": survive_tables.record(found.run), "faults": found.faults,
            "slopes": [slope._asdict() for slope in found.slopes],
            "samples": [sample._asdict() for sample in found.samples],
        }  # fmt: skip
        click.echo(json.dumps({"environment": environment.record(), **record}, indent=2))
    else:
        click.echo(described(found))
    context.exit(1 if found.faults else 0)
