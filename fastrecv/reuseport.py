"""Reuseport groups: the program that a group has, and the slots of a REUSEPORT_SOCKARRAY that its members have."""

from __future__ import annotations

import socket
from errno import EBUSY, EEXIST, EINVAL, ENOENT, EPERM
from typing import TYPE_CHECKING

from fastrecv.errors import BpfError, SocketRefusedError
from fastrecv.steerable import check_member, cookie_of, described, no_group

if TYPE_CHECKING:  # so that classic BPF needs no libbpf
    from fastrecv.bpf import Map, Program

__all__ = ["attach", "check", "detach", "in_slots", "put", "retire", "set_program"]

_SO_ATTACH_REUSEPORT_EBPF, _SO_DETACH_REUSEPORT_BPF = 52, 68  # include/uapi/asm-generic/socket.h
_SO_BINDTOIFINDEX = 62
_NO_INTERFACE = (1 << 31) - 1  # the kernel counts from 1, and does not look whether there is one
_BPF_ANY, _BPF_NOEXIST = 0, 1  # include/uapi/linux/bpf.h


def attach(sock: socket.socket, program: Program) -> None:
    """Attach an eBPF program to the group of a member, in the place of any other; no privilege. SocketRefusedError."""
    set_program(sock, _SO_ATTACH_REUSEPORT_EBPF, program.fileno())


def set_program(sock: socket.socket, option: int, value: int | bytes) -> None:
    """Attach what the option, SO_ATTACH_REUSEPORT_EBPF or _CBPF, takes as `value`. SocketRefusedError."""
    check_member(sock)
    try:
        sock.setsockopt(socket.SOL_SOCKET, option, value)
    except OSError as error:
        raise _refused(sock, error) from None


def detach(sock: socket.socket) -> bool:
    """Take the program, classic or eBPF, from the group of a member: the kernel's hash decides again. Linux 5.3.

    Gives whether there was one. SocketRefusedError where the socket is in no group.
    """
    check_member(sock)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)
    except OSError as error:
        if error.errno == ENOENT:
            return False
        raise _refused(sock, error) from None
    return True


def _refused(sock: socket.socket, error: OSError) -> OSError:
    if error.errno == EINVAL:
        return no_group(sock)
    if error.errno == EPERM:
        return SocketRefusedError(
            f"{described(sock)} has its filters locked (SO_LOCK_FILTER): who did that keeps the program as it is"
        )
    return error


def retire(sock: socket.socket) -> None:
    """Let no packet find a UDP member any more, for good: before it is drained for the last time, and closed.

    A member that is closed while packets come for its group can lose one unseen: the kernel takes it out of the group a
    moment before it takes it out of the lookup, and who meets it in between is queued to the closing socket itself
    (udp_lib_unhash, net/ipv4/udp.c; seen: three or four of 200 closes under 140,000 datagrams a second). Bound to an
    interface that there is not (SO_BINDTOIFINDEX, Linux 5.1) it matches no packet before it leaves the group. No
    privilege. What is on its way then still comes: wait for a grace period of RCU, and read the queue after that.
    """
    sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _NO_INTERFACE)


def in_slots(slots: Map) -> dict[int, int]:
    """The slots of a REUSEPORT_SOCKARRAY that have a socket, and its cookie; one that was closed is gone."""
    numbers, cookies = slots.items()
    return dict(zip(numbers.tolist(), cookies.tolist(), strict=True))


def check(slots: Map, slot: int, sock: socket.socket, take_over: bool) -> bool:
    """Whether `put` would change anything; SocketRefusedError where it is known to refuse."""
    check_member(sock)
    present, cookie = in_slots(slots), cookie_of(sock)
    if present.get(slot) == cookie:
        return False
    for other, holder in present.items():
        if holder == cookie:
            raise SocketRefusedError(f"{described(sock)} has slot {other}: unregister it there first")
    if slot in present and not take_over:
        raise _occupied(slot, present[slot])
    return True


def _occupied(slot: int, there: int | None) -> SocketRefusedError:
    said = f"socket sk:{there:x}" if there is not None else "a socket that has just gone"
    return SocketRefusedError(f"slot {slot} has {said}: unregister that, or take it over")


def put(slots: Map, slot: int, sock: socket.socket, take_over: bool) -> None:
    """Give a slot of a REUSEPORT_SOCKARRAY to a member; nothing where it has it already. No privilege.

    take_over : in the place of another that has it, atomically for the packets. SocketRefusedError, with nothing
    changed, where another has it, and where the socket cannot have one.
    """
    if not check(slots, slot, sock, take_over):
        return
    try:
        slots.update([slot], [sock.fileno()], _BPF_ANY if take_over else _BPF_NOEXIST)
    except BpfError as error:
        if error.errno == EEXIST:
            raise _occupied(slot, in_slots(slots).get(slot)) from None
        if error.errno == EINVAL:
            raise no_group(sock) from None
        if error.errno == EBUSY:
            raise SocketRefusedError(
                f"{described(sock)} has a slot of another balancer, which may have been destroyed while its group had "
                "its program (`fastrecv balance detach` ends that), or it is a dispatcher's: a socket is in one place "
                "only. For a dispatcher register one more member of the group, which has no slot"
            ) from None
        raise
