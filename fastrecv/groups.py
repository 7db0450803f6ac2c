"""Reuseport groups as the kernel has them: who is in one, at which place, what waits in each queue, and which program
decides. No socket option, file of /proc or netlink message says that; a BPF iterator does.

Loading it takes CAP_BPF and CAP_PERFMON, and Linux 5.12 with BTF (/sys/kernel/btf/vmlinux); reading it takes nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from fastrecv import bpf
from fastrecv.closing import Closing
from fastrecv.errors import SocketRefusedError, StateError
from fastrecv.netns import Namespace
from fastrecv.netns import cookie_of as namespace_of
from fastrecv.steerable import cookie_of, described

__all__ = [
    "CLASSIC",
    "STATES",
    "Groups",
    "Lookout",
    "Member",
    "Owner",
    "has_others",
    "members",
    "owners",
    "program_of",
]

Address = IPv4Address | IPv6Address

CLASSIC = 0
"""The id of a classic BPF program: it has none, and ids begin at 1."""

STATES = (
    "", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT",
    "LAST_ACK", "LISTEN", "CLOSING", "NEW_SYN_RECV", "BOUND_INACTIVE",
)  # fmt: skip
"""The kernel's names of a socket's state, by number (include/net/tcp_states.h)."""

_PASSES = 4
_PURPOSE = "reading reuseport groups"
_PROGRAMS = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}


@dataclass(frozen=True)
class Member:
    """A TCP listener or a UDP socket, and its place in its reuseport group.

    cookie : SO_COOKIE, which `ss -e` shows as sk:. protocol : IPPROTO_TCP or IPPROTO_UDP. peer : of a connected UDP
    socket. state : an index of STATES; UDP has 7 (CLOSE), or 1 when connected. inode : what /proc/PID/fd shows; 0 when
    no descriptor is left. uid : who opened it.
    queue, limit : UDP: bytes that wait in the kernel's account, of so many that may; TCP: connections not accepted yet,
    of so many before more are refused. drops : packets that it has lost, modulo 2**32.
    cpu : SO_INCOMING_CPU, -1 where the kernel has not seen a packet for it.
    group : the cookie of its group's first member, the same for all members as long as that one is open; None for a
    socket in no group, and so on: index, from 0, -1 beyond the 256th member; size, members; room, members before the
    kernel makes it larger; number, the kernel's own of the group, which it gives again.
    program : the id of the program attached to the group, CLASSIC for a classic one, None for none.
    """

    cookie: int
    protocol: int
    family: int
    address: Address
    port: int
    peer: tuple[Address, int] | None
    ipv6_only: bool
    reuse_port: bool
    state: int
    inode: int
    uid: int
    queue: int
    limit: int
    drops: int
    cpu: int
    group: int | None
    number: int | None
    index: int | None
    size: int
    room: int
    program: int | None


class Owner(NamedTuple):
    """A process that holds a socket. command : as /proc/PID/comm has it, 15 bytes at most."""

    pid: int
    command: str


class Groups(Closing):
    """The loaded iterators, for who reads more than once; a context manager. CAP_BPF and CAP_PERFMON.

    PermissionError says which privilege is missing.
    """

    def __init__(self) -> None:
        self._object = bpf.tracing("groups", _PURPOSE)
        self._dtype = self._object.dtype("member")

    def close(self) -> None:
        self._object.close()

    def sockets(self) -> list[Member]:
        """Every TCP listener and every bound UDP socket of the calling thread's network namespace.

        By protocol, port and group, a group's in the order of their places. Each is seen at a moment of its own.
        """
        for _ in range(_PASSES):
            written = b"".join(self._object.programs[name].iterate() for name in ("tcp", "udp"))
            rows = np.frombuffer(written, self._dtype)
            # Passing by gives a socket its cookie: what the group is called is known at the latest in the second pass.
            if not np.any((rows["size"] > 0) & (rows["first"] == 0)):
                break
        found = [_member(row) for row in rows]
        found.sort(key=lambda one: (one.protocol, one.port, one.group or 0, one.index or 0, one.cookie))
        return found

    def members(self) -> list[Member]:
        """Those of `sockets` that are in a reuseport group."""
        return [one for one in self.sockets() if one.group is not None]


class Lookout(Closing):
    """The TCP listeners or UDP sockets of one port, for who looks on when he has given his capabilities up.

    Opening it takes CAP_BPF and CAP_PERFMON, looking takes no privilege: see Link.iterate. PermissionError says which
    is missing. A look passes by all sockets of the protocol in the calling thread's network namespace: 7 ms beside
    10,000 others (one machine).
    """

    def __init__(self, protocol: int, port: int) -> None:
        """The protocol: IPPROTO_TCP or IPPROTO_UDP. The port: local, of whatever address."""
        with bpf.tracing("groups", _PURPOSE, only_port=port) as loaded:
            self._link = loaded.programs[_PROGRAMS[protocol]].attach_iterator()
            self._dtype = loaded.dtype("member")

    @classmethod
    def of(cls, link: int) -> Self:
        """One that was opened before, from its `fileno`, which is its own from now on. No privilege."""
        made = cls.__new__(cls)
        made._link = bpf.Link.take(link)
        with bpf.packaged("groups") as layout:
            made._dtype = layout.dtype("member")
        return made

    def fileno(self) -> int:
        """Of the link, which is all that it holds."""
        return self._link.fileno()

    def look(self) -> dict[int, Member]:
        """The sockets as they are, by their cookies. In the first look `Member.group` may be 0: it has no name yet."""
        rows = np.frombuffer(self._link.iterate(), self._dtype)
        return {one.cookie: one for one in map(_member, rows)}

    def close(self) -> None:
        self._link.close()


def _member(row: Any) -> Member:
    grouped = bool(row["size"])
    return Member(
        cookie=int(row["cookie"]),
        protocol=int(row["protocol"]),
        family=int(row["family"]),
        address=_address(row["address"], row["family"]),
        port=int(row["port"]),
        peer=(_address(row["peer"], row["family"]), int(row["peer_port"])) if row["peer_port"] else None,
        ipv6_only=bool(row["only6"]),
        reuse_port=bool(row["reuseport"]),
        state=int(row["state"]),
        inode=int(row["inode"]),
        uid=int(row["uid"]),
        queue=int(row["queue"]),
        limit=int(row["limit"]),
        drops=int(row["drops"]),
        cpu=int(row["cpu"]),
        group=int(row["first"]) if grouped else None,
        number=int(row["group"]) if grouped else None,
        index=int(row["index"]) if grouped else None,
        size=int(row["size"]),
        room=int(row["room"]),
        program=int(row["program"]) if row["program_type"] >= 0 else None,
    )


def _address(packed: Any, family: int) -> Address:
    mapped = IPv6Address(packed.tobytes())
    four = mapped.ipv4_mapped if family == socket.AF_INET else None
    return four or mapped


def members(netns: str | os.PathLike[str] | None = None) -> list[Member]:
    """The members of all reuseport groups of a network namespace: TCP listeners and UDP sockets.

    netns : /run/netns/NAME or /proc/PID/ns/net (CAP_SYS_ADMIN); by default the calling thread's. Most of the time
    goes into loading the iterators: Groups for who reads often. CAP_BPF and CAP_PERFMON.
    """
    with Groups() as groups, contextlib.ExitStack() as stack:
        if netns is not None:
            stack.enter_context(stack.enter_context(contextlib.closing(Namespace.open(netns))))
        return groups.members()


def program_of(sock: socket.socket) -> int | None:
    """The id of the program attached to a socket's reuseport group; CLASSIC for a classic one; None for none.

    SocketRefusedError for a socket that the kernel does not look up: not bound, or TCP that does not listen.
    StateError where it lives in another network namespace than the calling thread. CAP_BPF and CAP_PERFMON.
    """
    with contextlib.closing(Namespace.open()) as here:
        if namespace_of(sock) != here.cookie:
            raise StateError(f"{described(sock)} lives in another network namespace: enter that one first")
    cookie = cookie_of(sock)
    with Groups() as groups:
        for one in groups.sockets():
            if one.cookie == cookie:
                return one.program
    raise SocketRefusedError(f"{described(sock)} is in no group: UDP is from bind() on, TCP from listen()")


def has_others(members: Sequence[socket.socket]) -> bool:
    """Whether more sockets than these are bound to the address and port of the first. No privilege (proc(5), net/udp).

    Who joins a group must be of the same user.
    """
    first = members[0]
    name = "tcp" if first.type == socket.SOCK_STREAM else "udp"
    table = Path("/proc/thread-self/net", name if first.family == socket.AF_INET else f"{name}6")
    ours = {os.fstat(member.fileno()).st_ino for member in members}
    packed = socket.inet_pton(first.family, first.getsockname()[0].partition("%")[0])
    words = (packed[start : start + 4] for start in range(0, len(packed), 4))
    where = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words) + f":{first.getsockname()[1]:04X}"
    free = "07" if name == "udp" else "0A"  # not connected; listening
    rows = (line.split() for line in table.read_text().splitlines()[1:])
    return any(row[1] == where and row[3] == free and int(row[9]) not in ours for row in rows)


def owners(inodes: Iterable[int]) -> dict[int, list[Owner]]:
    """The processes that hold each socket, by the socket's inode, lowest process id first; none: not in the result.

    CAP_SYS_PTRACE for the processes of others, which are passed over without it; like all that cannot be read.
    """
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, list[Owner]] = {}
    for pid in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
        held = {wanted[target] for target in _targets(pid) if target in wanted}
        if held:
            with contextlib.suppress(OSError):  # it has ended
                owner = Owner(pid, Path(f"/proc/{pid}/comm").read_text(errors="replace").removesuffix("\n"))
                for inode in held:
                    found.setdefault(inode, []).append(owner)
    return found


def _targets(pid: int) -> list[str]:
    """What a process's descriptors stand for, as far as that can be read."""
    found = []
    with contextlib.suppress(OSError):  # another's process, or it has ended
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since
                found.append(entry.readlink().name)
    return found
