"""`fastrecv workers`: services of `fastrecv run`, asked through their control sockets."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from fastrecv.cli import output
from fastrecv.errors import StateError
from fastrecv.workers import control
from fastrecv.workers.requests import End, Request, Restart, Scale, Status, Stop, answer, ask, asked
from fastrecv.workers.settings import MAX_WORKERS
from fastrecv.workers.status import Service, Worker

__all__ = ["CONTROL_OPTION", "span", "the_service", "workers"]

_LOOK = 0.1  # seconds between two looks at what becomes of it

CONTROL_OPTION = click.option(
    "--control", "given", type=click.Path(readable=False, path_type=Path), metavar="PATH",
    help="The service's control socket.  [default: that of the only service]",
)  # fmt: skip


def the_service(given: Path | None) -> Path:
    """The control socket that was named, or that of the only service here. StateError where there is none, or more."""
    if given is not None:
        return given
    found: dict[Path, Service] = {}
    denied: PermissionError | None = None
    for folder in control.folders():
        for path in sorted(folder.glob(f"*{control.SUFFIX}")):
            try:
                found[path] = ask(path, Status())
            except PermissionError as error:
                denied = error
            except StateError:  # its service has ended
                continue
    if len(found) == 1:
        return next(iter(found))
    if found:
        listed = ", ".join(f"{path} ({service.address})" for path, service in found.items())
        raise StateError(f"{len(found)} services run, name one with --control: {listed}")
    if denied is not None:
        raise denied
    looked = ", ".join(map(str, control.folders()))
    raise StateError(f"no service runs that has its control socket in {looked}: name it with --control")


@click.group()
@CONTROL_OPTION
@click.pass_context
def workers(context: click.Context, given: Path | None) -> None:
    """The worker processes of a service of `fastrecv run`.

    Commands that change something wait until it is done. Its user's, or root's, to do.

    \b
    fastrecv workers status
    fastrecv workers --control /run/fastrecv/2055.sock restart
    """  # noqa: D301 - click wants the character
    context.obj = given


@workers.command()
@output.json_option
@click.pass_obj
def status(given: Path | None, as_json: bool) -> None:
    """Who reads, what was counted, and what waits in the queues."""
    service = ask(the_service(given), Status())
    if as_json:
        output.as_json(msgspec.to_builtins(service))
        return
    click.echo(
        f"{service.address}, {service.handler}: {service.state}, process {service.pid}, {span(service.uptime)}; "
        f"senders by {service.policy} ({service.chooser}), {counted(service.wanted)} wanted"
    )
    if service.interface is not None:
        click.echo(f"AF_XDP on {service.interface}; {service.in_rings:,} datagrams wait in rings, or were lost in them")
    output.table(
        ("worker", "pid", "state", "for", "datagrams", "batch", "handled", "failed", "killed", "ns/datagram", "queue",
         "drops", "restarts", "deaths"),
        [_row(worker) for worker in service.workers], remarkable=lambda row: row[2] in ("given up", "waiting"),
    )  # fmt: skip
    for worker in service.workers:
        if worker.given_up:
            click.secho(f"worker {worker.slot} is given up: {worker.cause}", fg="yellow", err=True)
    if service.failure is not None:
        click.secho(service.failure, fg="yellow", err=True)


def _row(worker: Worker) -> tuple[Any, ...]:
    fill = f"{worker.datagrams / worker.batches:.1f}" if worker.batches else "-"
    each = f"{1e9 * worker.handler_seconds / worker.handled:,.0f}" if worker.handled else "-"
    since = "-" if worker.reading_seconds is None else span(worker.reading_seconds)
    return (
        str(worker.slot), str(worker.pid or "-"), worker.state, since, worker.datagrams, fill, worker.handled,
        worker.failed, worker.killed, each, f"{100 * worker.queue_bytes / worker.queue_limit:.0f} %",
        worker.kernel_drops, worker.restarts, worker.deaths,
    )  # fmt: skip


def counted(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def span(seconds: float) -> str:
    """A time span in its two largest units: 3d 4h, 5m 2s, 7s."""
    left = int(seconds)
    words: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or words or unit == "s":
            words.append(f"{count}{unit}")
    return " ".join(words[:2])


@workers.command()
@click.pass_obj
def restart(given: Path | None) -> None:
    """New workers in the place of all, one after the other, with the code as it is now.

    Exit code 1 where a new one cannot begin: the others stay as they are then.
    """
    path = the_service(given)

    def left(service: Service) -> str | None:
        return f"{service.restarting} of {counted(len(service.workers))} to restart" if service.restarting else None

    _followed(path, Restart(), left)
    click.echo("all workers are new")


@workers.command()
@click.argument("count", metavar="N", type=click.IntRange(1, MAX_WORKERS))
@click.pass_obj
def scale(given: Path | None, count: int) -> None:
    """So many workers, by one more or one less at a time."""
    path = the_service(given)

    def left(service: Service) -> str | None:
        states = [worker.state for worker in service.workers]
        if service.wanted != count or (len(states) <= count and states[-1] == "given up"):
            return None
        settled = len(states) == count and not {"joining", "leaving"}.intersection(states)
        return None if settled else f"{counted(len(states))}, {count} wanted"

    service = _followed(path, Scale(workers=count), left)
    if service.wanted != count:
        raise StateError(f"somebody else wants {counted(service.wanted)}")
    last = service.workers[-1]
    if last.given_up:
        raise StateError(f"worker {last.slot} is given up: {last.cause}")
    click.echo(counted(count))


@workers.command()
@click.option("--now", is_flag=True, help="Without reading the queues to their end.")
@click.pass_obj
def stop(given: Path | None, now: bool) -> None:
    """Stop the flow, read the queues to their end, and end. Exit code 1 where one was not read in time."""
    path = the_service(given)

    with asked(path, End()) as waiting:
        service: Service | None = ask(path, Stop(now=now))
        said = ""
        while service is not None:
            busy = sum(worker.pid is not None for worker in service.workers)
            said = _progress(f"{busy} of {counted(len(service.workers))} to stop", said)
            try:
                service = ask(path, Status())
            except StateError:
                service = None
        failure = answer(waiting, path).failure
    if failure is not None:
        raise StateError(failure)
    click.echo("stopped")


def _followed(path: Path, request: Request, left: Callable[[Service], str | None]) -> Service:
    """Ask, and wait until nothing is left. StateError where it fails, or the service stops."""
    service, said = ask(path, request), ""
    while (text := left(service)) is not None:
        said = _progress(text, said)
        service = ask(path, Status())
        if service.state == "stopping":
            raise StateError("the service is stopping")
    if service.failure is not None:
        raise StateError(service.failure)
    return service


def _progress(text: str, said: str) -> str:
    """Wait a little, having said what is new."""
    if text != said:
        click.echo(text, err=True)
    time.sleep(_LOOK)
    return text
