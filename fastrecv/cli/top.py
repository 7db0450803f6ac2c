"""`fastrecv top`: a service of `fastrecv run`, live."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastrecv.cli.arguments import seconds
from fastrecv.cli.rates import History
from fastrecv.cli.workers import CONTROL_OPTION, the_service
from fastrecv.errors import StateError
from fastrecv.workers.requests import Status, ask
from fastrecv.workers.status import Service

if TYPE_CHECKING:
    from rich.live import Live

__all__ = ["top"]


@click.command()
@CONTROL_OPTION
@click.option("--interval", type=seconds(0.1, 60), default=1.0, show_default=True, metavar="S",
              help="Seconds between two looks.")  # fmt: skip
def top(given: Path | None, interval: float) -> None:
    """Watch a service: what its workers receive, what their handlers take, what waits and what is lost.

    q or Ctrl-C ends it. busy is the share of the time that was spent in the handler; re/died is how often another
    worker has begun to read, and how many died. A service that goes away is waited for.

    \b
    fastrecv top
    fastrecv top --control /run/fastrecv/2055.sock --interval 0.5
    """  # noqa: D301 - click wants the character
    if not sys.stdout.isatty():
        raise click.UsageError("it takes a terminal: `fastrecv workers status --json` is for programs")
    from rich.live import Live  # noqa: PLC0415 - no other command needs to wait for its import

    path = the_service(given)
    with contextlib.suppress(KeyboardInterrupt), _keys(), Live(screen=True, auto_refresh=False) as live:
        _follow(path, interval, live)


def _follow(path: Path, interval: float, live: Live) -> None:
    from fastrecv.cli.top_view import screen  # noqa: PLC0415 - as above

    history = History(interval)
    service: Service | None = None
    gone: float | None = None
    while True:
        began = time.monotonic()
        notice = None
        try:
            service = ask(path, Status())
        except StateError as error:
            gone = gone or began
            notice = f"waiting for the service, {began - gone:.0f} s: {error}"
        else:
            gone = None
            history.take(service)
        live.update(screen(service, history, notice, *live.console.size), refresh=True)
        if _quits(began + interval):
            return


def _quits(until: float) -> bool:
    """Whether q is pressed before then."""
    while (left := until - time.monotonic()) > 0:
        if not sys.stdin.isatty():
            time.sleep(left)
        elif select.select([sys.stdin], [], [], left)[0]:
            keys = os.read(sys.stdin.fileno(), 64)
            if not keys or b"q" in keys.lower():
                return True
    return False


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Keys come one by one, unseen, where there is a keyboard."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
