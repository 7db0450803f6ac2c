"""Commands that serve: in the namespace that was named, with the privileges that it takes, until they are stopped."""

from __future__ import annotations

import contextlib
import signal
from ipaddress import IPv4Address, IPv6Address
from socketserver import BaseServer
from types import FrameType
from typing import NoReturn

import click
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.registry import Collector

from fastrecv import privileges
from fastrecv.netns import Namespace
from fastrecv.web import HttpServer

__all__ = ["serve_metrics", "serve_until_stopped"]


def serve_metrics(
    collector: Collector, address: IPv4Address | IPv6Address, port: int, netns: str | None = None
) -> None:
    """Serve what a collector collects over HTTP, without any capability left, until SIGINT or SIGTERM."""
    privileges.refuse_threads()
    registry = CollectorRegistry()
    registry.register(collector)
    with HttpServer(str(address), port) as server:
        server.set_app(make_wsgi_app(registry))
        serve_until_stopped(server, f"serving {server.where}/metrics", netns)


def serve_until_stopped(server: BaseServer, said: str, netns: str | None, *capabilities: int) -> None:
    """Serve until SIGINT or SIGTERM; the server's socket was opened in the caller's namespace, and stays there.

    capabilities : those that are kept. said : printed once nothing can go wrong any more.
    """
    signal.signal(signal.SIGTERM, _stop)
    if netns is not None:  # for good: coming back takes no privilege then
        with contextlib.closing(Namespace.open(netns)) as namespace:
            namespace.settle()
    privileges.keep_only(*capabilities)
    try:
        click.echo(said)
        server.serve_forever()
    except KeyboardInterrupt:
        click.echo("stopped")


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
