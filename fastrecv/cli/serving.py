"""Commands that serve: in the namespace that was named, with the privileges that it takes, until they are stopped."""

from __future__ import annotations

import contextlib
import signal
import socket
from ipaddress import IPv4Address, IPv6Address
from socketserver import BaseServer, TCPServer
from types import FrameType
from typing import NoReturn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import click
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.registry import Collector

from fastrecv import privileges
from fastrecv.errors import StateError
from fastrecv.netns import Namespace
from fastrecv.threads import BoundedThreads

__all__ = ["HttpServer", "serve_metrics", "serve_until_stopped"]


class _Quiet(WSGIRequestHandler):
    timeout = 5  # seconds for a request

    def log_message(self, format: str, *_arguments: object) -> None:  # noqa: A002 - its name in the base class
        """Scrapes are no news."""


class HttpServer(BoundedThreads, WSGIServer):
    """An HTTP server on a numeric address, with a bound on what idle peers can take."""

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Quiet)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's would ask the DNS for a name
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), port
        self.setup_environ()


def serve_metrics(
    collector: Collector, address: IPv4Address | IPv6Address, port: int, netns: str | None = None
) -> None:
    """Serve what a collector collects over HTTP, without any capability left, until SIGINT or SIGTERM."""
    privileges.refuse_threads()
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        opened = HttpServer(str(address), port)
    except OSError as error:
        raise StateError(f"cannot listen on {address} port {port}: {error.strerror}") from None
    with opened as server:
        server.set_app(make_wsgi_app(registry))
        host, bound = server.server_name, server.server_port
        where = f"http://{f'[{host}]' if ':' in host else host}:{bound}/metrics"
        serve_until_stopped(server, f"serving {where}", netns)


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
