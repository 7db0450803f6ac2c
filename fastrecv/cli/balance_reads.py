"""`fastrecv balance`: the nouns, which only read."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import click

from fastrecv import balance_explain, balance_life, groups, metrics, pins
from fastrecv.balance import Balancer, Slot
from fastrecv.cli import output
from fastrecv.cli.arguments import BPFFS_OPTION, ENDPOINT, NAME, NETNS_OPTION, entered
from fastrecv.cli.serving import serve_metrics
from fastrecv.errors import NotSupported, StateError
from fastrecv.groups import Member
from fastrecv.policies import BUCKETS, Sender

__all__ = ["COMMANDS", "described"]

Address = IPv4Address | IPv6Address
Members = dict[int, Member]  # by cookie


def described(balancer: Balancer) -> str:
    """What a balancer does, in words."""
    policy = balancer.policy
    mapped = f"{policy.mapped} prefixes, else " if policy.mapped else ""
    tracked = f", {balancer.senders:,} senders may be known" if balancer.senders else ""
    return f"by {mapped}{policy}, {len(balancer.weights)} slots, empty slots: {balancer.empty}{tracked}"


@click.command()
@click.argument("name", type=NAME, required=False)
@output.json_option
@NETNS_OPTION
@BPFFS_OPTION
def status(name: str | None, as_json: bool, netns: str | None, bpffs: Path) -> None:
    """The balancers that there are, or the slots of one NAME: who has which, and what they have counted.

    As root it is told, too, what each socket has queued and dropped, whose it is, and whether its group still has the
    balancer's program: any member may replace it. --netns says where the sockets are.
    """
    if name is None:
        _overview(as_json, bpffs)
        return
    with entered(netns):
        members = _members()
    with balance_life.opened(name, bpffs=bpffs, read_only=True) as balancer:
        slots, program = balancer.slots(), balancer.maps.program.info
        unreadable = balancer.counters()[None]
        places = {str(prefix): slot for prefix, slot in balancer.places().items()}
        words, policy = described(balancer), balancer.policy
        quiet = {slot.number: balancer.leaving.known(slot.number) for slot in slots if slot.leaving}
    complaints = _complaints(name, slots, members, program.id)
    if as_json:
        output.as_json({
            "name": name, "policy": str(policy), "map": policy.mapped, "seed": policy.seed, "program": program.id,
            "slots": [_document(slot, members) for slot in slots], "places": places,
            "leaving": {str(slot): {"senders": known.senders, "quiet": known.quiet} for slot, known in quiet.items()},
            "unreadable": unreadable["unreadable"], "unassigned": unreadable["empty"], "complaints": complaints,
        })  # fmt: skip
        return
    click.echo(f"{name}: {words}; program {program.id}")
    output.table(
        ("slot", "state", "weight", "share", "socket", "process", "queue", "drops", "selected", "empty", "fallback",
         "wrong"),
        [_row(slot, members) for slot in slots], remarkable=lambda row: row[1] != "active" or bool(row[-1]),
    )  # fmt: skip
    for slot, known in quiet.items():
        said = f", the last came {known.quiet:.0f} s ago" if known.quiet is not None else ""
        click.echo(f"slot {slot} is drained by sender: {known.senders:,} are known{said}")
    for prefix, place in places.items():
        click.echo(f"{policy.mapped} {prefix}: slot {place}")
    if unreadable["unreadable"] or unreadable["empty"]:
        click.echo(f"{unreadable['unreadable']:,} without a readable header, {unreadable['empty']:,} that no slot has")
    for complaint in complaints:
        click.secho(complaint, fg="yellow", err=True)


def _overview(as_json: bool, bpffs: Path) -> None:
    rows = []
    for name in balance_life.names(bpffs):
        with balance_life.opened(name, bpffs=bpffs, read_only=True) as balancer:
            rows.append((name, str(balancer.policy), len(balancer.weights), len(balancer.sockets()), balancer.empty))
    if as_json:
        output.as_json([dict(zip(("name", "policy", "size", "sockets", "empty"), row, strict=True)) for row in rows])
        return
    if not rows:
        raise StateError("there is no balancer: `fastrecv balance create`")
    output.table(("balancer", "policy", "size", "sockets", "empty slots"), rows)


def _members() -> Members | None:
    """Every socket of a group here; None where they may not be looked at."""
    try:
        return {member.cookie: member for member in groups.members()}
    except (NotSupported, PermissionError):
        return None


def _complaints(name: str, slots: list[Slot], members: Members | None, program: int) -> list[str]:
    """What keeps the slots' sockets from being balanced."""
    if members is None:
        return []
    found = []
    strays = sorted(slot.number for slot in slots if slot.socket is not None and slot.socket not in members)
    if strays:
        found.append(f"slots {', '.join(map(str, strays))}: their sockets are in another network namespace: --netns")
    groups_of: dict[str, set[int]] = {}
    for slot in slots:
        member = members.get(slot.socket or 0)
        if member is not None:
            groups_of.setdefault(member.where, set()).add(member.program)
    if len(groups_of) > 1:
        found.append(f"its sockets are of several groups, and a program selects its own group's only: "
                     f"{', '.join(sorted(groups_of))}")  # fmt: skip
    for where, programs in groups_of.items():
        other = sorted(programs - {program})
        if other == [0]:
            found.append(f"the group of {where} has no program: `fastrecv balance attach {name}`")
        elif other:
            found.append(f"the group of {where} has program {other[0]} instead of {program}: somebody has replaced it; "
                         f"`fastrecv balance attach {name}` puts this one back")  # fmt: skip
    return found


def _row(slot: Slot, members: Members | None) -> tuple[object, ...]:
    member = (members or {}).get(slot.socket or 0)
    counters = slot.counters
    return (
        slot.number, slot.state, slot.weight, f"{100 * slot.buckets / BUCKETS:.1f} %",
        f"sk:{slot.socket:x}" if slot.socket is not None else "-", member.process if member else "-",
        member.queue if member else "-", member.drops if member else "-",
        counters["selected"], counters["empty"], counters["fallback"], counters["wrong"],
    )  # fmt: skip


def _document(slot: Slot, members: Members | None) -> dict[str, object]:
    member = (members or {}).get(slot.socket or 0)
    more = {"pid": member.pid, "queue": member.queue, "drops": member.drops} if member else {}
    return {
        "slot": slot.number, "state": slot.state, "weight": slot.weight, "buckets": slot.buckets,
        "socket": slot.socket, **more, **slot.counters,
    }  # fmt: skip


@click.command()
@click.argument("name", type=NAME)
@click.argument("source", type=ENDPOINT)
@click.argument("destination", type=ENDPOINT, required=False)
@click.option("--payload", metavar="HEX", help="What follows the header, for payload and quic policies.")
@click.option("--cpu", type=click.IntRange(0), help="The CPU that takes the packet, for cpu policies.")
@output.json_option
@BPFFS_OPTION
def explain(
    name: str, source: tuple[Address, int], destination: tuple[Address, int] | None, payload: str | None,
    cpu: int | None, as_json: bool, bpffs: Path,
) -> None:  # fmt: skip
    """Who gets a sender, and why; no packet is sent.

    \b
    fastrecv balance explain flows 198.51.100.7
    fastrecv balance explain web 198.51.100.7:4242 192.0.2.1:443
    """  # noqa: D301 - click wants the character
    with balance_life.opened(name, bpffs=bpffs, read_only=True) as balancer:
        sender = _sender(balancer, source, destination, payload, cpu)
        found = balance_explain.explain(balancer, sender)
    if as_json:
        output.as_json(found._asdict())
        return
    head = "nobody knows" if found.slot is None and found.bucket is None and found.taker is None else (
        f"slot {found.taker}" if found.taker is not None else "no slot")  # fmt: skip
    click.echo(f"{head}: {found.reason}")


def _sender(
    balancer: Balancer, source: tuple[Address, int], destination: tuple[Address, int] | None, payload: str | None,
    cpu: int | None,
) -> Sender:  # fmt: skip
    """What the policy needs of a packet, or a usage error that says what is missing."""
    key, mapped = balancer.policy.key, balancer.policy.mapped
    if destination is None and (key in ("flow", "destination") or mapped == "destination"):
        raise click.UsageError(f"by {balancer.policy} the destination counts: give it, too")
    if destination is not None and destination[0].version != source[0].version:
        raise click.UsageError("source and destination are of different IP versions")
    if key in ("source+port", "flow") and not source[1]:
        raise click.UsageError(f"by {balancer.policy} the port counts: give SOURCE with its port")
    if key == "flow" and destination is not None and not destination[1]:
        raise click.UsageError(f"by {balancer.policy} the port counts: give DESTINATION with its port")
    if key in ("payload", "quic") and payload is None:
        raise click.UsageError(f"by {balancer.policy} the payload counts: give --payload")
    try:
        content = bytes.fromhex(payload or "")
    except ValueError:
        raise click.UsageError(f"--payload {payload!r} is no hexadecimal text") from None
    return Sender(*source, *(destination or source), content, cpu)


@click.command("metrics")
@click.option(
    "--listen", type=ENDPOINT, metavar="ADDRESS:PORT", help="Serve them over HTTP instead, until interrupted."
)
@BPFFS_OPTION
def show_metrics(listen: tuple[Address, int] | None, bpffs: Path) -> None:
    """Counters of all balancers in Prometheus' text format; served over HTTP, without any capability, with --listen."""
    pins.check_mounted(bpffs)
    collector = metrics.BalancerCollector(bpffs)
    if listen is not None:
        serve_metrics(collector, *listen)
        return
    for name in balance_life.names(bpffs):
        with contextlib.suppress(StateError), balance_life.opened(name, bpffs=bpffs, read_only=True):
            pass  # who may not read it hears so
    click.echo(metrics.text(collector), nl=False)


COMMANDS: tuple[click.Command, ...] = (status, show_metrics, explain)
