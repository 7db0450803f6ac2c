"""What a supervised service may be told: one record, whose names the command line has, too."""

from __future__ import annotations

import grp
import math
import os
import pwd
from ipaddress import ip_address
from typing import Literal, NamedTuple

import msgspec

from fastrecv._recv import MAX_BATCH
from fastrecv.policies import Policy

__all__ = ["MAX_WORKERS", "Identity", "Settings", "Task", "identity", "is_tcp", "parsed"]

MAX_WORKERS = 128
"""As many as a balancer has slots (bpf/balance.h)."""
_MAX_BUFFER = (1 << 30) - 1  # INT_MAX / 2: the kernel doubles it
_NO_ID = (1 << 32) - 1  # setresuid(2) takes it for none


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a service is to be. ValueError for what cannot be.

    handler : "package.module:name" (fastrecv.workers.handlers). bind : ADDRESS:PORT, numeric, [ADDRESS]:PORT for IPv6;
    after "tcp:" for connections; None takes the sockets that systemd passes. workers : None: as many as systemd passes
    sockets, else 1.
    policy : whose datagrams stay with one worker (Policy.parse). user, group : names or numbers that workers become;
    None: they stay who the supervisor is. timeout : seconds without a sign of life until a worker is killed; 0: never.
    graceful_timeout : seconds to stop in, until it is killed. batch_size : datagrams of a batch at most.
    receive_buffer : bytes, of each socket (SO_RCVBUF, socket(7)); None leaves it to the kernel. on_error : whether a
    worker whose handler raises an exception goes on. given_up : whether the senders of a worker that dies at once again
    and again move to the others, or wait for a rolling restart.
    """

    handler: str
    bind: str | None = None
    workers: int | None = None
    policy: str = "source"
    user: str | None = None
    group: str | None = None
    timeout: float = 30.0
    graceful_timeout: float = 30.0
    batch_size: int = 64
    receive_buffer: int | None = None
    on_error: Literal["continue", "exit"] = "continue"
    given_up: Literal["move", "wait"] = "move"

    def __post_init__(self) -> None:
        if self.bind is not None:
            parsed(self.bind)
        Policy.parse(self.policy)
        _within("workers", self.workers, 1, MAX_WORKERS)
        _within("batch_size", self.batch_size, 1, MAX_BATCH)
        _within("receive_buffer", self.receive_buffer, 1, _MAX_BUFFER)
        for name, value in (("timeout", self.timeout), ("graceful_timeout", self.graceful_timeout)):
            if not (math.isfinite(value) and 0 <= value <= 86400):
                raise ValueError(f"{name} is {value}: give 0 to 86400 seconds")


class Identity(NamedTuple):
    """Whom a worker becomes; None stays as it is."""

    user: int | None
    group: int | None
    groups: list[int]


class Task(msgspec.Struct, frozen=True):
    """What a fresh worker is told first. counters, socket : descriptors that it has inherited."""

    settings: Settings
    slot: int
    counters: int
    socket: int
    identity: Identity


def _within(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name} is {value}: give {low:,} to {high:,}")


def is_tcp(bind: str) -> bool:
    """Whether connections are wanted: "tcp:" stands before the address."""
    return bind.startswith("tcp:")


def parsed(bind: str) -> tuple[str, int]:
    """Host and port of ADDRESS:PORT or [ADDRESS]:PORT, perhaps after "udp:" or "tcp:". ValueError."""
    host, _, port = bind.removeprefix("tcp:" if is_tcp(bind) else "udp:").rpartition(":")
    six = host.startswith("[") and host.endswith("]")
    try:
        fits = ip_address(host[1:-1] if six else host).version == (6 if six else 4)
    except ValueError:
        fits = False
    if not fits or not (port.isascii() and port.isdecimal() and 1 <= int(port[:6]) <= 65535):
        raise ValueError(
            f"{bind!r} is no address to bind to: give ADDRESS:PORT, like 0.0.0.0:2055, or [ADDRESS]:PORT, "
            "with tcp: before it for connections"
        )
    return host.strip("[]"), int(port)


def identity(user: str | None, group: str | None) -> Identity:
    """Whom the workers of these settings become. ValueError for a user or a group that does not exist."""
    if user is None:
        return Identity(None, None, []) if group is None else Identity(None, _group(group), [_group(group)])
    entry: pwd.struct_passwd | None = None
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except (KeyError, OverflowError):
        if not user.isdecimal() or int(user[:11]) >= _NO_ID:
            raise ValueError(f"there is no user {user!r}") from None
    if entry is None:  # a number without a name
        if group is None:
            raise ValueError(f"user {user} has no entry that names its group: give the group, too")
        return Identity(int(user), _group(group), [_group(group)])
    own = entry.pw_gid if group is None else _group(group)
    return Identity(entry.pw_uid, own, sorted(os.getgrouplist(entry.pw_name, own)))


def _group(group: str) -> int:
    if group.isdecimal() and int(group[:11]) < _NO_ID:
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ValueError(f"there is no group {group!r}") from None
