"""Commands that serve: in the namespace that was named, with the privileges that it takes, until they are stopped."""

from __future__ import annotations

import contextlib
import signal
from socketserver import BaseServer
from types import FrameType
from typing import NoReturn

import click

from fastrecv import privileges
from fastrecv.netns import Namespace

__all__ = ["serve_until_stopped"]


def serve_until_stopped(server: BaseServer, said: str, netns: str | None, *capabilities: int) -> None:
    """Serve until SIGINT or SIGTERM; the server's socket was opened in the caller's namespace, and stays there.

    capabilities : those that are kept. said : printed once nothing can go wrong any more.
    """
    signal.signal(signal.SIGTERM, _stop)
    if netns is not None:  # for good: coming back takes no privilege then
        with contextlib.closing(Namespace.open(netns)) as namespace:
            namespace.settle()
    privileges.keep_only(*capabilities)
    click.echo(said)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        click.echo("stopped")


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
