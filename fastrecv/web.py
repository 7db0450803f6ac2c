"""HTTP for scrapes: a server on a numeric address, with a bound on what idle peers can take."""

from __future__ import annotations

import socket
from socketserver import TCPServer
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from fastrecv.errors import StateError
from fastrecv.threads import BoundedThreads

__all__ = ["HttpServer"]


class _Quiet(WSGIRequestHandler):
    timeout = 5  # seconds for a request

    def log_message(self, format: str, *_arguments: object) -> None:  # noqa: A002 - its name in the base class
        """Scrapes are no news."""


class HttpServer(BoundedThreads, WSGIServer):
    """An HTTP server on a numeric address, with a bound on what idle peers can take. StateError where it cannot be."""

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Quiet)
        except OSError as error:
            raise StateError(error.errno, f"cannot listen on {host} port {port}: {error.strerror}") from None

    @property
    def where(self) -> str:
        """http://ADDRESS:PORT."""
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"http://{host}:{self.server_port}"

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's would ask the DNS for a name
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), port
        self.setup_environ()
