"""The sockets of a service, of datagrams or listeners: opened here, or those that systemd has passed."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

from fastrecv import groups
from fastrecv.companions import binding
from fastrecv.errors import SocketRefusedError, StateError
from fastrecv.listeners import from_systemd
from fastrecv.sockets import grow_receive_buffer, open_datagram
from fastrecv.steerable import described
from fastrecv.workers.settings import SettingError, Settings, is_tcp, parsed

__all__ = ["another", "inherited", "listen", "members"]

_BACKLOG = 65535  # connections that may wait; the kernel cuts it to net.core.somaxconn (listen(2))


def inherited(environment: Mapping[str, str] = os.environ) -> list[socket.socket]:
    """The sockets that systemd has passed, of one address; none where it has not. SocketRefusedError."""
    found = []
    try:
        for name, fd in from_systemd(environment):
            try:
                found.append(socket.socket(fileno=fd))
            except OSError as error:
                raise SocketRefusedError(f"descriptor {fd} ({name}) of systemd: {error.strerror}") from None
            os.set_inheritable(fd, False)
            _check(found[-1], found[0])
    except BaseException:
        _close(found)
        raise
    return found


def _check(sock: socket.socket, first: socket.socket) -> None:
    """SocketRefusedError where the two cannot be of one service."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or not sock.getsockname()[1]:
        raise SocketRefusedError(f"systemd has passed {described(sock)}: give sockets bound to an address and a port")
    if (sock.type, sock.getsockname()) != (first.type, first.getsockname()):
        raise SocketRefusedError(
            f"systemd has passed {described(first)} and {described(sock)}: one service has one address"
        )


def members(settings: Settings, passed: list[socket.socket]) -> list[socket.socket]:
    """As many sockets as the service has workers: those passed, and as many more as it takes. SettingError, StateError.

    Privileged ports take CAP_NET_BIND_SERVICE. Those passed are the caller's to close where this fails.
    """
    if bool(passed) == (settings.bind is not None):
        how = "systemd has passed sockets: leave it out" if passed else "give an address: systemd passes no sockets"
        raise SettingError("bind", how)
    wanted = settings.workers or max(1, len(passed))
    if wanted < len(passed):
        raise StateError(f"systemd has passed {len(passed)} sockets, and each needs a worker: give as many, or none")
    made = list(passed)
    for sock in passed:
        _grow(sock, settings)
    try:
        while len(made) < wanted:
            made.append(another(settings, made))
        if not passed and groups.has_others(made):
            raise StateError(f"others have {described(made[0])} already: stop them, or bind to another port")
    except BaseException:
        _close(made[len(passed) :])
        raise
    return made


def another(settings: Settings, present: list[socket.socket]) -> socket.socket:
    """One more socket of the group. StateError where the first does not share its port."""
    address = parsed(settings.bind) if settings.bind is not None else present[0].getsockname()
    if present and not present[0].getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
        raise StateError(
            f"{described(present[0])} has no other socket beside it, so one worker only: set ReusePort=yes in its unit"
        )
    tcp = is_tcp(settings.bind) if settings.bind is not None else present[0].type == socket.SOCK_STREAM
    dual_stack = settings.bind is not None
    if tcp:
        return _listener(address, settings, dual_stack)
    sock = open_datagram(address, reuse_port=True, dual_stack=dual_stack)
    _grow(sock, settings)
    return sock


def _listener(address: tuple[Any, ...], settings: Settings, dual_stack: bool) -> socket.socket:
    """One more listener of the group, listening."""
    host = ip_address(address[0])
    sock = socket.socket(socket.AF_INET6 if host.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if host.version == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual_stack)
        binding.bind(sock, host, address[1])
        _grow(sock, settings)  # before it listens: its connections inherit it
        listen(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def listen(sock: socket.socket) -> None:
    sock.listen(_BACKLOG)


def _grow(sock: socket.socket, settings: Settings) -> None:
    if settings.receive_buffer is not None:
        grow_receive_buffer(sock, settings.receive_buffer)


def _close(found: list[socket.socket]) -> None:
    for sock in found:
        sock.close()
