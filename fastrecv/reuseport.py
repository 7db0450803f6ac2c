"""Reuseport groups: what can be a member, the program that a group has, and the slots that its members have."""

from __future__ import annotations

import socket
from errno import EBUSY, EEXIST, EINVAL, ENOENT

from fastrecv.bpf import Map, Program
from fastrecv.errors import BpfError, SocketRefusedError, StateError
from fastrecv.listeners import check_kind, check_steerable, cookie_of, described

__all__ = ["attach", "check_member", "detach", "in_slots", "put"]

_SO_ACCEPTCONN, _SO_ATTACH_REUSEPORT_EBPF, _SO_DETACH_REUSEPORT_BPF = 30, 52, 68  # include/uapi/asm-generic/socket.h
_BPF_ANY, _BPF_NOEXIST = 0, 1  # include/uapi/linux/bpf.h


def check_member(sock: socket.socket) -> None:
    """SocketRefusedError for what is no member of a group that packets can be steered to."""
    check_kind(sock)
    listens = sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, _SO_ACCEPTCONN)
    if not (listens and sock.getsockname()[1]):
        raise SocketRefusedError(
            f"{described(sock)} is in no group yet, it is from bind() on, TCP from listen(). A program that is "
            "attached before makes the next member's bind() fail with EADDRINUSE"
        )
    check_steerable(sock)
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
        raise _no_group(sock)


def attach(sock: socket.socket, program: Program) -> None:
    """Attach a program to the group of a member, in the place of any other; no privilege. SocketRefusedError."""
    check_member(sock)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_EBPF, program.fileno())
    except OSError as error:
        if error.errno != EINVAL:
            raise
        raise _no_group(sock) from None


def detach(sock: socket.socket) -> None:
    """Detach whatever program the group of a member has: the kernel's hash decides then. StateError without one."""
    check_member(sock)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)
    except OSError as error:
        if error.errno not in (EINVAL, ENOENT):
            raise
        raise StateError(f"the group of {described(sock)} has no program") from None


def in_slots(slots: Map) -> dict[int, int]:
    """The slots of a REUSEPORT_SOCKARRAY that have a socket, and its cookie; one that was closed is gone."""
    numbers, cookies = slots.items()
    return dict(zip(numbers.tolist(), cookies.tolist(), strict=True))


def put(slots: Map, slot: int, sock: socket.socket, take_over: bool) -> None:
    """Give a slot of a REUSEPORT_SOCKARRAY to a member; nothing where it has it already. No privilege.

    take_over : in the place of another that has it, atomically for the packets. SocketRefusedError, with nothing
    changed, where another has it, and where the socket cannot have one.
    """
    check_member(sock)
    present, cookie = in_slots(slots), cookie_of(sock)
    if present.get(slot) == cookie:
        return
    for other, holder in present.items():
        if holder == cookie:
            raise SocketRefusedError(f"{described(sock)} has slot {other}: unregister it there first")
    try:
        slots.update([slot], [sock.fileno()], _BPF_ANY if take_over else _BPF_NOEXIST)
    except BpfError as error:
        if error.errno == EEXIST:
            there = in_slots(slots).get(slot)
            said = f"socket sk:{there:x}" if there is not None else "a socket that has just gone"
            raise SocketRefusedError(f"slot {slot} has {said}: unregister that, or take it over") from None
        if error.errno == EINVAL:
            raise _no_group(sock) from None
        if error.errno == EBUSY:
            raise SocketRefusedError(
                f"{described(sock)} has a slot of another balancer, or is a dispatcher's: a socket is in one place "
                "only. For a dispatcher register one more member of the group, which has no slot"
            ) from None
        raise


def _no_group(sock: socket.socket) -> SocketRefusedError:
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
        return SocketRefusedError(
            f"{described(sock)} is in no group: its SO_REUSEPORT was set after bind(), set it before"
        )
    return SocketRefusedError(f"{described(sock)} is in no group: set SO_REUSEPORT before bind()")
