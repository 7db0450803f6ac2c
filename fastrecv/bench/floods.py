"""The four floods of the cover letter: what each frame looks like, which socket takes it, which counter shows it.

One source address, many source ports, one destination: zero-length UDP datagrams for a socket whose filter drops
everything, or TCP SYNs for a listener that never accepts and answers each with a SYN cookie. A flood can be spread,
too: every source then has an address of its own, and a payload, and there are many destinations.
"""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from errno import EINTR
from ipaddress import ip_address
from typing import Self

import numpy as np

from fastrecv.bench.lab import (
    FAR_IP4,
    FAR_IP6,
    HOST_IP4,
    HOST_IP6,
    MANY_FAR_IP4,
    MANY_FAR_IP6,
    MANY_HOST_IP4,
    MANY_HOST_IP6,
    Lab,
)
from fastrecv.bpf import Object, packaged
from fastrecv.closing import Closing
from fastrecv.errors import BpfError
from fastrecv.policies import Sender
from fastrecv.sockets import drop_everything

__all__ = [
    "BURST",
    "DESTINATIONS",
    "FIRST_SOURCE_PORT",
    "FLOODS",
    "MAX_SOURCES",
    "PORT",
    "XDP_DROP",
    "XDP_PASS",
    "XDP_TX",
    "Counter",
    "Flood",
    "Source",
    "open_sink",
]

PORT = 9  # discard; the letter's port is not named
FIRST_SOURCE_PORT = 1024
MAX_SOURCES = 65536 - FIRST_SOURCE_PORT
DESTINATIONS = 256  # of a spread flood
BURST = 64  # frames that a paced flood sends at once: BURST of flood.bpf.c, the batch_size of run_live

XDP_DROP, XDP_PASS, XDP_TX = 1, 2, 3  # enum xdp_action, include/uapi/linux/bpf.h

_ETHERTYPES = {socket.AF_INET: 0x0800, socket.AF_INET6: 0x86DD}
_HOST = {socket.AF_INET: HOST_IP4, socket.AF_INET6: HOST_IP6}
_FAR = {socket.AF_INET: FAR_IP4, socket.AF_INET6: FAR_IP6}
_MANY_HOST = {socket.AF_INET: MANY_HOST_IP4, socket.AF_INET6: MANY_HOST_IP6}
_MANY_FAR = {socket.AF_INET: MANY_FAR_IP4, socket.AF_INET6: MANY_FAR_IP6}
_ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # noqa: S104 - of a private namespace
_ETHERNET = 14  # bytes of its header


@dataclass(frozen=True)
class Flood:
    """One flood.

    counter : (file below /proc/net, row, name) of what counts every packet that got to the end. port : where it goes.
    payload : what every frame carries, up to 3,000 bytes: a live frame is one page, less what the kernel keeps there.
    spread : sources differ in address and in the first two bytes of their payload as well, and there are DESTINATIONS:
    see `sender`. Its lab must be open_to_many().
    """

    name: str
    title: str
    family: socket.AddressFamily
    protocol: int
    counter: tuple[str, str, str]
    symbol: str  # the lookup function whose CPU share the letter gives
    port: int = PORT
    payload: bytes = b""
    spread: bool = False

    @property
    def destination(self) -> str:
        """The first one of a spread flood."""
        return (_MANY_HOST if self.spread else _HOST)[self.family]

    @property
    def bound(self) -> str:
        """Where the sink listens: at the destination, or at any."""
        return _ANY[self.family] if self.spread else self.destination

    @property
    def source(self) -> str:
        """Of a spread flood with its last 16 bits 0."""
        return (_MANY_FAR if self.spread else _FAR)[self.family]

    def sender(self, number: int) -> Sender:
        """One of the sources, from 0, as a policy sees its packets."""
        port = FIRST_SOURCE_PORT + number
        source, destination, payload = ip_address(self.source), ip_address(self.destination), self.payload
        if self.spread:
            source, destination = source + port, destination + number % DESTINATIONS
            payload = struct.pack("!H", port) + payload[2:] if payload else b""
        return Sender(source, port, destination, self.port, payload)

    def transport(self) -> tuple[bytes, int]:
        """The transport header and the payload, with 0 for what is a source's own; the offset of the checksum."""
        payload = bytes(2) + self.payload[2:] if self.spread and self.payload else self.payload
        if self.protocol == socket.IPPROTO_UDP:
            return struct.pack("!HHHH", 0, self.port, 8 + len(payload), 0) + payload, 6  # RFC 768
        flags, window = 5 << 12 | 0x002, 64240  # header of 5 words, SYN
        return struct.pack("!HHIIHHHH", 0, self.port, 1, 0, flags, window, 0, 0) + payload, 16  # RFC 9293

    def frame(self, lab: Lab) -> tuple[bytes, int, int, int]:
        """An Ethernet frame for the host; the offsets of its source port and checksum; what the checksum covers.

        The last is the one's complement sum of the pseudo header, the transport header and the payload (RFC 1071), in
        this machine's byte order, with source port and checksum taken as 0.
        """
        segment, checksum = self.transport()
        source, destination = ip_address(self.source).packed, ip_address(self.destination).packed
        if self.family == socket.AF_INET:
            without = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(segment), 0, 0, 64, self.protocol, 0,
                                  source, destination)  # fmt: skip
            complement = ~_sum(without) & 0xFFFF
            network = without[:10] + struct.pack("=H", complement) + without[12:]
        else:
            network = struct.pack("!IHBB16s16s", 6 << 28, len(segment), self.protocol, 64, source, destination)
        pseudo = source + destination + struct.pack("!II", len(segment), self.protocol)
        ethernet = lab.host_mac + lab.far_mac + struct.pack("!H", _ETHERTYPES[self.family])
        start = len(ethernet) + len(network)
        return ethernet + network + segment, start, start + checksum, _sum(pseudo + segment)

    def spreading(self, lab: Lab) -> dict[str, int]:
        """The constants of flood.bpf.c that make it spread."""
        if not self.spread:
            return {}
        frame, start, *_ = self.frame(lab)
        found = {"spread": 1, "destinations": DESTINATIONS, "payload_offset": start + 8 if self.payload else 0}
        if self.family == socket.AF_INET6:
            return found | {"source_offset": _ETHERNET + 22, "destination_offset": _ETHERNET + 38}  # RFC 8200
        header = frame[_ETHERNET:start]
        return found | {
            "source_offset": _ETHERNET + 14, "destination_offset": _ETHERNET + 18, "header_offset": _ETHERNET + 10,
            "header_sum": _sum(header[:10] + bytes(2) + header[12:]),
        }  # RFC 791 # fmt: skip


_LOOKUP = {"udp4": "__udp4_lib_lookup", "udp6": "__udp6_lib_lookup",
           "syn4": "__inet_lookup_listener", "syn6": "inet6_lookup_listener"}  # fmt: skip
_COOKIES = ("netstat", "TcpExt", "SyncookiesSent")

FLOODS = {
    flood.name: flood
    for flood in (
        Flood("udp4", "UDP, IPv4, zero length", socket.AF_INET, socket.IPPROTO_UDP,
              ("snmp", "Udp", "InErrors"), _LOOKUP["udp4"]),
        Flood("udp6", "UDP, IPv6, zero length", socket.AF_INET6, socket.IPPROTO_UDP,
              ("snmp6", "", "Udp6InErrors"), _LOOKUP["udp6"]),
        Flood("syn4", "TCP SYN, IPv4", socket.AF_INET, socket.IPPROTO_TCP, _COOKIES, _LOOKUP["syn4"]),
        Flood("syn6", "TCP SYN, IPv6", socket.AF_INET6, socket.IPPROTO_TCP, _COOKIES, _LOOKUP["syn6"]),
    )
}  # fmt: skip


def _sum(data: bytes) -> int:
    """The one's complement sum of 16-bit words in this machine's order, folded (RFC 1071: any order will do)."""
    total = int(np.frombuffer(data + bytes(len(data) % 2), np.uint16).sum(dtype=np.uint64))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@contextlib.contextmanager
def open_sink(flood: Flood, lab: Lab) -> Iterator[socket.socket]:
    """The socket under flood: it drops every datagram, or it listens and never accepts."""
    kind = socket.SOCK_DGRAM if flood.protocol == socket.IPPROTO_UDP else socket.SOCK_STREAM
    with lab.host:
        sink = socket.socket(flood.family, kind)
    with sink:
        sink.bind((flood.bound, flood.port))
        if kind == socket.SOCK_DGRAM:
            drop_everything(sink)
        else:
            sink.listen(1)
        yield sink


class Source(Closing):
    """The traffic source of one flood: the program flood.bpf.c with the flood's frame. A context manager.

    paced : frames leave when they are due, at the rate of `offer`. Attributes: flood.
    """

    def __init__(self, flood: Flood, lab: Lab, sources: int, *, paced: bool = False) -> None:
        self.flood, self._lab = flood, lab
        self._frame, port_offset, checksum_offset, self._partial_sum = flood.frame(lab)
        self._object: Object = packaged("flood")
        self._object.set(
            sources=sources,
            first_port=FIRST_SOURCE_PORT,
            port_offset=port_offset,
            checksum_offset=checksum_offset,
            partial_sum=self._partial_sum,
            paced=int(paced),
            **flood.spreading(lab),
        )
        self._program = self._object.load().programs["flood"]

    def aimed(self, port: int) -> Self:
        """The same program, with frames for another port. It ends with this one."""
        other = copy.copy(self)
        other.flood = replace(self.flood, port=port)
        other._frame, _, _, other._partial_sum = other.flood.frame(self._lab)
        return other

    @property
    def frames(self) -> int:
        """Frames that the program itself has counted."""
        return int(self._object.get("frames"))

    def send(self, verdict: int, packets: int) -> int:
        """Send `packets` frames; the calling thread must be in the namespace where they are to start.

        XDP_PASS, XDP_DROP: in the host's namespace, as if arriving on host0. XDP_TX: in the far one, out of far0.
        Returns the mean ns a frame took, by the kernel's clock.
        """
        while True:
            time = self._run(verdict, packets)
            if time is not None:
                return time

    def deliver(self, packets: int) -> int:
        """Send exactly `packets` frames into the host's stack, in its namespace; how many, by the program's own count.

        Where `send` begins again after an interruption, this sends the rest.
        """
        before = self.frames
        while (left := packets - (self.frames - before)) > 0:
            self._run(XDP_PASS, left)
        return self.frames - before

    def offer(self, packets: int, rate: float) -> tuple[int, float]:
        """Send so many frames out of far0 (XDP_TX), in its namespace, in bursts of BURST, `rate` frames a second.

        The source must be paced. One that cannot keep up sends as fast as it can; what held it up it does not make up
        for. packets : two bursts at least.

        Returns how many were sent, by the program's own count, and the mean ns from one to the next, by its clock: the
        kernel's `duration` leaves out when another task had the source's CPU, though a reader goes on meanwhile.
        """
        before = self.frames
        self._object.set(gap=round(BURST * 1e9 / rate), due=0)
        self.send(XDP_TX, packets)
        sent = self.frames - before
        return sent, int(self._object.get("latest") - self._object.get("began")) / (sent - BURST)

    def _run(self, verdict: int, packets: int) -> int | None:
        """One call into the kernel. None when it was interrupted: what was sent is in `frames`, the time is lost."""
        self._object.set(verdict=verdict, partial_sum=self._partial_sum)
        ifindex = self._lab.far_index if verdict == XDP_TX else self._lab.host_index
        try:
            return self._program.run_live(self._frame, ifindex, packets)
        except BpfError as error:
            if error.errno != EINTR:  # else: stopped and continued
                raise
            return None

    def close(self) -> None:
        self._object.close()


class Counter(Closing):
    """One counter of the host's stack, read over /proc/net: the file stays open, and with it the namespace."""

    def __init__(self, lab: Lab, counter: tuple[str, str, str]) -> None:
        name, row, column = counter
        with lab.host:
            self._fd = os.open(f"/proc/thread-self/net/{name}", os.O_RDONLY)
        self._row, self._column = row.encode(), column.encode()

    def read(self) -> int:
        lines = os.pread(self._fd, 1 << 16, 0).splitlines()
        if not self._row:  # "name value"
            return next(int(value) for name, value in map(bytes.split, lines) if name == self._column)
        names, values = (line.split() for line in lines if line.startswith(self._row + b":"))
        return int(values[names.index(self._column)])

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
