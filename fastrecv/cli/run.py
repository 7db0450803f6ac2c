"""`fastrecv run`: a service of worker processes that lose nothing."""

from __future__ import annotations

from typing import Any

import click

from fastrecv.workers import Settings, Supervisor
from fastrecv.workers.settings import MAX_WORKERS

__all__ = ["run"]


@click.command()
@click.argument("handler", metavar="PACKAGE.MODULE:NAME")
@click.option("-b", "--bind", metavar="[tcp:]ADDRESS:PORT",
              help="[ADDRESS]:PORT for IPv6; tcp: for connections.  [default: what systemd passes]")  # fmt: skip
@click.option("-w", "--workers", type=click.IntRange(1, MAX_WORKERS),
              help="Each has a socket of its own.  [default: 1, or as many as systemd passes sockets]")  # fmt: skip
@click.option("--policy", default="source", show_default=True,
              help="Whose datagrams stay with one worker: source[/BITS4[/BITS6]], source+port, flow, destination, "
              "payload[OFFSET:LENGTH], quic[LENGTH], cpu, random.")  # fmt: skip
@click.option("--user", metavar="NAME", help="Whom workers become.  [default: who calls]")
@click.option("--group", metavar="NAME", help="[default: the user's]")
@click.option("--timeout", type=float, default=30.0, show_default=True,
              help="Seconds without a sign of life until a worker is replaced; 0: for ever.")  # fmt: skip
@click.option("--graceful-timeout", type=float, default=30.0, show_default=True,
              help="Seconds that workers have to stop in.")  # fmt: skip
@click.option("--batch-size", type=int, default=64, show_default=True, help="Datagrams of a batch at most.")
@click.option("--receive-buffer", type=int, metavar="BYTES",
              help="Of each socket, for what waits meanwhile.  [default: net.core.rmem_default]")  # fmt: skip
@click.option("--on-error", type=click.Choice(["continue", "exit"]), default="continue", show_default=True,
              help="What a worker does when its handler raises an exception.")  # fmt: skip
@click.option("--given-up", type=click.Choice(["move", "wait"]), default="move", show_default=True,
              help="What becomes of the senders of a worker that dies at once, again and again.")  # fmt: skip
def run(**options: Any) -> int:
    """Serve datagrams, or connections, by worker processes whose sockets outlive them.

    The handler is a function handle(batch), plain or async; a class with handle(batch) and perhaps start() and stop();
    or serve(sockets), with a loop of its own, for connections. It is imported by the workers only, without
    capabilities.

    TERM or INT: stop, queues are read to their end. QUIT: at once. HUP: restart the workers with new code, one after
    the other. TTIN, TTOU: one worker more or less.

    Exit codes: 0 stopped; 1 it could not begin, all workers were given up, or queues were lost at the deadline; 2
    usage; 77 a privilege is missing.

    \b
    fastrecv run -b 0.0.0.0:2055 -w 4 --user nobody mypkg.collector:handle
    """  # noqa: D301 - click wants the character
    try:
        supervisor = Supervisor(Settings(**options))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    return supervisor.run()
