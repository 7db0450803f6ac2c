"""Sockets that exist already: where they come from, and whether packets can be steered to them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from errno import EACCES, EBADF, EINVAL, ENOENT, ENOTSOCK, EPERM, ESRCH
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from fastrecv.errors import SocketRefusedError
from fastrecv.netns import cookie_of as namespace_of
from fastrecv.rules import PROTOCOL_NAMES, Destination
from fastrecv.steerable import IPPROTO_MPTCP, check_steerable, cookie_of, described, has_peer, protocol_of

__all__ = [
    "UNNAMED",
    "by_destination",
    "check_tracing",
    "from_systemd",
    "of_descriptors",
    "of_process",
]

_PIDFD_GETFD = 438  # include/uapi/asm-generic/unistd.h: one number on all architectures
_FIRST_FD = 3  # sd_listen_fds(3)
UNNAMED = "unknown"  # what sd_listen_fds_with_names(3) calls them
_libc = ctypes.CDLL(None, use_errno=True)


def _families(sock: socket.socket) -> tuple[int, ...]:
    """The families whose packets the socket can take: a dual-stack one takes both."""
    if sock.family == socket.AF_INET:
        return (socket.AF_INET,)
    only = sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    # Bound to an IPv6 address it takes IPv4 by sk_lookup all the same, unless it is IPv6-only.
    return (socket.AF_INET6,) if only else (socket.AF_INET6, socket.AF_INET)


def by_destination(
    label: str, sockets: Iterable[socket.socket], namespace: int
) -> dict[Destination, list[socket.socket]]:
    """Sockets by the destinations of `label` they serve. SocketRefusedError where one cannot be steered to.

    One socket a destination, or the members of one reuseport group. A dual-stack socket serves IPv4 where no IPv4
    socket does. namespace : the cookie of the one in which they must be.
    """
    found: dict[Destination, list[socket.socket]] = {}
    borrowed: dict[Destination, list[socket.socket]] = {}
    for sock in sockets:
        check_steerable(sock)
        if namespace_of(sock) != namespace:
            raise SocketRefusedError(f"{described(sock)} lives in another network namespace: see --netns")
        for family in _families(sock):
            kind = found if family == sock.family else borrowed
            kind.setdefault(Destination(label, family, protocol_of(sock)), []).append(sock)
    for destination, group in borrowed.items():
        found.setdefault(destination, group)
    if not found:
        raise SocketRefusedError("no socket was given")
    for group in found.values():
        for other in group[1:]:
            same = other.getsockname()[:2] == group[0].getsockname()[:2]
            if not same or not all(one.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) for one in (group[0], other)):
                raise SocketRefusedError(
                    f"both {described(group[0])} and {described(other)} would serve {label!r}: give one of them, or "
                    "the members of one reuseport group"
                )
    return found


def _opened(fd: int) -> socket.socket:
    """A socket object of its own for a descriptor that stays the caller's."""
    try:
        copy = os.dup(fd)
    except OSError as error:
        if error.errno != EBADF:
            raise
        raise SocketRefusedError(f"descriptor {fd} is not open") from None
    try:
        return socket.socket(fileno=copy)
    except OSError as error:
        os.close(copy)
        if error.errno != ENOTSOCK:
            raise
        raise SocketRefusedError(f"descriptor {fd} is not a socket") from None


@contextlib.contextmanager
def of_descriptors(descriptors: Iterable[int]) -> Iterator[list[socket.socket]]:
    """Sockets that this process has inherited."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_opened(fd)) for fd in descriptors]


def from_systemd(environment: Mapping[str, str] = os.environ) -> list[tuple[str, int]]:
    """Names and numbers of the descriptors that systemd has passed to this process (sd_listen_fds(3)).

    LISTEN_PID must be this process, so that a child does not take what was meant for its parent. Without
    LISTEN_FDNAMES, the names are UNNAMED. Empty where nothing was passed; SocketRefusedError where it is malformed.
    """
    count = environment.get("LISTEN_FDS")
    if count is None:
        return []
    meant = environment.get("LISTEN_PID")
    if meant != str(os.getpid()):
        raise SocketRefusedError(
            f"LISTEN_PID is {meant or 'not set'}, this is process {os.getpid()}: the sockets are another's; use exec"
        )
    if not count.isdecimal() or len(count) > 5:
        raise SocketRefusedError(f"LISTEN_FDS is {count[:20]!r}: not a number of descriptors")
    names = environment.get("LISTEN_FDNAMES", "").split(":") if environment.get("LISTEN_FDNAMES") else []
    if names and len(names) != int(count):
        raise SocketRefusedError(f"LISTEN_FDNAMES names {len(names)} descriptors, LISTEN_FDS says {count}")
    return [(names[i] if names else UNNAMED, _FIRST_FD + i) for i in range(int(count))]


@contextlib.contextmanager
def of_process(pid: int, protocol: int, address: IPv4Address | IPv6Address, port: int) -> Iterator[list[socket.socket]]:
    """Copies of the sockets that another process has bound to just this address and port, closed again on leaving.

    A copy that stayed open would keep the socket alive, and packets coming, after its process has died.
    SocketRefusedError where there is none. pidfd_getfd(2): Linux 5.6, and leave to trace the process (CAP_SYS_PTRACE,
    unless it is the same user's).
    """
    if pid == os.getpid():
        raise SocketRefusedError(f"{pid} is this very process")
    kinds = (protocol, IPPROTO_MPTCP) if protocol == socket.IPPROTO_TCP else (protocol,)
    with contextlib.ExitStack() as stack:
        try:
            process = os.pidfd_open(pid)
        except OSError as error:
            if error.errno in (ESRCH, ENOENT, EINVAL):  # the last two: a thread's id
                raise SocketRefusedError(f"there is no process {pid}") from None
            raise
        stack.callback(os.close, process)
        found: list[socket.socket] = []
        connected: list[socket.socket] = []
        others: set[str] = set()
        seen: set[int] = set()
        for fd in _sockets_of(pid):
            copy = _copied(process, fd)
            if copy is None:
                continue
            if _is_candidate(copy, kinds, address, port) and cookie_of(copy) not in seen:
                stack.enter_context(copy)
                seen.add(cookie_of(copy))  # an inherited socket has several descriptors
                (connected if has_peer(copy) else found).append(copy)
                continue
            with copy:  # at once: a busy server has thousands
                if copy.family in (socket.AF_INET, socket.AF_INET6) and not has_peer(copy) and copy.getsockname()[1]:
                    others.add(described(copy))
        if not found and connected:
            found = connected  # to be refused for what it is
        if not found:
            raise SocketRefusedError(
                f"process {pid} has no {PROTOCOL_NAMES[protocol]} socket on {address} port {port}; it has "
                f"{', '.join(sorted(others)) or 'none that could be registered'}"
            )
        yield found


def _is_candidate(sock: socket.socket, kinds: tuple[int, ...], address: IPv4Address | IPv6Address, port: int) -> bool:
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or protocol_of(sock) not in kinds:
        return False
    host, bound = sock.getsockname()[:2]
    return bound == port and _plain(ip_address(host.partition("%")[0])) == _plain(address)


def _plain(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """IPv4 addresses as such: some programs bind them in IPv6 sockets."""
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _sockets_of(pid: int) -> list[int]:
    folder = Path(f"/proc/{pid}/fd")
    found = []
    try:
        for entry in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since
                if entry.readlink().name.startswith("socket:"):
                    found.append(int(entry.name))
    except FileNotFoundError:
        raise SocketRefusedError(f"process {pid} has ended") from None
    except PermissionError:
        raise _may_not_trace(pid) from None
    return sorted(found)


def check_tracing() -> None:
    """PermissionError where the sockets even of one's own child are out of reach."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = os.pidfd_open(child.pid)
        try:
            copy = _copied(process, 0)
        finally:
            os.close(process)
            child.kill()
        if copy is not None:
            copy.close()


def _copied(process: int, fd: int) -> socket.socket | None:
    """A copy of another process's descriptor; None when it was closed, or is no socket any more."""
    copy = _libc.syscall(_PIDFD_GETFD, process, fd, 0)
    if copy < 0:
        code = ctypes.get_errno()
        if code in (EPERM, EACCES):
            raise _may_not_trace(None)
        if code == EBADF:
            return None
        if code == ESRCH:
            raise SocketRefusedError("the process has ended")
        raise OSError(code, f"pidfd_getfd: {os.strerror(code)}")
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None


def _may_not_trace(pid: int | None) -> PermissionError:
    who = "the process" if pid is None else f"process {pid}"
    return PermissionError(
        EPERM,
        f"the sockets of {who} are not yours to take: that needs CAP_SYS_PTRACE, "
        "or its user and all capabilities that it has",
    )
