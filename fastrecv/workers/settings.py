"""What a supervised service may be told: one record, whose names command line, environment and files have, too."""

from __future__ import annotations

import grp
import math
import os
import pwd
from collections.abc import Callable
from ipaddress import ip_address
from typing import Literal, NamedTuple, TypeVar

import msgspec

from fastrecv._recv import MAX_BATCH
from fastrecv.policies import Policy
from fastrecv.workers.attributes import Attributes, allowed, limit, listed
from fastrecv.workers.logs import LogFormat

__all__ = [
    "MAX_WORKERS",
    "Identity",
    "Queues",
    "SettingError",
    "Settings",
    "Task",
    "attributes",
    "identity",
    "is_tcp",
    "parsed",
]

MAX_WORKERS = 128
"""As many as a balancer has slots (bpf/balance.h)."""
_MAX_BUFFER = (1 << 30) - 1  # INT_MAX / 2: the kernel doubles it
_LONGEST_PATH = 107  # sizeof(sun_path) - 1, unix(7)
_NO_ID = (1 << 32) - 1  # setresuid(2) takes it for none
_Read = TypeVar("_Read")


class SettingError(ValueError):
    """A setting cannot be what it is.

    Attributes: name, the setting's, or "limits." and a limit's; reason, which says what it can be.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """What a service is to be. SettingError for what cannot be.

    handler : "package.module:name" (fastrecv.workers.handlers). bind : ADDRESS:PORT, numeric, [ADDRESS]:PORT for IPv6;
    after "tcp:" for connections; None takes the sockets that systemd passes. backend : what datagrams come by, the
    sockets alone, or AF_XDP before them; "auto" lets the interface, the privileges and the other settings decide
    (fastrecv.workers.taking). workers : None: as many as systemd passes sockets, else 1.
    policy : whose datagrams stay with one worker (Policy.parse). user, group : names or numbers that workers become;
    None: they stay who the supervisor is. timeout : seconds without a sign of life until a worker is killed; 0: never.
    graceful_timeout : seconds to stop in, until it is killed. batch_size : datagrams of a batch at most.
    receive_buffer : bytes, of each socket (SO_RCVBUF, socket(7)); None leaves it to the kernel. on_error : whether a
    worker whose handler raises an exception goes on. given_up : whether the senders of a worker that dies at once again
    and again move to the others, or wait for a rolling restart. cpus : of workers, like "0-3,6": that of slot i gets
    the i-th, round and round; None: those of the supervisor. nice : of workers (setpriority(2)), -20 to 19; below the
    supervisor's it takes CAP_SYS_NICE. limits : of workers, soft and hard, by the names of setrlimit(2) in lower case:
    {"nofile": 1024, "as": "1G", "core": "unlimited"}; above the hard ones it takes CAP_SYS_RESOURCE. log_format : of
    standard error, lines for people or a JSON object a line (fastrecv.workers.logs). control : path of the control
    socket; None: see fastrecv.workers.control.default_path. metrics : ADDRESS:PORT of the HTTP endpoint; None: there is
    none.
    """

    handler: str
    bind: str | None = None
    backend: Literal["auto", "socket", "xdp"] = "socket"
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
    cpus: str | None = None
    nice: int | None = None
    limits: dict[str, int | str] = {}
    log_format: LogFormat = "text"
    control: str | None = None
    metrics: str | None = None

    def __post_init__(self) -> None:
        if not all(part.isidentifier() for half in _halves(self.handler) for part in half.split(".")):
            raise SettingError("handler", f"{self.handler!r} names no handler: give package.module:name")
        for name, address in (("bind", self.bind), ("metrics", self.metrics)):
            if address is not None:
                _read(name, parsed, address)
        if self.control is not None and not 0 < len(os.fsencode(self.control)) <= _LONGEST_PATH:
            raise SettingError("control", f"{self.control!r} is no path of 1 to {_LONGEST_PATH} bytes")
        _read("policy", Policy.parse, self.policy)
        if self.cpus is not None:
            _read("cpus", listed, self.cpus)
        _within("nice", self.nice, -20, 19)
        _limits(self.limits)
        _within("workers", self.workers, 1, MAX_WORKERS)
        _within("batch_size", self.batch_size, 1, MAX_BATCH)
        _within("receive_buffer", self.receive_buffer, 1, _MAX_BUFFER)
        for name, value in (("timeout", self.timeout), ("graceful_timeout", self.graceful_timeout)):
            if not (math.isfinite(value) and 0 <= value <= 86400):
                raise SettingError(name, f"{value} is out of range: give 0 to 86400 seconds")
        if self.backend == "xdp" and (why := without_xdp(self)):
            raise SettingError(*why)


def without_xdp(settings: Settings) -> tuple[str, str] | None:
    """Which setting AF_XDP cannot do with, and why not; None where all of them will do."""
    if settings.bind is None or is_tcp(settings.bind):
        return "backend", "AF_XDP takes datagrams for an address of an interface: give bind one, or choose socket"
    host, _ = parsed(settings.bind)
    if ip_address(host).is_unspecified:
        return "bind", f"AF_XDP is of one interface: give an address of it, not {host}, or choose the backend socket"
    if settings.workers not in (None, 1) and Policy.parse(settings.policy).key != "queue":
        return "policy", (
            "with AF_XDP the queues of the interface decide which worker gets a sender: give queue, or one worker"
        )
    return None


class Identity(NamedTuple):
    """Whom a worker becomes; None stays as it is."""

    user: int | None
    group: int | None
    groups: list[int]


class Queues(msgspec.Struct, frozen=True):
    """What a worker takes off an interface by AF_XDP.

    numbers : of the queues. zero_copy : whether the card writes into the worker's memory. frame_size : bytes. sockets :
    descriptor of the map by which the program in the interface finds the sockets of queues.
    """

    interface: str
    numbers: list[int]
    zero_copy: bool
    frame_size: int
    sockets: int


class Task(msgspec.Struct, frozen=True):
    """What a fresh worker is told first.

    counters, socket, snapshots : descriptors that it has inherited. own : whether the socket's queue ends with the
    service. queues : None: it has its socket alone.
    """

    settings: Settings
    slot: int
    counters: int
    socket: int
    own: bool
    snapshots: int
    identity: Identity
    attributes: Attributes
    queues: Queues | None = None

    def descriptors(self) -> list[int]:
        """All that it inherits."""
        return [self.counters, self.socket, self.snapshots, *([] if self.queues is None else [self.queues.sockets])]


def _halves(handler: str) -> list[str]:
    """Module and name; something that is neither where there are not two."""
    halves = handler.split(":")
    return halves if len(halves) == 2 else [""]


def _within(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise SettingError(name, f"{value} is out of range: give {low:,} to {high:,}")


def _read(name: str, reader: Callable[..., _Read], *words: object) -> _Read:
    """What is made of the words of a setting; SettingError for the reader's ValueError."""
    try:
        return reader(*words)
    except ValueError as error:
        raise SettingError(name, str(error)) from None


def _limits(limits: dict[str, int | str]) -> dict[int, int]:
    return dict(_read(f"limits.{name}", limit, name, value) for name, value in limits.items())


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


def attributes(settings: Settings) -> Attributes:
    """Those of the workers of these settings. SettingError for a CPU that this process may not run on."""
    cpus = [] if settings.cpus is None else _read("cpus", allowed, settings.cpus)
    return Attributes(cpus, settings.nice, _limits(settings.limits))


def identity(user: str | None, group: str | None) -> Identity:
    """Whom the workers of these settings become. SettingError for a user or a group that does not exist."""
    if user is None:
        return Identity(None, None, []) if group is None else Identity(None, _group(group), [_group(group)])
    entry: pwd.struct_passwd | None = None
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except (KeyError, OverflowError):
        if not user.isdecimal() or int(user[:11]) >= _NO_ID:
            raise SettingError("user", f"there is no user {user!r}") from None
    if entry is None:  # a number without a name
        if group is None:
            raise SettingError("user", f"user {user} has no entry that names its group: give the group, too")
        return Identity(int(user), _group(group), [_group(group)])
    own = entry.pw_gid if group is None else _group(group)
    return Identity(entry.pw_uid, own, sorted(os.getgrouplist(entry.pw_name, own)))


def _group(group: str) -> int:
    if group.isdecimal() and int(group[:11]) < _NO_ID:
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise SettingError("group", f"there is no group {group!r}") from None
