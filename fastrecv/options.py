"""What a Receiver may be asked for, and the socket options behind it: set if asked for, read back in any case."""

from __future__ import annotations

import socket
from typing import NamedTuple, TypedDict

from fastrecv.errors import NotSupported

__all__ = ["FAMILIES", "Features", "Options", "apply", "columns_of", "refuse_unknown", "reports_errors"]

_OF_BIND = ("reuse_port", "dual_stack", "receive_buffer", "busy_poll", "prefer_busy_poll", "busy_poll_budget",
            "incoming_cpu")  # fmt: skip


class Features(TypedDict, total=False):
    """What the kernel may tell with each datagram; off unless asked for.

    timestamps : when the kernel took it (SO_TIMESTAMPNS; Linux 5.1).
    hardware_timestamps : when the network card did, where the device was told to (SO_TIMESTAMPING; Linux 5.1).
    destinations : the address it was sent to, and the interface it came in by (IP_PKTINFO).
    destination_ports : the port, too (IP_RECVORIGDSTADDR), for services behind any-port steering.
    tos : type of service or traffic class, and with it ECN.
    drops : how many datagrams the socket's full queue has cost (SO_RXQ_OVFL).
    gro : let the kernel coalesce datagrams of one flow and size, which are split again here (UDP_GRO; Linux 5.0).

    Each costs a control message a datagram, `gro` one a train. What the socket has switched on already is read back,
    and comes whether asked for or not.
    """

    timestamps: bool
    hardware_timestamps: bool
    destinations: bool
    destination_ports: bool
    tos: bool
    drops: bool
    gro: bool


class Options(Features, total=False):
    """All that a Receiver may be asked for: see Receiver and Features."""

    batch_size: int
    slot_size: int
    arenas: int
    max_arenas: int


class _Setting(NamedTuple):
    """One socket option behind an option of ours. value 0: only looked at, never set."""

    option: str
    level: int
    name: int
    value: int
    space: int  # bytes of its control message
    families: tuple[int, ...]
    requires: str = "Linux 2.6"


_UNIX, _IP4, _IP6 = (socket.AF_UNIX,), (socket.AF_INET,), (socket.AF_INET6,)
_IP = _IP4 + _IP6
FAMILIES = _IP + _UNIX
# SOF_TIMESTAMPING_*, include/uapi/linux/net_tstamp.h
_RX_HARDWARE = 1 << 2 | 1 << 6  # RX_HARDWARE | RAW_HARDWARE
_TX = 1 << 0 | 1 << 1 | 1 << 8 | 1 << 9  # TX_HARDWARE | TX_SOFTWARE | TX_SCHED | TX_ACK

# Numbers from include/uapi: asm-generic/socket.h, linux/in.h, linux/in6.h, linux/udp.h.
_SETTINGS = (
    _Setting("timestamps", socket.SOL_SOCKET, 64, 1, 16, FAMILIES, "Linux 5.1"),  # SO_TIMESTAMPNS_NEW
    _Setting("timestamps", socket.SOL_SOCKET, 35, 0, 16, FAMILIES),  # SO_TIMESTAMPNS_OLD
    _Setting("hardware_timestamps", socket.SOL_SOCKET, 65, _RX_HARDWARE, 48, _IP, "Linux 5.1"),  # SO_TIMESTAMPING_NEW
    _Setting("hardware_timestamps", socket.SOL_SOCKET, 37, 0, 48, _IP),  # SO_TIMESTAMPING_OLD
    _Setting("drops", socket.SOL_SOCKET, 40, 1, 4, _IP),  # SO_RXQ_OVFL
    _Setting("destinations", socket.IPPROTO_IP, 8, 1, 12, _IP),  # IP_PKTINFO; on IPv6 it names what answers a group
    _Setting("destinations", socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1, 20, _IP6),
    _Setting("destination_ports", socket.IPPROTO_IP, 20, 1, 16, _IP),  # IP_RECVORIGDSTADDR
    _Setting("destination_ports", socket.IPPROTO_IPV6, 74, 1, 28, _IP6, "Linux 2.6.37"),  # IPV6_RECVORIGDSTADDR
    _Setting("tos", socket.IPPROTO_IP, socket.IP_RECVTOS, 1, 1, _IP),
    _Setting("tos", socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1, 4, _IP6),
    _Setting("gro", socket.IPPROTO_UDP, 104, 1, 4, _IP, "Linux 5.0"),  # UDP_GRO
    # Not ours, but where they are on their messages need room beside ours.
    _Setting("", socket.SOL_SOCKET, 29, 0, 16, FAMILIES),  # SO_TIMESTAMP_OLD
    _Setting("", socket.SOL_SOCKET, 63, 0, 16, FAMILIES),  # SO_TIMESTAMP_NEW
    _Setting("", socket.SOL_SOCKET, 75, 0, 4, FAMILIES),  # SO_RCVMARK
    _Setting("", socket.SOL_SOCKET, 82, 0, 4, FAMILIES),  # SO_RCVPRIORITY
    _Setting("", socket.SOL_SOCKET, socket.SO_PASSCRED, 0, 12, _UNIX),
    _Setting("", socket.IPPROTO_IP, 12, 0, 4, _IP),  # IP_RECVTTL
    _Setting("", socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 0, 4, _IP6),
)
_COLUMNS = {"timestamps": 2, "hardware_timestamps": 4, "destinations": 8, "destination_ports": 8, "tos": 16}  # Column


def apply(sock: socket.socket, asked: set[str]) -> tuple[set[str], int]:
    """Set what is asked for and read back what is on: the options, and the bytes of control messages."""
    on, room = set(), 0
    for setting in _SETTINGS:
        wanted = setting.option in asked and setting.value
        if sock.family not in setting.families:
            continue
        try:
            value = sock.getsockopt(setting.level, setting.name)
            if wanted:
                sock.setsockopt(setting.level, setting.name, value | setting.value)
                value = sock.getsockopt(setting.level, setting.name)
        except OSError as error:
            if wanted:
                raise NotSupported(setting.option, setting.requires, error.errno or 0, error.strerror or "") from error
            continue
        if value:
            if setting.option != "hardware_timestamps" or value & _RX_HARDWARE:
                on.add(setting.option)
            room += socket.CMSG_SPACE(setting.space)
    on.discard("")
    if missing := sorted(asked - on):
        family = socket.AddressFamily(sock.family).name
        raise ValueError(f"{', '.join(missing)} cannot be had of a socket of family {family}")
    return on, room


def columns_of(on: set[str]) -> int:
    """Which of the arena's columns these features fill."""
    columns = 0
    for feature in on:
        columns |= _COLUMNS.get(feature, 0)
    return columns


def refuse_unknown(features: Features) -> None:
    for name, value in features.items():
        if name in _OF_BIND:
            raise TypeError(f"{name} is for Receiver.bind, which opens the socket; fastrecv.sockets sets it on yours")
        if name not in Features.__annotations__:
            known = ", ".join([*Options.__annotations__, *_OF_BIND])
            raise TypeError(f"no option {name!r}: choose from {known}")
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}: give True or False")


def reports_errors(sock: socket.socket) -> bool:
    """Whether IP_RECVERR is on, and the error queue is there for nothing else (transmit timestamps, zero copy)."""
    level, name = (socket.IPPROTO_IPV6, 25) if sock.family == socket.AF_INET6 else (socket.IPPROTO_IP, 11)
    if sock.family == socket.AF_UNIX or not sock.getsockopt(level, name):
        return False
    sending = sock.getsockopt(socket.SOL_SOCKET, 37) & _TX  # SO_TIMESTAMPING
    return not sending and not sock.getsockopt(socket.SOL_SOCKET, 60)  # SO_ZEROCOPY
