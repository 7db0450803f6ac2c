"""A run of the scale-out bench in words, as tables, and for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastrecv.bench.scale_out.account import Account, AtHost
from fastrecv.bench.scale_out.paper import HOSTS, OUTAGE, Need, needed
from fastrecv.bench.scale_out.running import Plan, Run
from fastrecv.bench.tables import markdown

__all__ = ["described", "record"]


def described(plan: Plan, run: Run) -> str:
    """A run as text."""
    done = ", ".join(f"{what}: {count}" for what, count in sorted(run.done.items()))
    parts = [
        f"{plan.hosts} hosts, {plan.exporters:,} exporters, {run.records:,} records in {run.seconds:.0f} s "
        f"({run.records / run.seconds:,.0f} a second); hash policy {plan.policy}, seed {plan.seed}",
        done,
        _where(run),
        _at_hosts(run.account.hosts),
        _moved(run),
        f"All processes shared {run.cpus} CPUs.\n\n{_throughput(run)}",
        _paper(needed(run.throughput[0])),
        *(f"FAULT: {fault}" for fault in run.faults),
    ]
    return "\n\n".join(parts)


def _where(run: Run) -> str:
    account, delivered = run.account, run.account.deliveries
    rows = [
        ("sent", account.sent),
        ("arrived at a host", account.arrived),
        ("reached a queue", account.queued),
        ("acknowledged by a host", account.acknowledged),
        ("**acknowledged, and at no consumer**", account.nowhere),
        ("at a consumer", account.kept),
        ("of these not acknowledged: published just before a kill", account.saved),
        ("lost with the queues of a killed host", account.destroyed),
        ("lost in the hands of killed workers", account.in_hands - account.saved),
        ("in the killed host's spool alone while it was away", run.spooled),
        ("published again, and removed by the engine (messages)", delivered.removed),
        ("delivered to consumers", delivered.records),
        ("of these duplicates: before removal", account.before),
        ("because a message was stored twice", delivered.stored_twice),
        ("**duplicates after removal**", account.after),
        ("**delivered in another subject than their exporter's**", delivered.astray),
    ]
    return markdown(["records", "count"], [[name, f"{count:,}"] for name, count in rows])


def _at_hosts(hosts: Sequence[AtHost]) -> str:
    header = [
        "host",
        "arrived",
        "port closed",
        "queue full",
        "destroyed with a queue",
        "taken",
        "in hands",
        "acknowledged",
    ]
    return markdown(header, [
        [str(host.number), *(f"{count:,}" for count in (
            host.arrived, host.refused, host.full, host.destroyed, host.taken, host.in_hands, host.acknowledged))]
        for host in hosts
    ])  # fmt: skip


def _moved(run: Run) -> str:
    header = ["change of routes", "hosts", "exporters moved", "fewest that could"]
    rows = [
        [step.what, f"{step.before} to {step.after}", f"{step.moved:,}", f"{step.ideal:,.0f}"]
        for step in run.moves.steps
    ]
    spread = (
        f"Exporters at more than one host while no route changed: {run.moves.spread:,} at most. "
        f"Exporters that no host had between two changes: {run.moves.unseen:,}."
    )
    return f"{markdown(header, rows)}\n\n{spread}"


def _throughput(run: Run) -> str:
    names = list(run.throughput[0].microseconds)
    header = [
        "hosts", "records a second", *(f"µs of CPU a record: {name}" for name in names), "records a message",
        "bytes a record in the engine",
    ]  # fmt: skip
    return markdown(header, [
        [str(one.hosts), f"{one.rate:,.0f}", *(f"{one.microseconds[name]:.1f}" for name in names),
         f"{one.records / max(1, one.messages):.0f}", f"{one.bytes / max(1, one.records):.0f}"]
        for one in run.throughput
    ])  # fmt: skip


def _paper(need: Need) -> str:
    minutes = f"{OUTAGE / 60:.0f} minutes"
    rows = [
        ("records a second", f"{need.records:,.0f}"),
        ("messages a second", f"{need.messages:,.0f}"),
        ("MB a second into the engine", f"{need.bytes / 1e6:,.0f}"),
        ("MB a second that all nodes write", f"{need.copied / 1e6:,.0f}"),
        *((f"CPUs: {name}", f"{busy:,.0f}") for name, busy in need.cpus.items()),
        (f"GB on all nodes: consumers away for {minutes}", f"{need.stored / 1e9:,.0f}"),
        (f"GB on a host: the engine away for {minutes}", f"{need.spooled / 1e9:,.1f}"),
        ("message ids known at once", f"{need.ids:,.0f}"),
    ]
    return markdown([f"on paper: {HOSTS} hosts as the one alone", "need"], [list(row) for row in rows])


def record(run: Run) -> dict[str, Any]:
    """For JSON."""
    return run._asdict() | {
        "account": _account(run.account),
        "moves": run.moves._asdict() | {"steps": [step._asdict() for step in run.moves.steps]},
        "throughput": [one._asdict() | {"rate": one.rate} for one in run.throughput],
        "held": run.held._asdict(),
        "paper": needed(run.throughput[0])._asdict(),
    }


def _account(account: Account) -> dict[str, Any]:
    derived = ("arrived", "queued", "destroyed", "in_hands", "before")
    return account._asdict() | {name: getattr(account, name) for name in derived} | {
        "deliveries": account.deliveries._asdict(),
        "hosts": [
            host._asdict() | {"destroyed": host.destroyed, "in_hands": host.in_hands} for host in account.hosts
        ],
    }  # fmt: skip
