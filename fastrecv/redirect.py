"""Redirect: the program in an interface that takes datagrams off it, before the stack, for AF_XDP sockets.

It is attached by a BPF link, which the kernel removes with its last descriptor: on whatever way a process ends, SIGKILL
too, the interface is without it. Between the two it takes only what it was asked for, and only where a socket receives
from the queue; everything else goes on to the stack. No other program is ever displaced: where one is attached, so is
not this.

libxdp's dispatcher would let several programs share an interface, each put into it as an extension
(BPF_PROG_TYPE_EXT). It is not used: its parts are pinned and outlive whoever attached them, so that a killed process
would leave a program behind; and there are kernels that load no extensions (one 6.18 answers EPERM to root, as it does
for fentry, when libxdp 1.3 falls back to a single program and refuses the second with EBUSY).
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable
from errno import EBUSY, EEXIST, EINVAL, EOPNOTSUPP, EPERM, ERANGE
from ipaddress import ip_address
from typing import Any

import numpy as np

from fastrecv.bpf import Link, packaged, program_info
from fastrecv.closing import Closing
from fastrecv.errors import BpfError, XdpError
from fastrecv.interfaces import Address, Interface

__all__ = ["CAPACITIES", "PASSED", "Redirect"]

_SKB_MODE, _DRV_MODE = 1 << 1, 1 << 2  # XDP_FLAGS_*, include/uapi/linux/if_link.h
_FLAGS = {"native": _DRV_MODE, "generic": _SKB_MODE}
CAPACITIES = {2048: 1792, 4096: 3840}
"""Bytes that a frame of these sizes holds, XDP_PACKET_HEADROOM less: include/uapi/linux/bpf.h."""
_ETHERNET = 18  # bytes of its header, with a tag
_HASH_ROOM = 1024  # addresses, at the least
_DISPATCHER = "xdp_dispatcher"  # libxdp's, by which several programs share an interface
_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291, 2.5.5.2

_OUTCOMES = (
    *("taken", "other_protocol", "other_host", "other_address", "other_port", "fragment", "options", "nested_vlan"),
    *("length", "header_sum", "no_checksum", "source", "too_long", "no_socket"),
)  # enum outcome, bpf/frame.h
PASSED = _OUTCOMES[1:]
"""Why a frame goes on to the stack; bpf/frame.h says what each means."""


class Redirect(Closing):
    """Which datagrams leave the stack of an interface: those for `ports` of its own addresses.

    interface : its name, in the calling thread's network namespace. ports : one, or several, UDP over IPv4 and IPv6.
    addresses : of the interface's, and of its VLANs' (802.1Q); all of them unless given. One that comes later counts
    from refresh() on. frame_size : memory of a frame, 2048 or 4096 bytes; by default what the MTU takes. What is longer
    than fits in there (CAPACITIES), or than the MTU as it is now, goes on to the stack.

    Loading takes CAP_BPF and CAP_NET_ADMIN. Linux 5.18 (bpf_xdp_get_buff_len). Nothing is taken before attach().
    """

    _link: Link | None = None
    _last: dict[str, int] | None = None  # outcomes at the end

    def __init__(
        self,
        interface: str,
        ports: int | Iterable[int],
        *,
        addresses: Iterable[str | Address] | None = None,
        frame_size: int | None = None,
    ) -> None:
        self.interface = Interface.named(interface)
        if len(self.interface.mac) != 6 or not any(self.interface.mac):
            raise XdpError(EOPNOTSUPP, f"interface {interface} has no Ethernet frames: AF_XDP takes nothing off it")
        self.ports = _ports(ports)
        self.frame_size = _frame_size(self.interface.mtu) if frame_size is None else frame_size
        if self.frame_size not in CAPACITIES:
            raise ValueError(f"frame_size is {frame_size!r}: give 2048 or 4096")
        self.mode = ""
        self._asked = None if addresses is None else _addresses(addresses)
        self._wanted = wanted = self._places()
        self._object = packaged("redirect")
        try:
            self._object.maps["sockets"].max_entries = self.interface.queues
            self._object.maps["places"].max_entries = max(_HASH_ROOM, 2 * len(wanted))
            # What is longer than the MTU may be a train that nobody has divided, as in generic mode: the stack knows.
            longest = min(CAPACITIES[self.frame_size], self.interface.mtu + _ETHERNET)
            self._object.set(capacity=longest)
            self._object.load()
            bits = np.zeros(65536, np.bool_)
            bits[list(self.ports)] = True
            words = np.packbits(bits, bitorder="little").view("<u8")
            self._object.maps["ports"].update(np.arange(len(words)), words)
            self._put(wanted)
        except BaseException:
            self._object.close()
            raise

    def put(self, queue: int, descriptor: int) -> None:
        """Let the AF_XDP socket have what is taken off this queue. When it is closed the kernel removes it."""
        try:
            self._object.maps["sockets"].update([queue], [descriptor])
        except BpfError as error:
            raise XdpError(error.errno, f"giving queue {queue} of {self.interface.name} a socket: {error}") from error

    def attach(self, mode: str = "auto") -> str:
        """Begin. mode : "native" (in the driver), "generic" (behind it, slower, for every driver), or "auto".

        Returns which of the two it has become. XdpError (EBUSY) where another XDP program is attached.
        """
        if mode not in {"auto", *_FLAGS}:
            raise ValueError(f"mode is {mode!r}: choose native, generic or auto")
        try:
            self._link = self._attached("native" if mode == "auto" else mode)
        except XdpError as error:
            if mode != "auto" or error.errno not in (EOPNOTSUPP, EINVAL, ERANGE):
                raise
            self._link = self._attached("generic")
            self.mode = "generic"
        else:
            self.mode = "native" if mode == "auto" else mode
        return self.mode

    def _attached(self, mode: str) -> Link:
        name = self.interface.name
        try:
            return self._object.programs["redirect"].attach_xdp(self.interface.index, _FLAGS[mode])
        except BpfError as error:
            if error.errno in (EBUSY, EEXIST):
                other, cure = self._other()
                raise XdpError(
                    EBUSY,
                    f"interface {name} has an XDP program already, {other}, and it stays: {cure}, or take a socket",
                ) from error
            why = {
                EOPNOTSUPP: "its driver has no native XDP: mode='generic' works with any",
                EINVAL: "its driver refuses XDP as it is set up: mode='generic' works with any",
                ERANGE: f"an MTU of {self.interface.mtu:,} is too large for native XDP: lower it, or mode='generic'",
                EPERM: "run as root, or with CAP_BPF and CAP_NET_ADMIN",
            }.get(error.errno or 0, str(error))
            raise XdpError(error.errno, f"attaching to interface {name} in {mode} mode: {why}") from error

    def _other(self) -> tuple[str, str]:
        """The program that is attached, by name where that may be read (CAP_SYS_ADMIN); and how to be rid of it."""
        name, number = self.interface.name, Interface.named(self.interface.name).program
        with contextlib.suppress(BpfError):
            if found := program_info(number):
                dispatcher = found.name == _DISPATCHER
                return f"{found.name} (id {number})", (
                    f"unload what libxdp has put there (xdp-loader unload {name} --all)" if dispatcher
                    else f"end who has attached it, or ip link set dev {name} xdp off"
                )  # fmt: skip
        return f"id {number}", f"see bpftool net, then ip link set dev {name} xdp off"

    def copies(self) -> dict[str, int]:
        """Descriptors for who goes on when this is closed: the link, the map of sockets, the map of outcomes.

        They are the caller's to close, the program stays attached as long as the link's is open, and what is taken is
        as it was.
        """
        assert self._link is not None, "attached"
        held = {"link": self._link, **{name: self._object.maps[name] for name in ("sockets", "outcomes")}}
        return {name: os.dup(one.fileno()) for name, one in held.items()}

    def refresh(self) -> None:
        """Look for addresses, VLANs and the Ethernet address anew; what was asked for stays."""
        self.interface = Interface.named(self.interface.name)
        self._wanted = wanted = self._places()
        places = self._object.maps["places"]
        before, _ = places.items()
        self._put(wanted)
        gone = [row for row in before if (row["address"].tobytes(), int(row["vlan"])) not in wanted]
        if gone:
            places.delete(np.array(gone, places.key_dtype))

    def _places(self) -> set[tuple[bytes, int]]:
        """(16 bytes of address, VLAN) of all that is taken. ValueError for an asked address that is not there."""
        here = self.interface.addresses()
        if self._asked is not None:
            there = {address for address, _ in here}
            if missing := self._asked - there:
                shown = ", ".join(sorted(str(address) for address in missing))
                raise ValueError(
                    f"{shown} not on interface {self.interface.name}: ip address add ... dev {self.interface.name}"
                )
            here = {(address, vlan) for address, vlan in here if address in self._asked}
        if not here:
            raise ValueError(f"interface {self.interface.name} has no address: give it one first, and set it up")
        return {(address.packed if address.version == 6 else _MAPPED + address.packed, vlan) for address, vlan in here}

    def _put(self, wanted: set[tuple[bytes, int]]) -> None:
        places = self._object.maps["places"]
        keys = np.zeros(len(wanted), places.key_dtype)
        for row, (address, vlan) in zip(keys, wanted, strict=True):
            row["address"], row["vlan"] = np.frombuffer(address, np.uint8), vlan
        self._object.set(device=np.frombuffer(self.interface.mac, "<u2"))
        places.update(keys, np.ones(len(keys), np.uint32))

    def outcomes(self) -> dict[str, int]:
        """What has become of all frames: "taken", and by reason those that went on to the stack (PASSED).

        Also readable when closed: as they were then.
        """
        if self._last is not None:
            return dict(self._last)
        rows = self._object.maps["outcomes"].lookup(np.arange(len(_OUTCOMES)))
        return dict(zip(_OUTCOMES, rows.sum(axis=1).tolist(), strict=True))

    @property
    def addresses(self) -> set[Address]:
        """For which datagrams are taken."""
        return {_address(packed) for packed, _ in self._wanted}

    @property
    def attached(self) -> bool:
        """Whether it is; not when the interface is gone."""
        return self._link is not None and self._link.info.ifindex != 0

    def close(self) -> None:
        """Detach: from now on the stack has everything."""
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._last is None:
            self._last = self.outcomes()
        self._object.close()

    def __del__(self) -> None:
        if self._link is not None:
            warnings.warn(f"unclosed Redirect on {self.interface.name}", ResourceWarning, source=self, stacklevel=2)
            self.close()


def _frame_size(mtu: int) -> int:
    return next((size for size, capacity in CAPACITIES.items() if mtu + _ETHERNET <= capacity), max(CAPACITIES))


def _address(packed: bytes) -> Address:
    return ip_address(packed.removeprefix(_MAPPED))


def _addresses(given: Iterable[str | Address]) -> set[Address]:
    if isinstance(given, str) or not isinstance(given, Iterable) or not (listed := list(given)):
        raise ValueError(f"addresses is {given!r}: give a list of one or several, None for all")
    return {ip_address(address) for address in listed}


def _ports(given: Any) -> frozenset[int]:
    ports = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes)) else [given]
    for port in ports:
        if not isinstance(port, (int, np.integer)) or isinstance(port, bool) or not 0 < port <= 65535:
            raise ValueError(f"the port is {port!r}: give numbers from 1 to 65535")
    if not ports:
        raise ValueError("no port: give one, or several")
    return frozenset(int(port) for port in ports)
