"""`fastrecv listen`: a reuseport group whose members say which of them got what."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from datetime import datetime

import click

from fastrecv.cli import output
from fastrecv.cli.arguments import ENDPOINT, NETNS_OPTION, Address, entered, seconds, with_port
from fastrecv.companions.connections import Connections
from fastrecv.companions.datagrams import Datagrams
from fastrecv.companions.listening import SENDERS, Connection, Event, Group, Tally, serve, tallied

__all__ = ["listen"]

_MOST = 128  # sockets: as many as a balancer has slots
_TIME = 12  # characters of 13:37:00.123


@click.command()
@click.argument("protocol", type=click.Choice(["tcp", "udp"], case_sensitive=False), metavar="tcp|udp")
@click.argument("address", type=ENDPOINT, metavar="ADDRESS:PORT", callback=with_port)
@click.option("--listeners", type=click.IntRange(1, _MOST), default=1, show_default=True,
              help="How many sockets share the port; each is a slot.")  # fmt: skip
@click.option("--fast-open", is_flag=True, help="TCP: take data that comes with the SYN.")
@click.option("--seconds", type=seconds(0.001), help="Stop after so long.")
@click.option("--count", type=click.IntRange(1), help="Stop after so many connections or datagrams.")
@click.option("--quiet", is_flag=True, help="Print the sockets and the summary only.")
@output.json_lines_option
@NETNS_OPTION
def listen(
    protocol: str, address: tuple[Address, int], listeners: int, fast_open: bool, seconds: float | None,
    count: int | None, quiet: bool, as_json: bool, netns: str | None,
) -> None:  # fmt: skip
    """Open sockets that share a port and print which of them gets what, until interrupted.

    Every client is answered with one line, "slot 2 pid 4711": TCP at its first bytes (or their end), UDP each datagram.
    `fastrecv connect` reads it, and so does anybody with nc(1). A second listener on the same address, of the same
    user, joins the group. IPv6 sockets take IPv4, too, if they are bound to [::].

    \b
    fastrecv listen udp 127.0.0.1:7007 --listeners 3
    fastrecv listen tcp [::]:7007 --listeners 3 --fast-open
    """  # noqa: D301 - click wants the character
    if fast_open and protocol != "tcp":
        raise click.UsageError("--fast-open is for tcp")
    with entered(netns), contextlib.closing(_opened(protocol, address, listeners, fast_open)) as group:
        tallies = [Tally() for _ in group.slots]
        view: _Text | _Json = _Json() if as_json else _Text(protocol, address[0].version)
        view.opened(group)
        report = tallied((lambda _events: None) if quiet else view.report, tallies)
        if not quiet:
            view.begin()
        serve(group, report, seconds=seconds, count=count)
        view.summary(group, tallies)


def _opened(protocol: str, address: tuple[Address, int], number: int, fast_open: bool) -> Connections | Datagrams:
    if protocol == "tcp":
        return Connections(*address, number, fast_open=fast_open)
    return Datagrams(*address, number)


class _Text:
    """For people."""

    def __init__(self, protocol: str, version: int) -> None:
        self._protocol = protocol
        self._wide = 21 if version == 4 else 30  # 198.51.100.200:65535; the longest of IPv6 move the columns

    def opened(self, group: Group) -> None:
        number, where = len(group.slots), group.slots[0].address
        sockets = "1 socket" if number == 1 else f"{number} sockets"
        click.echo(f"process {os.getpid()}: {sockets} on {self._protocol} {where}; stop with Ctrl-C")
        output.table(("slot", "descriptor", "cookie", "address"), [
            (str(slot.number), str(slot.fd), f"sk:{slot.cookie:x}", slot.address) for slot in group.slots
        ])  # fmt: skip

    def begin(self) -> None:
        measured = "queued ms" if self._protocol == "udp" else "first byte ms    open ms  ended"
        click.echo(click.style(
            f"\n{'time':{_TIME}}  slot  {'from':{self._wide}}  {'to':{self._wide}}   bytes  {measured}", bold=True
        ))  # fmt: skip

    def report(self, events: Iterable[Event]) -> None:
        click.echo("\n".join(map(self._line, events)))

    def _line(self, event: Event) -> str:
        when = datetime.fromtimestamp(event.time).strftime("%H:%M:%S.%f")[:_TIME]
        line = (
            f"{when}  {event.slot:4}  {event.source!s:{self._wide}}  {event.destination!s:{self._wide}}  "
            f"{event.bytes:6,}"
        )
        if not isinstance(event, Connection):
            return f"{line}  {event.queued_ms:9.3f}"
        first = "-" if event.first_byte_ms is None else f"{event.first_byte_ms:.3f}"
        ended = f"{event.ended}, data in the SYN" if event.in_syn else event.ended
        return f"{line}  {first:>13}  {event.open_ms:9.3f}  {ended}"

    def summary(self, group: Group, tallies: Sequence[Tally]) -> None:
        click.echo()
        what = "datagrams" if self._protocol == "udp" else "connections"
        output.table(("slot", what, "bytes", "senders", "lost"), [
            (str(slot.number), tally.served, tally.bytes,
             f"{SENDERS:,} or more" if tally.senders == SENDERS else tally.senders, group.lost(slot.number))
            for slot, tally in zip(group.slots, tallies, strict=True)
        ], remarkable=lambda row: bool(row[-1]))  # fmt: skip
        if any(group.lost(slot.number) for slot in group.slots):
            click.echo("lost: the queue of the socket was full, or the packet was refused there", err=True)


class _Json:
    """For programs: every object says what it is."""

    def opened(self, group: Group) -> None:
        output.json_lines({
            "event": "listener", "slot": slot.number, "pid": os.getpid(), "fd": slot.fd, "cookie": slot.cookie,
            "address": slot.address.host, "port": slot.address.port,
        } for slot in group.slots)  # fmt: skip

    def begin(self) -> None:
        """There is no headline."""

    def report(self, events: Iterable[Event]) -> None:
        output.json_lines({
            "event": type(event).__name__.lower(), **event._asdict(),
            "source": event.source._asdict(), "destination": event.destination._asdict(),
        } for event in events)  # fmt: skip

    def summary(self, group: Group, tallies: Sequence[Tally]) -> None:
        output.json_lines({
            "event": "summary", "slot": slot.number, "served": tally.served, "bytes": tally.bytes,
            "senders": tally.senders, "lost": group.lost(slot.number),
        } for slot, tally in zip(group.slots, tallies, strict=True))  # fmt: skip
