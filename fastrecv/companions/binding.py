"""Sockets on addresses of this host, also on those that are its own by a local route alone; errors that name the cure.

IPv4 lets a socket have every address of a local route (ip-route(8), type local), IPv6 only those of interfaces, unless
the socket may bind any address (IP_FREEBIND, ip(7)). Such a one could send from addresses of others: so the routes are
asked first.
"""

from __future__ import annotations

import resource
import socket
import struct
from collections.abc import Iterable
from errno import EACCES, EADDRINUSE, EADDRNOTAVAIL, EMFILE
from ipaddress import IPv4Address, IPv6Address

__all__ = ["Address", "allow_descriptors", "bind", "check_local", "is_local", "name_of", "opened"]

Address = IPv4Address | IPv6Address

_IP_FREEBIND, _IP_BIND_ADDRESS_NO_PORT = 15, 24  # include/uapi/linux/in.h
# include/uapi/linux/netlink.h, rtnetlink.h
_NLM_F_REQUEST, _RTM_NEWROUTE, _RTM_GETROUTE, _RTA_DST, _RTN_LOCAL = 1, 24, 26, 1, 2
_HEADER, _ROUTE, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=8BI"), struct.Struct("=HH")
_SPARE = 64  # descriptors for all else


def opened(kind: socket.SocketKind, version: int) -> socket.socket:
    """A socket for IPv4, or for IPv6, that does not block."""
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    return socket.socket(family, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)


def name_of(address: Address, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """An address and port as the socket module takes them: a link-local one (fe80::1%eth0) with its interface."""
    zone = address.scope_id if isinstance(address, IPv6Address) else None
    if zone is None:
        return str(address), port
    try:
        return str(address).partition("%")[0], port, 0, socket.if_nametoindex(zone)
    except OSError as error:
        raise OSError(error.errno, f"{address}: there is no interface {zone!r}") from None


def bind(sock: socket.socket, address: Address, port: int) -> None:
    """Bind to an address of this host. Port 0: one is chosen, for TCP when it connects (IP_BIND_ADDRESS_NO_PORT).

    OSError says what would help.
    """
    if sock.type == socket.SOCK_STREAM and port == 0:
        sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
    elif sock.type == socket.SOCK_STREAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended rest for a minute
    if address.version == 6 and is_local(address):
        sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
    try:
        sock.bind(name_of(address, port))
    except OSError as error:
        cures = {
            EADDRINUSE: "it is in use by a program that does not share it (SO_REUSEPORT), or by another user's",
            EADDRNOTAVAIL: _strange(address),
            EACCES: "ports below net.ipv4.ip_unprivileged_port_start take CAP_NET_BIND_SERVICE",
        }
        where = f"{address} port {port}" if port else str(address)
        why = cures.get(error.errno or 0, error.strerror)
        raise OSError(error.errno, f"cannot bind to {where}: {why}") from error


def check_local(addresses: Iterable[Address]) -> None:
    """OSError where one is not of this host. bind alone does not tell where net.ipv4.ip_nonlocal_bind is set."""
    for address in addresses:
        if not is_local(address):
            raise OSError(EADDRNOTAVAIL, _strange(address))


def _strange(address: Address) -> str:
    return f"{address} is not an address of this host: ip addr add {address} dev lo"


def is_local(address: Address) -> bool:
    """Whether packets to an address are for this host: what its routes say (RTM_GETROUTE, rtnetlink(7))."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    wanted = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(address.packed), _RTA_DST) + address.packed
    route = _ROUTE.pack(family, 8 * len(address.packed), 0, 0, 0, 0, 0, 0, 0)
    header = _HEADER.pack(_HEADER.size + len(route) + len(wanted), _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as routes:
        routes.sendto(header + route + wanted, (0, 0))
        answer = routes.recv(65536)
    if _HEADER.unpack_from(answer)[1] != _RTM_NEWROUTE:
        return False  # no route at all
    return bool(_ROUTE.unpack_from(answer, _HEADER.size)[7] == _RTN_LOCAL)


def allow_descriptors(number: int) -> None:
    """Let this process have so many descriptors beside its own few. OSError where its hard limit does not allow it."""
    needed = number + _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise OSError(EMFILE, f"that takes {needed:,} descriptors, this process may have {hard:,}: ulimit -n {needed}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
