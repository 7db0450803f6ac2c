"""`fastrecv connect`: clients that say who has answered them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network
from itertools import chain, islice

import click

from fastrecv.cli import output
from fastrecv.cli.arguments import ENDPOINT, PREFIX, Address, entered, in_namespace, with_port
from fastrecv.companions.answers import Endpoint
from fastrecv.companions.clients import LONGEST_PAYLOAD, MOST, Outcome, Way, ask

__all__ = ["connect"]

_HEX = "hex:"


def _payload(_context: click.Context, _parameter: click.Parameter, word: str) -> bytes:
    if word.startswith(_HEX):
        try:
            payload = bytes.fromhex(word.removeprefix(_HEX))
        except ValueError:
            raise click.BadParameter(f"{word!r} is no row of bytes in hexadecimal digits, like hex:c0ffee") from None
    else:
        payload = os.fsencode(word)
    if len(payload) > LONGEST_PAYLOAD:
        raise click.BadParameter(f"{len(payload):,} bytes: give {LONGEST_PAYLOAD:,} at most")
    return payload


@click.command()
@click.argument("way", type=click.Choice(["tcp", "udp", "fast-open"], case_sensitive=False),
                metavar="tcp|udp|fast-open")  # fmt: skip
@click.argument("address", type=ENDPOINT, metavar="ADDRESS:PORT", callback=with_port)
@click.option("--clients", type=click.IntRange(1, MOST), default=1, show_default=True,
              help="How many, all at once, each with a socket of its own.")  # fmt: skip
@click.option("--source", "prefixes", type=PREFIX, multiple=True, metavar="ADDRESS|PREFIX",
              help="Where they come from, in turn: an address, or the hosts of a prefix. May be repeated.")  # fmt: skip
@click.option("--payload", metavar="TEXT", default="who?", show_default=True, callback=_payload,
              help="What each sends: text, or bytes as hex:c0ffee.")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(0, 3600, min_open=True), default=5.0, show_default=True,
              help="Seconds that each may take.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON, an object a line.")
@in_namespace
@click.pass_context
def connect(
    context: click.Context, way: Way, address: tuple[Address, int], clients: int,
    prefixes: Sequence[IPv4Network | IPv6Network], payload: bytes, timeout: float, as_json: bool, netns: str | None,
) -> None:  # fmt: skip
    """Send one payload from each of many clients at once, and print who has answered it, as `fastrecv listen` does.

    Exit code 1 where any got no answer. With fast-open the payload goes with the SYN as soon as the host has the
    server's cookie, which the first connection from a source asks for.

    \b
    fastrecv connect udp 127.0.0.1:7007 --clients 10 --source 127.0.1.0/28
    fastrecv connect tcp [2001:db8::1]:443 --payload hex:160301
    """  # noqa: D301 - click wants the character
    if way == "fast-open" and not payload:
        raise click.UsageError("an empty payload cannot go with a SYN: give another --payload, or tcp for fast-open")
    if any(prefix.version != address[0].version for prefix in prefixes):
        raise click.UsageError(f"{address[0]} is IPv{address[0].version}: give sources of the same IP version")
    sources = list(islice(chain.from_iterable(_hosts(prefix) for prefix in prefixes), clients))
    view = _Json() if as_json else _Text(way, max((len(str(source)) for source in sources), default=0), address)
    outcomes: list[Outcome] = []
    asking = ask(way, address, clients, payload, sources=sources, timeout=timeout)
    with entered(netns), contextlib.closing(asking):
        for outcome in asking:
            if outcome is None:
                view.waiting(clients - len(outcomes), clients)
            else:
                outcomes.append(outcome)
                view.report(outcome)
    view.summary(outcomes)
    if any(outcome.failure for outcome in outcomes):
        context.exit(1)


def _hosts(prefix: IPv4Network | IPv6Network) -> Iterator[Address]:
    yield from prefix.hosts()


class _Text:
    """For people. A line a client, as they end."""

    def __init__(self, way: Way, source: int, destination: tuple[Address, int]) -> None:
        self._way, self._begun = way, False
        to = len(str(Endpoint(str(destination[0]), destination[1])))
        self._from, self._to = max(source + 8 if source else 0, 21 if destination[0].version == 4 else 28), to
        self._hides = False  # whether the line that says who is waited for stands

    def _echo(self, text: str, bold: bool = False) -> None:
        if self._hides:
            click.echo("\r\x1b[K", nl=False, err=True)
            self._hides = False
        click.echo(click.style(text, bold=bold))

    def waiting(self, left: int, number: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r\x1b[Kwaiting for {left:,} of {number:,}", nl=False, err=True)
            self._hides = True

    def report(self, outcome: Outcome) -> None:
        if not self._begun:
            self._begun = True
            connected = "" if self._way == "udp" else "connect ms  "
            in_syn = "in the SYN  " if self._way == "fast-open" else ""
            self._echo(
                f"client  {'from':{self._from}}  {'to':{self._to}}  slot  {'pid':>7}  bytes  {connected}answer ms  "
                f"{in_syn}".rstrip(), bold=True
            )  # fmt: skip
        self._echo(self._line(outcome))

    def _line(self, outcome: Outcome) -> str:
        server, source = outcome.server, outcome.source
        slot, pid = ("-", "-") if server is None else (str(server.slot), str(server.pid))
        line = (
            f"{outcome.client:6}  {source if source.port else source.host!s:{self._from}}  "
            f"{outcome.destination!s:{self._to}}  {slot:>4}  {pid:>7}  {outcome.sent:5,}"
        )
        if self._way != "udp":
            line += f"  {_time(outcome.connect_ms):>10}"
        line += f"  {_time(outcome.answer_ms):>9}"
        if outcome.failure is not None:
            return f"{line}  {click.style(outcome.failure, fg='yellow')}"
        if self._way == "fast-open":
            line += f"  {'yes' if outcome.in_syn else 'no':10}"
        return f"{line.rstrip()}{'' if server else f'  {outcome.received} bytes of another kind of server'}"

    def summary(self, outcomes: Sequence[Outcome]) -> None:
        self._echo("")
        served = Counter(outcome.server for outcome in outcomes if outcome.server is not None)
        senders = {server: {outcome.source.host for outcome in outcomes if outcome.server == server}
                   for server in served}  # fmt: skip
        if served:
            output.table(("slot", "pid", "clients", "sources"), [
                (str(server.slot), str(server.pid), number, len(senders[server]))
                for server, number in sorted(served.items())
            ])  # fmt: skip
        answered = sum(outcome.failure is None for outcome in outcomes)
        failures = Counter(outcome.failure for outcome in outcomes if outcome.failure is not None)
        words = [
            f"{answered:,} of {len(outcomes):,} answered",
            *(f"{n:,} {why}" for why, n in sorted(failures.items())),
        ]
        self._echo(", ".join(words))
        if self._way == "fast-open" and not all(outcome.in_syn for outcome in outcomes if outcome.failure is None):
            click.echo("not in the SYN: the host had no cookie of the server for that source yet, or the server has "
                       "Fast Open off; ask again to tell", err=True)  # fmt: skip


def _time(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.3f}"


class _Json:
    """For programs: every object says what it is."""

    def waiting(self, left: int, number: int) -> None:
        """Programs wait without being told."""

    def report(self, outcome: Outcome) -> None:
        _say({
            "event": "client", **outcome._asdict(), "source": outcome.source._asdict(),
            "destination": outcome.destination._asdict(),
            "server": None if outcome.server is None else outcome.server._asdict(),
        })  # fmt: skip

    def summary(self, outcomes: Iterable[Outcome]) -> None:
        served = Counter(outcome.server for outcome in outcomes)
        for server, number in served.items():
            if server is not None:
                _say({"event": "summary", **server._asdict(), "clients": number})


def _say(document: dict[str, object]) -> None:
    click.echo(json.dumps(document))
