"""The command `python -m fastrecv.bench outage`."""

from __future__ import annotations

import json

import click

from fastrecv import features
from fastrecv.bench import environment, outage
from fastrecv.bench.measuring import finite
from fastrecv.bench.numbered import MAX_SENDERS
from fastrecv.bench.outage import Plan, Run
from fastrecv.bench.survive_cli import MAX_WORKERS

__all__ = ["command", "described"]

_MIB = float(1 << 20)


def described(found: Run) -> str:
    """In words, a line each."""
    account = found.account
    drained = "never" if found.drained is None else f"in {found.drained:.1f} s"
    lines = [
        f"{account.sent:,} datagrams in {found.seconds:.0f} s ({found.rate:,.0f} a second), the engine away for "
        f"{found.plan.away:g} s of them",
        f"  {account.taken:,} received; dropped: {account.full:,} full queue, {account.refused:,} refused",
        f"  the spool held up to {found.full_messages:,} messages, {found.full_bytes / _MIB:.1f} MiB, and was drained "
        f"{drained}",
        f"  {found.messages:,} messages in the stream; sent twice and removed: {found.duplicates:,} by the stream, "
        f"{found.repeated:,} by the consumer",
        f"  {account.consumed:,} datagrams at the consumer: {account.missing:,} missing, {account.twice:,} twice, "
        f"{account.disordered:,} out of order, {account.astray:,} in a wrong shard",
    ]
    return "\n".join(lines + [f"  FAULT: {fault}" for fault in outage.faults(found)])


@click.command("outage")
@click.option("--away", type=click.FloatRange(0.5, 3600), callback=finite, default=30.0, show_default=True,
              help="Seconds for which the engine is away.")  # fmt: skip
@click.option("--rate", type=click.IntRange(100, 1_000_000), default=100_000, show_default=True,
              help="Datagrams a second.")  # fmt: skip
@click.option("--senders", type=click.IntRange(100, MAX_SENDERS), default=1000, show_default=True)
@click.option("--workers", type=click.IntRange(1, MAX_WORKERS), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    context: click.Context, away: float, rate: int, senders: int, workers: int, as_json: bool
) -> None:  # fmt: skip
    """Take the engine away from `fastrecv run` with a JetStream sink, and account for every datagram.

    nats-server is killed under a steady rate of numbered datagrams, and started again on the same store. Exit code 1
    where the kernel dropped a datagram, where one is missing in the stream, twice, out of its sender's order or in a
    wrong shard, or where the spool was not drained. All of it in a private network namespace.
    """
    for name in ("network namespaces", "the balancer's program"):
        features.check(name)
    try:
        found = outage.run(Plan(away, rate, senders, workers), lambda step: click.echo(step, err=True))
    except RuntimeError as error:
        click.echo(f"fastrecv.bench: {error}", err=True)
        context.exit(1)
    if as_json:
        record = found._asdict() | {"plan": found.plan._asdict(), "account": found.account._asdict()}
        faults = outage.faults(found)
        click.echo(json.dumps({"environment": environment.record(), **record, "faults": faults}, indent=2))
    else:
        click.echo(described(found))
    context.exit(1 if outage.faults(found) else 0)
