"""The command `python -m fastrecv.bench scale-out`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from fastrecv import features
from fastrecv._flow import MOST_EXPORTERS
from fastrecv.bench import environment, measuring
from fastrecv.bench.arguments import STDOUT, writable_file
from fastrecv.bench.scale_out.bed import MOST_HOSTS
from fastrecv.bench.scale_out.exporters import RECORDS, ROUNDS
from fastrecv.bench.scale_out.processes import PACKAGES, found

__all__ = ["command"]

_EXIT_MISSING = 77
_BETWEEN = 0.1  # of the time: between two changes of routes


def _check_rate(rate: int, exporters: int, seconds: float, **_others: Any) -> None:
    """UsageError where the time between two changes is too short for every exporter to be heard of."""
    least = ROUNDS * RECORDS * exporters / (_BETWEEN * seconds)
    if rate < least:
        raise click.UsageError(f"{exporters:,} exporters in {seconds:g} s need --rate {math.ceil(least)} at least")


@click.command("scale-out")
@click.option("--seconds", type=click.FloatRange(4, 86400), callback=measuring.finite, default=60.0, show_default=True,
              help="That all that befalls is spread over; throughput is measured before it.")  # fmt: skip
@click.option("--hosts", type=click.IntRange(2, MOST_HOSTS - 1), default=3, show_default=True,
              help="To begin with; one is added.")  # fmt: skip
@click.option("--exporters", type=click.IntRange(100, MOST_EXPORTERS), default=2000, show_default=True)
@click.option("--rate", type=click.IntRange(RECORDS), default=20_000, show_default=True,
              help=f"Records a second; {RECORDS} a datagram.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of what happens when, to whom.")
@click.option("--policy", type=click.Choice(["0", "1"]), default="0", show_default=True,
              help="What the router hashes: 0 addresses, 1 ports too (fib_multipath_hash_policy).")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), callback=writable_file,
              help="Keep the result; - is stdout.")  # fmt: skip
@click.pass_context
def command(context: click.Context, /, policy: str, json_file: Path | None, **options: Any) -> None:
    """Send numbered flow records to hosts behind a router with ECMP, break everything once, and account for each.

    Every host is a supervised flow collector, that of `fastrecv collect --shards --flush 0`, with two workers; it
    publishes to a cluster of three nats-servers (JetStream, a copy on each), from which two consumers take what there
    is, by shards. Meanwhile workers are killed, a whole host, the engine's leader and the consumers; a host is added
    and one taken away. Exit code 1 where a record that a host had
    acknowledged is at no consumer, where a duplicate is left after removal, or where records are missing that nobody
    had in a queue or in his hands when he was killed. All of it in private network namespaces.
    """
    _check_rate(**options)
    for name in ("network namespaces", "veth devices", "the balancer's program"):
        features.check(name)
    for program in PACKAGES:
        found(program)
    try:
        from fastrecv.bench.scale_out import running, tables  # noqa: PLC0415 - the sinks' extra is not the bench's
    except ModuleNotFoundError as error:
        click.echo(f"fastrecv.bench: scale-out needs {error.name}: pip install 'fastrecv[bench,sinks]'", err=True)
        context.exit(_EXIT_MISSING)
    plan = running.Plan(policy=1 if policy == "1" else 0, **options)
    try:
        run = running.run(plan, lambda words: click.echo(words, err=True))
    except RuntimeError as error:
        click.echo(f"fastrecv.bench: {error}", err=True)
        context.exit(1)
    kept = {"environment": environment.record(), "plan": plan._asdict(), "run": tables.record(run)}
    if json_file == STDOUT:
        click.echo(json.dumps(kept, indent=2))
    else:
        if json_file:
            json_file.write_text(json.dumps(kept, indent=2))
        click.echo(tables.described(plan, run))
    context.exit(1 if run.faults else 0)
