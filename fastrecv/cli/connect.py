"""`fastrecv connect`: clients that say who has answered them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network
from itertools import islice

import click

from fastrecv.cli import output
from fastrecv.cli.arguments import ENDPOINT, NETNS_OPTION, PREFIX, Address, entered, seconds, with_port
from fastrecv.companions.answers import Endpoint, Server
from fastrecv.companions.clients import LONGEST_PAYLOAD, MOST, Outcome, Plan, Way, ask

__all__ = ["connect"]

_HEX = "hex:"
_SHOWN = 24  # characters of a payload


class _Payload(click.ParamType[bytes]):
    name = "text"

    def convert(self, value: str | bytes, param: click.Parameter | None, context: click.Context | None) -> bytes:
        if isinstance(value, bytes):
            return value
        try:
            hexadecimal = value.startswith(_HEX)
            payload = bytes.fromhex(value.removeprefix(_HEX)) if hexadecimal else os.fsencode(value)
        except ValueError:
            self.fail(f"{value!r} is no row of bytes in hexadecimal digits, like hex:c0ffee", param, context)
        if len(payload) > LONGEST_PAYLOAD:
            self.fail(f"{len(payload):,} bytes: give {LONGEST_PAYLOAD:,} at most", param, context)
        return payload


@click.command()
@click.argument("way", type=click.Choice(["tcp", "udp", "fast-open"], case_sensitive=False),
                metavar="tcp|udp|fast-open")  # fmt: skip
@click.argument("address", type=ENDPOINT, metavar="ADDRESS:PORT", callback=with_port)
@click.option("--clients", type=click.IntRange(1, MOST), default=1, show_default=True,
              help="How many, all at once, each with a socket of its own.")  # fmt: skip
@click.option("--source", "prefixes", type=PREFIX, multiple=True, metavar="ADDRESS|PREFIX",
              help="Where they come from: an address, or the hosts of a prefix in turn. May be repeated.")  # fmt: skip
@click.option("--source-port", type=click.IntRange(1, 65535), metavar="PORT",
              help="Of the first client; the next have the ports above.  [default: any that is free]")  # fmt: skip
@click.option("--payload", "payloads", type=_Payload(), multiple=True, default=(b"who?",),
              help="What they send: text, or bytes as hex:c0ffee. Repeated, they send them in turn.  [default: who?]",
              )  # fmt: skip
@click.option("--timeout", type=seconds(0.001, 3600), default=5.0, show_default=True,
              help="Seconds that each may take.")  # fmt: skip
@output.json_lines_option
@NETNS_OPTION
@click.pass_context
def connect(
    context: click.Context, way: Way, address: tuple[Address, int], clients: int,
    prefixes: Sequence[IPv4Network | IPv6Network], source_port: int | None, payloads: Sequence[bytes], timeout: float,
    as_json: bool, netns: str | None,
) -> None:  # fmt: skip
    """Send a payload from each of many clients at once, and print who has answered it, as `fastrecv listen` does.

    Exit code 1 where any got no answer. With fast-open the payload goes with the SYN as soon as the host has the
    server's cookie, which the first connection from a source asks for.

    \b
    fastrecv connect udp 127.0.0.1:7007 --clients 10 --source 127.0.1.0/28
    fastrecv connect tcp [2001:db8::1]:443 --payload hex:160301
    """  # noqa: D301 - click wants the character
    if way == "fast-open" and not all(payloads):
        raise click.UsageError("an empty payload cannot go with a SYN: give another --payload, or tcp for fast-open")
    if any(prefix.version != address[0].version for prefix in prefixes):
        raise click.UsageError(f"{address[0]} is IPv{address[0].version}: give sources of the same IP version")
    if source_port is not None and source_port + clients > 65536:
        raise click.UsageError(f"{clients} clients from port {source_port} on go beyond 65535: give a lower port")
    sources = list(islice((host for prefix in prefixes for host in prefix.hosts()), clients))
    plan = Plan(way, address, clients, payloads, sources, source_port or 0, timeout)
    view = _Json() if as_json else _Text(plan)
    outcomes: list[Outcome] = []
    with entered(netns), contextlib.closing(ask(plan)) as asking:
        for outcome in asking:
            if outcome is None:
                view.waiting(clients - len(outcomes))
            else:
                outcomes.append(outcome)
                view.report(outcome)
    view.summary(outcomes)
    if any(outcome.failure for outcome in outcomes):
        context.exit(1)


class _Text:
    """For people: a line a client, as they end."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        host, port = plan.destination
        self._to = len(str(Endpoint(str(host), port)))
        longest = max((len(str(Endpoint(str(source), 65535))) for source in plan.sources), default=0)
        self._from = longest or (21 if host.version == 4 else 28)
        self._begun = self._waits = False  # whether the headline, and the line that says who is waited for, stand

    def _echo(self, text: str) -> None:
        if self._waits:
            click.echo("\r\x1b[K", nl=False, err=True)
            self._waits = False
        click.echo(text)

    def waiting(self, left: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r\x1b[Kwaiting for {left:,} of {self._plan.clients:,}", nl=False, err=True)
            self._waits = True

    def report(self, outcome: Outcome) -> None:
        if not self._begun:
            self._begun = True
            self._echo(click.style(self._headline(), bold=True))
        self._echo(self._line(outcome))

    def _headline(self) -> str:
        words = f"client  {'from':{self._from}}  {'to':{self._to}}  slot  {'pid':>7}  bytes"
        if self._plan.way != "udp":
            words += "  connect ms"
        words += "  answer ms"
        if self._plan.way == "fast-open":
            words += "  in the SYN"
        return f"{words}  payload" if len(self._plan.payloads) > 1 else words

    def _line(self, outcome: Outcome) -> str:
        source, server = outcome.source, outcome.server
        slot, pid = ("-", "-") if server is None else (str(server.slot), str(server.pid))
        words = (
            f"{outcome.client:6}  {source if source.port else source.host!s:{self._from}}  "
            f"{outcome.destination!s:{self._to}}  {slot:>4}  {pid:>7}  {outcome.sent:5,}"
        )
        if self._plan.way != "udp":
            words += f"  {_time(outcome.connect_ms):>10}"
        words += f"  {_time(outcome.answer_ms):>9}"
        if self._plan.way == "fast-open":
            words += f"  {'yes' if outcome.in_syn else 'no':10}"
        if len(self._plan.payloads) > 1:
            words += f"  {_shown(self._plan.payload(outcome.client))}"
        if outcome.failure is not None:
            return f"{words}  {click.style(outcome.failure, fg='yellow')}"
        return words.rstrip() if server else f"{words}  {outcome.received} bytes of another kind of server"

    def summary(self, outcomes: Sequence[Outcome]) -> None:
        self._echo("")
        sources: dict[Server, list[str]] = {}
        for outcome in outcomes:
            if outcome.server is not None:
                sources.setdefault(outcome.server, []).append(outcome.source.host)
        if sources:
            output.table(("slot", "pid", "clients", "sources"), [
                (str(server.slot), str(server.pid), len(hosts), len(set(hosts)))
                for server, hosts in sorted(sources.items())
            ])  # fmt: skip
        failures = Counter(outcome.failure for outcome in outcomes if outcome.failure is not None)
        answered = [outcome for outcome in outcomes if outcome.failure is None]
        words = [f"{number:,} {why}" for why, number in sorted(failures.items())]
        self._echo(", ".join([f"{len(answered):,} of {len(outcomes):,} answered", *words]))
        if self._plan.way == "fast-open" and not all(outcome.in_syn for outcome in answered):
            self._echo("not in the SYN: the host had no cookie for that source and server yet (run it again), or the "
                       "server takes none (fastrecv listen --fast-open does)")  # fmt: skip


def _shown(payload: bytes) -> str:
    """The beginning, as --payload takes it."""
    text = payload.decode("ascii", "replace")
    return (text if text.isprintable() and text.isascii() else f"{_HEX}{payload.hex()}")[:_SHOWN]


def _time(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.3f}"


class _Json:
    """For programs: every object says what it is."""

    def waiting(self, left: int) -> None:
        """Programs wait without being told."""

    def report(self, outcome: Outcome) -> None:
        output.json_lines([{
            "event": "client", **outcome._asdict(), "source": outcome.source._asdict(),
            "destination": outcome.destination._asdict(),
            "server": None if outcome.server is None else outcome.server._asdict(),
        }])  # fmt: skip

    def summary(self, outcomes: Iterable[Outcome]) -> None:
        """Whoever reads the objects can count them."""
