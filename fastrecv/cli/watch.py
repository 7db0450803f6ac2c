"""`fastrecv watch`: what happens to sockets, a line each as it happens, and the reuseport groups every so often."""

from __future__ import annotations

import contextlib
import json
import math
import select
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

import click

from fastrecv import balance_life
from fastrecv.cli import output
from fastrecv.cli.arguments import BPFFS_OPTION, NAME, NETNS_OPTION, entered
from fastrecv.cli.arguments import seconds as seconds_type
from fastrecv.groups import Groups, owners
from fastrecv.watching import Choices, CpuShares, Document, Watch, group_documents

__all__ = ["line", "watch"]

_LONGEST_WAIT = 3600.0  # seconds; poll(2) takes no more than 24 days
_SHOWN = 3  # processes of a socket
_WHY = {
    "NO_SOCKET": "nobody listens there, or a program refused it",
    "SOCKET_CLOSE": "its socket is being closed",
    "SOCKET_FILTER": "the socket's filter refused it",
    "SOCKET_RCVBUFF": "the socket's queue is full",
    "SOCKET_BACKLOG": "the socket's backlog is full",
    "PROTO_MEM": "no memory is left for the protocol",
    "TCP_LISTEN_OVERFLOW": "the listener's accept queue is full",
    "ENOMEM": "the socket's queue is full",
    "ENOBUFS": "no memory is left for the protocol",
}


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), default=None, help="Only what has this port.  [default: all]")
@click.option("--seconds", type=seconds_type(0.001), default=math.inf, metavar="S",
              help="End after so long.  [default: when interrupted]")  # fmt: skip
@click.option("--every", type=seconds_type(0.1), default=2.0, show_default=True, metavar="S",
              help="Seconds from one look at the groups to the next.")  # fmt: skip
@click.option("--balancer", "name", type=NAME, help="Its choices, too: whom it gave to which slot.")
@click.option("--sample", type=click.IntRange(1, 1_000_000), help="With --balancer: one in so many.  [default: 1]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, an object a line.")
@NETNS_OPTION
@BPFFS_OPTION
def watch(
    port: int | None, seconds: float, every: float, name: str | None, sample: int | None, as_json: bool,
    netns: str | None, bpffs: Path,
) -> None:  # fmt: skip
    """Watch sockets: TCP states, dropped packets, and the members of reuseport groups with their queues.

    Those of one network namespace, until interrupted. Of a TCP socket the line gives its own address first, and the
    process where a system call changed the state. CAP_BPF and CAP_PERFMON, CAP_SYS_PTRACE to name processes of
    others. Linux 5.17.

    \b
    fastrecv watch --port 80
    fastrecv watch --port 2055 --balancer flows
    fastrecv watch --json | jq 'select(.event == "drop")'
    """  # noqa: D301 - click wants the character
    if sample is not None and name is None:
        raise click.UsageError("--sample is for --balancer")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    show = _json if as_json else _text
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        sources: list[Watch | Choices] = []
        if name is not None:
            sources.append(stack.enter_context(balance_life.choices(name, sample or 1, bpffs=bpffs)))
        stack.enter_context(entered(netns))
        groups = stack.enter_context(Groups())
        sources.append(stack.enter_context(Watch(port or 0)))
        if not as_json:
            click.echo(f"watching {'all ports' if port is None else f'port {port}'}; ^C ends it")
        _follow(sources, groups, show, port, every, time.monotonic() + seconds)


def _follow(
    sources: Sequence[Watch | Choices],
    groups: Groups,
    show: Callable[[list[Document]], None],
    port: int | None,
    every: float,
    end: float,
) -> None:
    """Show events as they come and the groups every so often, until `end` (of time.monotonic)."""
    shares = CpuShares()
    poll = select.poll()
    for source in sources:
        poll.register(source, select.POLLIN)
    look = time.monotonic()
    while (now := time.monotonic()) < end:
        if now >= look:
            members = [one for one in groups.members() if port in (None, one.port)]
            holders = owners(one.inode for one in members)
            percents = shares.of({pid for found in holders.values() for pid, _ in found})
            show(group_documents(members, holders, percents))
            look = max(look + every, time.monotonic())
        poll.poll(1000 * min(max(min(look, end) - time.monotonic(), 0), _LONGEST_WAIT))
        show(sorted((event for source in sources for event in source.read()), key=lambda event: event["time"]))


def _json(documents: list[Document]) -> None:
    for document in documents:
        click.echo(json.dumps(document, ensure_ascii=False))


def _text(documents: list[Document]) -> None:
    groups = [document for document in documents if document["event"] == "group"]
    if groups:
        click.echo()
        _table(groups)
        click.echo()
    for document, following in zip_longest(documents, documents[1:]):
        if document["event"] != "group" and not _is_said_again(document, following):
            usual = document["event"] == "state" or document.get("outcome") == "selected"
            click.secho(line(document), fg=None if usual else "yellow")


def _is_said_again(found: Document, following: Document | None) -> bool:
    """Whether the next line says of what became of an overflow's datagram all that this one would."""
    return (
        found["event"] == "overflow"
        and following is not None
        and following["event"] == "drop"
        and following["cookie"] == found["cookie"]
    )


def line(found: Document) -> str:
    """One event for people: when, what, whose."""
    at = found["time"].partition("T")[2][:15]
    if found["event"] == "lost":
        return f"{at}  {found['count']:,} events were lost: they come faster than they are read (--port tells of fewer)"
    source = _endpoint(found["source"], found["source_port"])
    way = f"{source} -> {_endpoint(found['destination'], found['destination_port'])}"
    if found["event"] == "choice":
        return f"{at}  balancer  {way}  {_choice(found)}"
    whose = [f"sk:{found['cookie']:x}"] if found["cookie"] else []
    if found["event"] == "state":
        what = f"{found['old']} -> {found['new']}"
        whose = [f"{found['pid']} {found['command']}"] * bool(found["pid"]) + whose
    elif found["event"] == "overflow":
        what = f"refused: {found['error']} ({_WHY.get(found['error'], 'see errno(3)')})"
    else:
        what = f"dropped: {found['reason']} ({_WHY[found['reason']]})"
    alone = found["destination_port"] is None
    return "  ".join([at, found["protocol"], source if alone else way, what, *whose])


def _choice(found: Document) -> str:
    slot = "no slot" if found["slot"] is None else f"slot {found['slot']}"
    failure = "" if found["outcome"] == "selected" or found["slot"] is None else f": {found['outcome']}"
    why = " (no socket is in it)" if failure and found["outcome"] == "ENOENT" else ""
    instead = f", taken by slot {found['taken']}" if found["taken"] not in (None, found["slot"]) else ""
    whose = f"  sk:{found['cookie']:x}" if found["cookie"] is not None else ""
    return f"bucket {found['bucket']}, {slot}{failure}{why}{instead}{whose}"


def _endpoint(address: str, port: int | None) -> str:
    return f"{f'[{address}]' if ':' in address else address}:{port or '*'}"


def _table(groups: Iterable[Document]) -> None:
    rows = []
    for group in groups:
        program = "classic" if group["classic"] else group["program"] or "-"
        where = f"{group['protocol']} {_endpoint(group['address'], group['port'])}"
        rows += [
            (where, str(group["number"]), f"{group['size']}/{group['room']}", str(program), one["index"],
             f"sk:{one['cookie']:x}", _state(group["protocol"], one["state"]), one["queue"], one["limit"],
             one["drops"], _processes(one))
            for one in group["members"]
        ]  # fmt: skip
    output.table(
        ("group", "id", "members", "program", "index", "socket", "state", "queue", "limit", "drops", "processes"),
        rows,
        remarkable=lambda row: bool(row[7] > 0.9 * row[8] or row[10] == "-"),  # hardly any room, or nobody to read
    )


def _state(protocol: str, state: str) -> str:
    """As ss(8) has it: a UDP socket that is not connected is in the state that TCP calls CLOSE."""
    return "UNCONN" if protocol == "udp" and state == "CLOSE" else state


def _processes(member: Document) -> str:
    """Who holds a socket, and what each takes of a CPU."""
    words = [
        f"{one['pid']} {one['command']}" + ("" if one["cpu_percent"] is None else f" {one['cpu_percent']:.0f} %")
        for one in member["processes"]
    ]
    more = [f"and {len(words) - _SHOWN} more"] if len(words) > _SHOWN else []
    return ", ".join(words[:_SHOWN] + more) or "-"
