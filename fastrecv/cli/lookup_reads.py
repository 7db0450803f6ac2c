"""`fastrecv lookup`: the nouns, which only read."""

from __future__ import annotations

import contextlib
from datetime import datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

import click

from fastrecv import explain as explaining
from fastrecv import lookup_life, metrics, pins, ruletext
from fastrecv.cli import output
from fastrecv.cli.arguments import ENDPOINT, LABEL_OR_DROP, PORTS, PREFIX, entered, place
from fastrecv.cli.serving import serve_metrics
from fastrecv.errors import StateError
from fastrecv.lookup import ERRORS, Dispatcher, Serving
from fastrecv.rules import FAMILY_NAMES, PROTOCOL_NAMES, PROTOCOLS, Binding
from fastrecv.state import DROP

__all__ = ["COMMANDS"]


@click.command()
@click.argument("label", type=LABEL_OR_DROP, required=False)
@output.json_option
@place
def status(label: str | None, as_json: bool, netns: str | None, bpffs: Path) -> None:
    """What is loaded: destinations (of one LABEL), their sockets and counters."""
    remnants = [str(path) for path in lookup_life.remnants(bpffs)]
    try:
        dispatcher = Dispatcher(netns, bpffs=bpffs, read_only=True)
    except StateError:
        _mourn(remnants)
        raise
    with dispatcher:
        serving = [found for found in dispatcher.serving() if label in (None, found.destination.label or DROP)]
        if label is not None and not serving:
            raise StateError(f"nothing is bound to {label!r}, and no socket registered")
        state, link, info = dispatcher.state, dispatcher.link, dispatcher.program.info
        loaded = datetime.fromtimestamp(state.loaded).astimezone()
    if as_json:
        output.as_json({
            "netns_cookie": dispatcher.cookie,
            "program": {"id": info.id, "tag": info.tag, "fastrecv": state.version},
            "link": link.id if link is not None else None,
            "loaded": loaded.isoformat(timespec="seconds"),
            "bindings": len(state.rows),
            "destinations": [_document(found) for found in serving],
            "remnants": remnants,
        })  # fmt: skip
        return
    click.echo(
        f"network namespace {dispatcher.cookie}: program {info.id} (tag {info.tag}, fastrecv {state.version}), loaded "
        f"{loaded:%Y-%m-%d %H:%M:%S}, {len(state.rows):,} bindings"
    )
    if serving:
        output.table(
            ("label", "family", "protocol", "bindings", "sockets", "lookups", "misses", "errors"),
            [_row(found) for found in serving],
            remarkable=lambda row: row[4] == "-" and row[0] != DROP,
        )
    _mourn(remnants)


def _mourn(remnants: list[str]) -> None:
    for path in remnants:
        click.echo(f"{path} is of no use: its namespace has ended, or its load was killed; `load` removes it", err=True)


def _row(found: Serving) -> tuple[object, ...]:
    name, bindings, sockets, counters = found
    errors = ", ".join(f"{counters[reason]:,} {reason}" for reason in ERRORS if counters[reason])
    return (
        name.label or DROP, FAMILY_NAMES[name.family], PROTOCOL_NAMES[name.protocol], bindings,
        " ".join(f"sk:{cookie:x}" for cookie in sockets) or "-", counters["lookups"], counters["misses"], errors or "0",
    )  # fmt: skip


def _document(found: Serving) -> dict[str, object]:
    name, bindings, sockets, counters = found
    return {
        "label": name.label or DROP, "family": FAMILY_NAMES[name.family], "protocol": PROTOCOL_NAMES[name.protocol],
        "bindings": bindings, "sockets": sockets, "lookups": counters["lookups"], "misses": counters["misses"],
        "errors": {reason: counters[reason] for reason in ERRORS},
    }  # fmt: skip


@click.command()
@click.option("--label", type=LABEL_OR_DROP, help="Only those of this label.")
@click.option(
    "--protocol", type=click.Choice(["tcp", "udp"]), help="Only those that packets of this protocol may meet."
)
@click.option("--prefix", type=PREFIX, help="Only those whose prefix overlaps this one.")
@click.option("--port", type=PORTS, help="Only those for (some of) these ports.")
@output.json_option
@place
def bindings(
    label: str | None, protocol: str | None, prefix: IPv4Network | IPv6Network | None, port: tuple[int, int] | None,
    as_json: bool, netns: str | None, bpffs: Path,
) -> None:  # fmt: skip
    """The bindings in force, in order of precedence; --json is what load-bindings reads."""

    def wanted(bound: Binding) -> bool:
        return (
            (label is None or label == (bound.label or DROP))
            and (protocol is None or bound.protocol in (protocol, "any"))
            and (port is None or (bound.ports[0] <= port[1] and port[0] <= bound.ports[1]))
            and (prefix is None or (prefix.version == bound.prefix.version and prefix.overlaps(bound.prefix)))
        )

    with Dispatcher(netns, bpffs=bpffs, read_only=True) as dispatcher:
        found = [bound for bound in dispatcher.bindings if wanted(bound)]
    found.sort(key=lambda bound: (bound.prefix.version, *bound.precedence))
    with entered(netns):
        if as_json:
            output.as_json(ruletext.dumped(found))
            return
        output.table(("label", "protocol", "prefix", "port", "source", "interface", "on a miss"), [
            (bound.label or DROP, bound.protocol, bound.prefix, ruletext.ports_text(bound.ports), bound.source or "any",
             ruletext.interface_name(bound.interface) if bound.interface else "any", bound.on_miss)
            for bound in found
        ])  # fmt: skip


@click.command("metrics")
@click.option(
    "--listen", type=ENDPOINT, metavar="ADDRESS:PORT", help="Serve them over HTTP instead, until interrupted."
)
@place
def show_metrics(listen: tuple[IPv4Address | IPv6Address, int] | None, netns: str | None, bpffs: Path) -> None:
    """Counters in Prometheus' text format; served over HTTP, without any capability left, where --listen says."""
    pins.check_mounted(bpffs)
    if listen is None:
        with contextlib.suppress(StateError), Dispatcher(netns, bpffs=bpffs, read_only=True):
            pass  # who may not read it hears so; that none is loaded, the metrics say
        click.echo(metrics.text(metrics.DispatcherCollector(netns, bpffs)), nl=False)
        return
    serve_metrics(metrics.DispatcherCollector(None, bpffs), *listen, netns)


@click.command()
@click.argument("protocol", type=click.Choice(["tcp", "udp"], case_sensitive=False), metavar="PROTOCOL")
@click.argument("source", type=ENDPOINT)
@click.argument("destination", type=ENDPOINT)
@click.option("--interface", metavar="NAME", help="The one the packet comes in by (CAP_BPF).")
@output.json_option
@place
def explain(
    protocol: str, source: tuple[IPv4Address | IPv6Address, int], destination: tuple[IPv4Address | IPv6Address, int],
    interface: str | None, as_json: bool, netns: str | None, bpffs: Path,
) -> None:  # fmt: skip
    """Which binding and socket a packet would get, and why. The program is asked; no packet is sent, nothing counted.

    \b
    fastrecv lookup explain tcp 198.51.100.7 192.0.2.9:80
    fastrecv lookup explain udp [2001:db8::7]:4242 [2001:db8::1]:53
    """  # noqa: D301 - click wants the character
    if not destination[1]:
        raise click.UsageError("the destination has no port: give ADDRESS:PORT, or [ADDRESS]:PORT for IPv6")
    if source[0].version != destination[0].version:
        raise click.UsageError("source and destination are of different IP versions")
    with entered(netns):
        index = ruletext.interface_index(interface) if interface is not None else 0
    packet = explaining.Packet(PROTOCOLS[protocol], *source, *destination, index)
    with Dispatcher(netns, bpffs=bpffs, read_only=True) as dispatcher:
        found = explaining.explain(dispatcher, packet)
    with entered(netns):
        by = ruletext.text(found.binding) if found.binding is not None else None
        others = [(ruletext.text(bound), why) for bound, why in found.others]
    if as_json:
        output.as_json({
            "verdict": found.verdict, "binding": by, "socket": found.socket, "reason": found.reason,
            "others": [{"binding": bound, "reason": why} for bound, why in others],
        })  # fmt: skip
        return
    click.echo(f"{found.verdict}: {found.reason}")
    rows = [] if by is None else [("by", by, "")]
    output.table(("", "binding", ""), [*rows, *(("not by", bound, why) for bound, why in others)])


COMMANDS: tuple[click.Command, ...] = (status, bindings, show_metrics, explain)
