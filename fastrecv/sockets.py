"""Opening datagram sockets, and setting what Python's socket module has no name for."""

from __future__ import annotations

import contextlib
import ctypes
import operator
import os
import re
import socket
import struct
from collections.abc import Iterable
from errno import EADDRINUSE, EADDRNOTAVAIL, EPERM
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrecv._recv import ENDPOINT

__all__ = [
    "Address",
    "Memory",
    "busy_poll",
    "drop_everything",
    "drops",
    "endpoints",
    "grow_receive_buffer",
    "incoming_cpu",
    "join",
    "leave",
    "memory",
    "open_datagram",
    "path_of",
    "receive_buffer",
    "receive_buffer_limit",
    "remove_path",
]

Address = tuple[Any, ...] | str | bytes | os.PathLike[str]
"""(host, port), (host, port, 0, scope), or the path of an AF_UNIX socket (bytes: an abstract name)."""

_LONGEST = 107  # sizeof(sun_path) - 1, unix(7)
_LIKE_IP = re.compile(r"[0-9]+(\.[0-9]+){3}(:[0-9]+)?|\[?[0-9a-fA-F]*:[0-9a-fA-F:.]*\]?(:[0-9]+)?|:[0-9]+")

# include/uapi/asm-generic/socket.h
_SO_ATTACH_FILTER = 26
_SO_RCVBUFFORCE = 33
_SO_BUSY_POLL = 46
_SO_INCOMING_CPU = 49
_SO_MEMINFO = 55
_SO_PREFER_BUSY_POLL = 69
_SO_BUSY_POLL_BUDGET = 70
_SK_MEMINFO_RMEM_ALLOC, _SK_MEMINFO_RCVBUF, _SK_MEMINFO_DROPS, _SK_MEMINFO_VARS = 0, 1, 8, 9  # uapi/linux/sock_diag.h
_RET_K = 0x06  # BPF_RET | BPF_K, include/uapi/linux/bpf_common.h
# include/uapi/linux/in.h
_MCAST = {(True, False): 42, (False, False): 45, (True, True): 46, (False, True): 47}  # (join, with a source)
_ALL_GROUPS = {4: (socket.IPPROTO_IP, 49), 6: (socket.IPPROTO_IPV6, 29)}  # IP_MULTICAST_ALL, IPV6_MULTICAST_ALL


def open_datagram(address: Address, *, reuse_port: bool = False, dual_stack: bool = True) -> socket.socket:
    """A datagram socket bound to `address`: (host, port) with a numeric host, "" every IPv4 address; or a path.

    ValueError and TypeError say what is wrong with the address, OSError why the kernel refused it.

    reuse_port : share the port with other sockets of the same user that say so, too (SO_REUSEPORT, socket(7)).
    dual_stack : an IPv6 socket takes IPv4 as well, as ::ffff:a.b.c.d (IPV6_V6ONLY off, ipv6(7)).
    """
    address, family = _checked(address)
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        if reuse_port and family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual_stack)
        try:
            sock.bind(address)
        except OSError as error:
            raise OSError(error.errno, f"cannot bind to {_shown(address)}: {error.strerror}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def _checked(address: Address) -> tuple[tuple[Any, ...] | str | bytes, socket.AddressFamily]:
    """The address as bind takes it, and its family; ValueError or TypeError for what cannot be one."""
    if isinstance(address, os.PathLike):
        address = os.fspath(address)
    if isinstance(address, (str, bytes)):
        if not address:
            raise ValueError("the address is empty: give (host, port), or the path of an AF_UNIX socket")
        if isinstance(address, str) and _LIKE_IP.fullmatch(address):
            raise ValueError(f"{address!r} would be the path of an AF_UNIX socket: for UDP give ({address!r}, port)")
        if len(os.fsencode(address)) > _LONGEST:
            raise ValueError(f"{address!r} is too long for the path of a socket: {_LONGEST} bytes at most")
        return address, socket.AF_UNIX
    if not isinstance(address, tuple) or len(address) not in (2, 3, 4) or not isinstance(address[0], str):
        raise TypeError(f"the address is {address!r}: give (host, port), or the path of an AF_UNIX socket")
    host = address[0] or "0.0.0.0"  # noqa: S104 - as documented
    _port(address[1])
    return (host, *address[1:]), socket.AF_INET6 if _host(host).version == 6 else socket.AF_INET


def _port(port: object) -> None:
    if not isinstance(port, (int, np.integer)) or not 0 <= port <= 65535:
        raise ValueError(f"the port is {port!r}: give a number from 0 to 65535")


def _shown(address: Address) -> str:
    if isinstance(address, tuple):
        return f"{address[0]} port {address[1]}"
    return repr(address)


def _host(host: str) -> IPv4Address | IPv6Address:
    try:
        return ip_address(host)
    except ValueError:
        raise ValueError(f"{host!r} is no numeric IPv4 or IPv6 address (names are not resolved)") from None


def endpoints(addresses: Iterable[tuple[Any, ...]]) -> NDArray[np.void]:
    """Socket addresses as an array of ENDPOINT: (host, port) or (host, port, 0, scope), numeric hosts."""
    rows = []
    for address in addresses:
        if not isinstance(address, tuple) or len(address) not in (2, 4):
            raise TypeError(f"{address!r} is no address: give a list of (host, port) or (host, port, 0, scope)")
        host, port, *rest = address
        _port(port)
        parsed = _host(host)
        packed = parsed.packed if isinstance(parsed, IPv6Address) else bytes(10) + b"\xff\xff" + parsed.packed
        family = socket.AF_INET6 if parsed.version == 6 else socket.AF_INET
        rows.append((np.frombuffer(packed, np.uint8), port, family, rest[1] if len(rest) > 1 else 0))
    return np.array(rows, ENDPOINT)


def receive_buffer(sock: socket.socket) -> int:
    """Bytes that may be queued, in the kernel's own account: with its overhead, so twice what was asked for."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def grow_receive_buffer(sock: socket.socket, size: int) -> int:
    """Ask for a receive buffer of `size` bytes (SO_RCVBUF, socket(7)); never makes it smaller.

    With CAP_NET_ADMIN (SO_RCVBUFFORCE) it is granted; without, the kernel cuts it to net.core.rmem_max.
    Returns what `receive_buffer` says now: the kernel doubles what is asked for.
    """
    if receive_buffer(sock) < 2 * size:
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
        except OSError as error:
            if error.errno != EPERM:
                raise
            before = receive_buffer(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
            if receive_buffer(sock) < before:  # cut below what it was
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, before // 2)
    return receive_buffer(sock)


def receive_buffer_limit() -> int:
    """Bytes that anybody may ask `grow_receive_buffer` for: sysctl net.core.rmem_max.

    0 where it cannot be read: older kernels show it in the first network namespace only.
    """
    try:
        return int(Path("/proc/sys/net/core/rmem_max").read_text())
    except FileNotFoundError:
        return 0


class Memory(NamedTuple):
    """What a socket holds, in bytes of the kernel's own account: queued, of `limit`. drops : see `drops`."""

    queued: int
    limit: int
    drops: int


def memory(sock: socket.socket) -> Memory:
    """What waits in a socket's queue, and what it has lost, whoever reads it. SO_MEMINFO, Linux 4.12."""
    data = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 4 * _SK_MEMINFO_VARS)
    words = struct.unpack(f"{len(data) // 4}I", data)
    return Memory(words[_SK_MEMINFO_RMEM_ALLOC], words[_SK_MEMINFO_RCVBUF], words[_SK_MEMINFO_DROPS])


def drops(sock: socket.socket) -> int:
    """Datagrams that the socket has lost since it was opened: its queue was full, or its filter dropped them.

    SO_MEMINFO, Linux 4.12. A 32-bit counter.
    """
    return memory(sock).drops


def busy_poll(sock: socket.socket, microseconds: int, *, prefer: bool = False, budget: int | None = None) -> None:
    """Let receives poll the network card itself (SO_BUSY_POLL, socket(7)).

    A Receiver waits in poll(2), which polls the card for as long as sysctl net.core.busy_poll says; this option allows
    it, and its microseconds count for blocking receives only.

    prefer : keep the card's interrupts off meanwhile (SO_PREFER_BUSY_POLL, Linux 5.11). budget : packets a poll
    (SO_BUSY_POLL_BUDGET, Linux 5.11). Raising any of them takes CAP_NET_ADMIN. Worth it only for a device with
    napi_defer_hard_irqs and gro_flush_timeout set.
    """
    sock.setsockopt(socket.SOL_SOCKET, _SO_BUSY_POLL, microseconds)
    if prefer:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PREFER_BUSY_POLL, 1)
    if budget is not None:
        sock.setsockopt(socket.SOL_SOCKET, _SO_BUSY_POLL_BUDGET, budget)


def incoming_cpu(sock: socket.socket, cpu: int) -> None:
    """Prefer this socket of its reuseport group for packets that were taken on `cpu` (SO_INCOMING_CPU, socket(7))."""
    sock.setsockopt(socket.SOL_SOCKET, _SO_INCOMING_CPU, cpu)


def join(sock: socket.socket, group: str, *, interface: str | int | None = None, source: str | None = None) -> None:
    """Receive a multicast group, from any source or from one only (RFC 3678).

    interface : name or index; None leaves it to the routing table. What other sockets of this host have joined is not
    delivered here (IP_MULTICAST_ALL off, ip(7)).
    """
    version = _membership(sock, True, group, interface, source)
    level, name = _ALL_GROUPS[version]
    sock.setsockopt(level, name, 0)


def leave(sock: socket.socket, group: str, *, interface: str | int | None = None, source: str | None = None) -> None:
    """Undo `join` with the same arguments."""
    _membership(sock, False, group, interface, source)


def _membership(sock: socket.socket, joining: bool, group: str, interface: str | int | None, source: str | None) -> int:
    """MCAST_{JOIN,LEAVE}[_SOURCE]_GROUP with a struct group_req or group_source_req; the group's IP version."""
    address = _host(group)
    if not address.is_multicast:
        raise ValueError(f"{group} is no multicast group")
    if sock.family != (socket.AF_INET6 if address.version == 6 else socket.AF_INET) and not (
        sock.family == socket.AF_INET6 and address.version == 4
    ):
        raise ValueError(f"a socket of family {socket.AddressFamily(sock.family).name} cannot join {group}")
    try:
        index = socket.if_nametoindex(interface) if isinstance(interface, str) else operator.index(interface or 0)
    except OSError:
        raise ValueError(f"no interface {interface!r} here: give its name or index") from None
    request = struct.pack("@I4x", index) + _storage(address)
    if source is not None:
        sender = _host(source)
        if sender.version != address.version:
            raise ValueError(f"the source {source} and the group {group} are of different IP versions")
        request += _storage(sender)
    level = socket.IPPROTO_IPV6 if address.version == 6 else socket.IPPROTO_IP
    try:
        sock.setsockopt(level, _MCAST[joining, source is not None], request)
    except OSError as error:
        tried = f"cannot {'join' if joining else 'leave'} {group} on {interface or 'any interface'}"
        why = {EADDRINUSE: "it is joined already", EADDRNOTAVAIL: "it is not joined so"}.get(error.errno or 0)
        raise OSError(error.errno, f"{tried}: {why or error.strerror}") from error
    return address.version


def _storage(address: IPv4Address | IPv6Address) -> bytes:
    """A struct sockaddr_storage: 128 bytes."""
    if isinstance(address, IPv4Address):
        return struct.pack("=HH4s120x", socket.AF_INET, 0, address.packed)
    return struct.pack("=HHI16sI100x", socket.AF_INET6, 0, 0, address.packed, 0)


def drop_everything(sock: socket.socket) -> None:
    """Attach the classic BPF filter `ret #0`: the kernel drops, and counts, every later packet of this socket.

    What is queued already stays readable. Needs no privilege. socket(7), SO_ATTACH_FILTER.
    """
    program = ctypes.create_string_buffer(struct.pack("HBBI", _RET_K, 0, 0, 0))  # struct sock_filter
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))


def path_of(sock: socket.socket) -> tuple[int, int, int] | None:
    """Whose path of the file system an AF_UNIX socket is bound to: process, device, inode; None without one."""
    path = sock.getsockname() if sock.family == socket.AF_UNIX else None
    if not isinstance(path, str) or not path:
        return None
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(path)  # noqa: PTH116 - a name as the kernel keeps it
        return os.getpid(), found.st_dev, found.st_ino
    return None


def remove_path(sock: socket.socket, owned: tuple[int, int, int] | None) -> None:
    """Remove the path that the socket is bound to, unless it is no longer what `path_of` said: then it is another's."""
    if owned is not None and path_of(sock) == owned:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(sock.getsockname())  # noqa: PTH108 - a name as the kernel keeps it
