"""What becomes of sockets while somebody looks: TCP states, datagrams and packets dropped, a balancer's choices.

Everything is told as a dict that JSON can hold, with "time" and "event": "state", "overflow", "drop", "choice", "lost",
"group". Nothing stays attached when the watcher has gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from errno import errorcode
from ipaddress import IPv6Address
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from fastrecv import bpf, features
from fastrecv.bpf import Map, Ring
from fastrecv.closing import Closing
from fastrecv.groups import CLASSIC, STATES, Member, Owner
from fastrecv.netns import Namespace
from fastrecv.reuseport import in_slots
from fastrecv.rules import PROTOCOL_NAMES

__all__ = ["REASONS", "Choices", "CpuShares", "Document", "Watch", "group_documents", "sampled"]

Document = dict[str, Any]

REASONS = (
    "", "NO_SOCKET", "SOCKET_CLOSE", "SOCKET_FILTER", "SOCKET_RCVBUFF", "SOCKET_BACKLOG", "PROTO_MEM",
    "TCP_LISTEN_OVERFLOW",
)  # fmt: skip
"""Why a packet was dropped, as place_of() in bpf/watch.bpf.c counts; include/net/dropreason-core.h explains each."""

_STATE, _OVERFLOW, _DROP = 1, 2, 3  # of bpf/watch.bpf.c
_SLOTS = 128  # of bpf/balance_maps.h: the slot of a choice that found none


class Watch(Closing):
    """Sees the TCP and UDP sockets of the calling thread's network namespace, from here to close(); a context manager.

    port : only what comes from this port or goes to it; 0 for all.

    CAP_BPF and CAP_PERFMON, else PermissionError. Linux 5.17 (drop reasons); before 6.11 a drop names no socket, and
    that of a datagram for which the queue had no room is told as "overflow" alone.
    """

    def __init__(self, port: int = 0) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"port {port}: give 1 to 65535, or 0 for all")
        with contextlib.closing(Namespace.open()) as here:
            namespace = here.cookie
        self._clock = _Clock()
        self._told = 0
        with contextlib.ExitStack() as stack:
            self._object = stack.enter_context(
                bpf.tracing(
                    "watch", "watching sockets", namespace=namespace, port=port,
                    receivers=features.kernel_version() >= (6, 11),
                )
            )  # fmt: skip
            self._dtype = self._object.dtype("event")
            self._ring = stack.enter_context(Ring(self._object.maps["events"]))
            for program in self._object.programs.values():
                stack.enter_context(program.attach_tracing())
            self._stack = stack.pop_all()

    def fileno(self) -> int:
        """Readable when there is something to read."""
        return self._ring.fileno()

    def read(self) -> list[Document]:
        """What has happened since the last time, oldest first; "lost" says how much more, for which there was no room.

        "state" : a TCP socket, its own address as the source; pid and command where a process did it by a system call.
        "overflow" : a UDP socket whose queue had no room. "drop" : a packet, with one of REASONS; the lost datagram of
        an "overflow" follows as one (Linux 6.11). A port is None where the socket has none yet, or no peer.
        """
        found = [self._document(row) for row in self._ring.read(self._dtype)]
        lost = int(self._object.get("lost"))
        if lost != self._told:
            found.append({"event": "lost", "time": self._clock.now(), "count": lost - self._told})
            self._told = lost
        return found

    def _document(self, row: Any) -> Document:
        kind = int(row["kind"])
        named = {_STATE: "state", _OVERFLOW: "overflow", _DROP: "drop"}[kind]
        found = {
            "event": named, "time": self._clock.at(int(row["time"])), "protocol": PROTOCOL_NAMES[int(row["protocol"])],
            "source": _address(row["source"]), "source_port": int(row["source_port"]) or None,
            "destination": _address(row["destination"]), "destination_port": int(row["destination_port"]) or None,
            "cookie": int(row["cookie"]) or None,
        }  # fmt: skip
        if kind == _STATE:
            pid = int(row["pid"])
            command = row["command"].tobytes().rstrip(b"\0").decode(errors="replace")
            found |= {"old": _state(row["old"]), "new": _state(row["new"])}
            found |= {"pid": pid or None, "command": command if pid else None}
        elif kind == _OVERFLOW:
            found["error"] = errorcode.get(-int(row["code"]), str(row["code"]))
        else:
            found["reason"] = REASONS[int(row["code"])]
        return found

    def close(self) -> None:
        self._stack.close()


class Choices:
    """The choices that a balancer's program tells of: see `sampled`."""

    def __init__(self, ring: Ring, slots: Map, counts: Map) -> None:
        self._ring, self._slots, self._counts = ring, slots, counts
        self._untold = self._lost()
        self._clock = _Clock()
        with bpf.packaged("balance") as balance:
            self._dtype = balance.dtype("choice")

    def fileno(self) -> int:
        """Readable when there is something to read."""
        return self._ring.fileno()

    def read(self) -> list[Document]:
        """Each "choice": a packet or connection, its bucket, its slot (None where there is none), and what came of it.

        outcome : "selected", or the kernel's errno: ENOENT for a slot without a socket. taken : the slot that gets it,
        None where nobody does, or whom the kernel's hash says; cookie : of the socket that slot has now. "lost" says
        how many more there were, for which there was no room.
        """
        rows = self._ring.read(self._dtype)
        sockets = in_slots(self._slots) if len(rows) else {}
        lost = self._lost()
        more, self._untold = lost - self._untold, lost
        found: list[Document] = [
            {
                "event": "choice", "time": self._clock.at(int(row["time"])),
                "source": _address(row["flow"]["source"]), "source_port": _port(row["flow"]["source_port"]),
                "destination": _address(row["flow"]["destination"]),
                "destination_port": _port(row["flow"]["destination_port"]),
                "bucket": int(row["bucket"]), "slot": int(row["slot"]) if row["slot"] < _SLOTS else None,
                "taken": int(row["taken"]) if row["taken"] < _SLOTS else None,
                "cookie": sockets.get(int(row["taken"])),
                "outcome": errorcode.get(-int(row["outcome"]), str(row["outcome"])) if row["outcome"] else "selected",
            }
            for row in rows
        ]  # fmt: skip
        return [*found, *([{"event": "lost", "time": self._clock.now(), "count": more}] if more else [])]

    def _lost(self) -> int:
        return int(self._counts.lookup([_SLOTS])["untold"].sum())


class _Named(Protocol):
    """Maps by their names in bpf/balance.bpf.c."""

    def __getitem__(self, name: str, /) -> Map: ...


@contextlib.contextmanager
def sampled(maps: _Named, one_in: int) -> Iterator[Choices]:
    """A balancer's choices, one in so many, while somebody reads them: its ring buffer has one reader at a time."""
    if one_in < 1:
        raise ValueError(f"one choice in {one_in} cannot be told: give 1 or more")
    with Ring(maps["choices"]) as ring:
        reader = Choices(ring, maps["slots"], maps["counts"])
        reader.read()  # what an earlier reader left
        maps["sampling"].update([0], [one_in])
        try:
            yield reader
        finally:
            maps["sampling"].update([0], [0])


def group_documents(
    members: Iterable[Member], owners: dict[int, list[Owner]], shares: dict[int, float | None]
) -> list[Document]:
    """Each "group": its members in the order of their places, and the processes that hold each of them.

    members : as Groups.members() gives them. shares : of CpuShares, by process id.
    """
    time_of_all = _Clock().now()
    return [
        {
            "event": "group", "time": time_of_all, "protocol": PROTOCOL_NAMES[found[0].protocol],
            "address": str(found[0].address), "port": found[0].port, "group": cookie, "number": found[0].number,
            "size": found[0].size, "room": found[0].room, "program": found[0].program or None,
            "classic": found[0].program == CLASSIC,
            "members": [
                {
                    "index": one.index, "cookie": one.cookie, "state": STATES[one.state], "queue": one.queue,
                    "limit": one.limit, "drops": one.drops, "cpu": one.cpu, "uid": one.uid,
                    "processes": [
                        {"pid": pid, "command": command, "cpu_percent": shares.get(pid)}
                        for pid, command in owners.get(one.inode, [])
                    ],
                }
                for one in found
            ],
        }
        for cookie, found in ((cookie, list(group)) for cookie, group in groupby(members, lambda one: one.group))
    ]  # fmt: skip


class CpuShares:
    """How much of a CPU processes use, from one look to the next (/proc/PID/stat, proc(5))."""

    def __init__(self) -> None:
        self._before: dict[tuple[int, int], tuple[float, float]] = {}

    def of(self, pids: Iterable[int]) -> dict[int, float | None]:
        """Percent of one CPU since the last look, all threads together; None for a process that was not looked at."""
        found: dict[int, float | None] = {}
        now: dict[tuple[int, int], tuple[float, float]] = {}
        for pid in pids:
            with contextlib.suppress(OSError):  # it has ended
                fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
                used, started = int(fields[11]) + int(fields[12]), int(fields[19])  # utime, stime, starttime
                now[pid, started] = used / os.sysconf("SC_CLK_TCK"), time.monotonic()
                before = self._before.get((pid, started))
                spent, at = now[pid, started]
                found[pid] = None if before is None else round(100 * (spent - before[0]) / (at - before[1]), 1)
        self._before = now
        return found


class _Clock:
    """The kernel's CLOCK_MONOTONIC as the time of day, as it was set when this was made."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def at(self, monotonic: int) -> str:
        """ISO 8601, in the local time zone, to the microsecond."""
        seconds, rest = divmod(monotonic + self._offset, 10**9)
        moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000)
        return moment.astimezone().isoformat(timespec="microseconds")

    def now(self) -> str:
        return self.at(time.monotonic_ns())


def _address(packed: Any) -> str:
    mapped = IPv6Address(packed.tobytes())
    return str(mapped.ipv4_mapped or mapped)


def _port(number: Any) -> int:
    return socket.ntohs(int(number))


def _state(number: Any) -> str:
    return STATES[number] if number < len(STATES) else str(number)
