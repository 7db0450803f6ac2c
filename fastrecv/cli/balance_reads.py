"""`fastrecv balance`: the nouns, which only read."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import click

from fastrecv import balance_explain, balance_life, groups, metrics, pins
from fastrecv.balance import Balancer, Slot
from fastrecv.cli import output
from fastrecv.cli.arguments import BPFFS_OPTION, ENDPOINT, NAME, NETNS_OPTION, entered
from fastrecv.cli.serving import serve_metrics
from fastrecv.errors import StateError
from fastrecv.groups import Member, Owner
from fastrecv.policies import BUCKETS, Sender
from fastrecv.rules import PROTOCOL_NAMES

__all__ = ["COMMANDS", "described"]

Address = IPv4Address | IPv6Address
Seen = dict[int, tuple[Member, list[Owner]]]  # by cookie


def described(balancer: Balancer) -> str:
    """What a balancer does, in words."""
    policy = balancer.policy
    mapped = f"{policy.mapped} prefixes, else " if policy.mapped else ""
    tracked = f", {balancer.senders:,} senders may be known" if balancer.senders else ""
    slots = "1 slot" if balancer.size == 1 else f"{balancer.size} slots"
    return f"by {mapped}{policy}, {slots}, empty slots: {balancer.empty}{tracked}"


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
        seen = _seen()
    with balance_life.opened(name, bpffs=bpffs, read_only=True) as balancer:
        slots, program = balancer.slots(), balancer.maps.program.info
        unreadable, sampling = balancer.counters()[None], balancer.sampling
        places = {str(prefix): slot for prefix, slot in balancer.places().items()}
        words, policy, size, empty = described(balancer), balancer.policy, balancer.size, balancer.empty
        quiet = {slot.number: balancer.leaving.known(slot.number) for slot in slots if slot.leaving}
    complaints = _complaints(name, slots, seen, program.id)
    if as_json:
        output.as_json({
            "name": name, "policy": str(policy), "map": policy.mapped, "seed": policy.seed, "size": size,
            "empty": empty, "program": program.id,
            "slots": [_document(slot, seen) for slot in slots], "places": places,
            "leaving": {str(slot): {"senders": known.senders, "quiet": known.quiet} for slot, known in quiet.items()},
            "unreadable": unreadable["unreadable"], "unassigned": unreadable["empty"], "sampling": sampling,
            "complaints": complaints,
        })  # fmt: skip
        return
    click.echo(f"{name}: {words}; program {program.id}")
    output.table(
        ("slot", "state", "weight", "share", "socket", "process", "queue", "drops", "selected", "empty", "fallback",
         "wrong"),
        [_row(slot, seen) for slot in slots], remarkable=lambda row: row[1] != "active" or bool(row[-1]),
    )  # fmt: skip
    if sampling:
        click.echo(f"one choice in {sampling:,} is told to `fastrecv watch`")
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
    rows: list[tuple[object, ...]] = []
    for name in balance_life.names(bpffs):
        try:
            with balance_life.opened(name, bpffs=bpffs, read_only=True) as balancer:
                rows.append((name, str(balancer.policy), balancer.size, len(balancer.sockets()), balancer.empty))
        except PermissionError:
            rows.append((name, "not yours to read", None, None, None))
    if as_json:
        output.as_json([dict(zip(("name", "policy", "size", "sockets", "empty"), row, strict=True)) for row in rows])
        return
    if not rows:
        raise StateError("there is no balancer: `fastrecv balance create`")
    words = [tuple("-" if cell is None else cell for cell in row) for row in rows]
    output.table(("balancer", "policy", "size", "sockets", "empty slots"), words)


def _seen() -> Seen | None:
    """Every member of a group here, by its cookie, and who holds it; None where they may not be looked at."""
    try:
        found = {member.cookie: member for member in groups.members()}
    except PermissionError:
        return None
    owners = groups.owners(member.inode for member in found.values())
    return {cookie: (member, owners.get(member.inode, [])) for cookie, member in found.items()}


def _complaints(name: str, slots: list[Slot], seen: Seen | None, program: int) -> list[str]:
    """What keeps the slots' sockets from being balanced."""
    if seen is None:
        return []
    members = [seen[slot.socket][0] for slot in slots if slot.socket in seen]
    found = []
    strays = [str(slot.number) for slot in slots if slot.socket is not None and slot.socket not in seen]
    if strays:
        found.append(
            f"slots {', '.join(strays)}: their sockets are in another network namespace: say with --netns where"
        )
    present = {member.group: member for member in members}
    if len(present) > 1:
        found.append(f"its sockets are of {len(present)} groups, and a program selects only those of the group that it "
                     f"runs for: {', '.join(sorted(map(_where, present.values())))}")  # fmt: skip
    for member in present.values():
        cure = f"`fastrecv balance attach {name}` gives it this one"
        if member.program is None:
            found.append(f"the group of {_where(member)} has no program: {cure}")
        elif member.program != program:
            other = "a classic BPF program" if member.program == groups.CLASSIC else f"program {member.program}"
            found.append(f"the group of {_where(member)} has {other} instead of {program}: {cure}")
    return found


def _where(member: Member) -> str:
    return f"{PROTOCOL_NAMES[member.protocol]} {member.address} port {member.port}"


def _row(slot: Slot, seen: Seen | None) -> tuple[object, ...]:
    member, owners = (seen or {}).get(slot.socket or 0, (None, []))
    counters = slot.counters
    return (
        slot.number, slot.state, slot.weight, f"{100 * slot.buckets / BUCKETS:.1f} %",
        f"sk:{slot.socket:x}" if slot.socket is not None else "-",
        ", ".join(f"{owner.pid} {owner.command}" for owner in owners) or "-",
        member.queue if member else "-", member.drops if member else "-",
        counters["selected"], counters["empty"], counters["fallback"], counters["wrong"],
    )  # fmt: skip


def _document(slot: Slot, seen: Seen | None) -> dict[str, object]:
    member, owners = (seen or {}).get(slot.socket or 0, (None, []))
    return {
        "slot": slot.number, "state": slot.state, "weight": slot.weight, "buckets": slot.buckets,
        "socket": slot.socket, "pids": [owner.pid for owner in owners], "queue": member.queue if member else None,
        "drops": member.drops if member else None, **slot.counters,
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
        raise click.UsageError("the destination counts for this balancer: give it, too")
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
    denied, readable = None, False
    for name in balance_life.names(bpffs):
        try:
            with balance_life.opened(name, bpffs=bpffs, read_only=True):
                readable = True
        except PermissionError as error:
            denied = error
        except StateError:
            continue  # the metrics say so
    if denied is not None and not readable:
        raise denied
    click.echo(metrics.text(collector), nl=False)


COMMANDS: tuple[click.Command, ...] = (status, show_metrics, explain)
