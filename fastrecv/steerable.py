"""Which sockets packets can be steered to, and which of them are members of a reuseport group. Needs no libbpf."""

from __future__ import annotations

import socket
import struct

from fastrecv.errors import SocketRefusedError

__all__ = [
    "IPPROTO_MPTCP",
    "check_kind",
    "check_member",
    "check_steerable",
    "cookie_of",
    "described",
    "has_peer",
    "listens",
    "no_group",
    "protocol_of",
]

# include/uapi/asm-generic/socket.h
_SO_ACCEPTCONN, _SO_PROTOCOL, _SO_COOKIE = 30, 38, 57
IPPROTO_MPTCP = 262  # include/uapi/linux/in.h
_NAMES = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp", IPPROTO_MPTCP: "mptcp"}


def cookie_of(sock: socket.socket) -> int:
    """What the kernel, SOCKMAPs and `ss -e` (sk:) call a socket (SO_COOKIE, Linux 4.12)."""
    return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8))[0])


def protocol_of(sock: socket.socket) -> int:
    """IPPROTO_TCP, IPPROTO_UDP, ... (SO_PROTOCOL)."""
    return sock.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL)


def described(sock: socket.socket) -> str:
    """A socket for a message: tcp 127.0.0.1 port 80."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return f"a socket of family {getattr(sock.family, 'name', sock.family)}"
    protocol = protocol_of(sock)
    host, port = sock.getsockname()[:2]
    return f"{_NAMES.get(protocol, f'protocol {protocol}')} {host} port {port}"


def has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def check_kind(sock: socket.socket) -> None:
    """SocketRefusedError where packets cannot be steered to sockets of this kind, in whatever state."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        raise SocketRefusedError(f"{described(sock)}: packets are steered to IPv4 and IPv6 sockets only")
    protocol = protocol_of(sock)
    if protocol == IPPROTO_MPTCP:
        raise SocketRefusedError(
            f"{described(sock)} is an MPTCP listener, which takes no program and no place in a BPF map: open it as "
            "plain TCP (Go: ListenConfig.SetMultipathTCP(false) or GODEBUG=multipathtcp=0)"
        )
    if protocol not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        raise SocketRefusedError(f"{described(sock)}: packets are steered to TCP and UDP sockets only")


def check_steerable(sock: socket.socket) -> None:
    """SocketRefusedError where packets cannot be steered to a socket."""
    check_kind(sock)
    if has_peer(sock):
        raise SocketRefusedError(f"{described(sock)} is connected: packets cannot be steered to it")
    if not listens(sock):
        raise SocketRefusedError(f"{described(sock)} does not listen: register it after listen()")
    if sock.getsockname()[1] == 0:
        raise SocketRefusedError(f"{described(sock)} is not bound: register it after bind()")


def check_member(sock: socket.socket) -> None:
    """SocketRefusedError for what is no member of a reuseport group, or not yet."""
    check_kind(sock)
    if not has_peer(sock) and not (listens(sock) and sock.getsockname()[1]):
        raise SocketRefusedError(
            f"{described(sock)} is in no group yet: it joins by bind(), TCP by listen(). (A program that is attached "
            "before makes the next member's bind() or listen() fail with EADDRINUSE.)"
        )
    check_steerable(sock)
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
        raise no_group(sock)


def no_group(sock: socket.socket) -> SocketRefusedError:
    """What to raise for a socket that the kernel says is in no group."""
    late = "its SO_REUSEPORT was set after bind(), set it before"
    cure = late if sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) else "set SO_REUSEPORT before bind()"
    return SocketRefusedError(f"{described(sock)} is in no group: {cure}")


def listens(sock: socket.socket) -> bool:
    """Whether a socket listens, where it is one that must."""
    return sock.type != socket.SOCK_STREAM or bool(sock.getsockopt(socket.SOL_SOCKET, _SO_ACCEPTCONN))
