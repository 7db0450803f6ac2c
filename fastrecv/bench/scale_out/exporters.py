"""Exporters: thousands of addresses that send numbered flow records at a steady rate, from one process.

NetFlow v5 as routers send it: the header counts the exporter's flows (flow_sequence), and each record says whose it is
(srcaddr), its number among the exporter's (dOctets), and the phase in which it was sent (input): an even phase between
two changes of the routes, an odd one while a change is in flight. They take turns, so that how many datagrams were sent
says which. After every few datagrams an exporter goes on from another source port, as one does that is restarted, or is
behind a NAT.
"""

from __future__ import annotations

import contextlib
import mmap
import signal
import socket
import struct
import sys
import time
from ipaddress import IPv4Address

import numpy as np
from numpy.typing import NDArray

from fastrecv.bench.numbered import IP_PKTINFO, MAY_SEND, NUMBERED, PHASE, RATE, SENT, STOP, NumberedSource
from fastrecv.bench.scale_out.addresses import COLLECTOR, EXPORTERS, PORT
from fastrecv.netns import Namespace
from fastrecv.privileges import tell_parents_death

__all__ = ["DATAGRAM", "RECORDS", "ROUNDS", "Exporters", "filled", "numbered", "sent_by_each"]

RECORDS = 10
"""Of a datagram; the format allows 30."""
ROUNDS = 2
"""Datagrams of every exporter between two changes of routes, so that it is seen who has it."""
_PORTS = range(4242, 4246)
_STEADY = 8  # datagrams of an exporter from one port
_FIRST = int(IPv4Address(EXPORTERS))
_PAUSE = 0.0005  # seconds, while no more may be sent

# https://www.cisco.com/c/en/us/td/docs/net_mgmt/netflow_collection_engine/3-6/user/guide/format.html, tables B-3, B-4
_HEADER = struct.Struct(">HHIIIIBBH")
_RECORD = np.dtype({
    "names": ["sender", "phase", "packets", "number"],
    "formats": [">u4", ">u2", ">u4", ">u4"],
    "offsets": [0, 12, 16, 20],
    "itemsize": 48,
})  # fmt: skip
DATAGRAM = np.dtype([("header", f"V{_HEADER.size}"), ("records", _RECORD, (RECORDS,))])


def filled(number: int, exporter: int, phase: int) -> bytes:
    """An exporter's datagram. number : of its first record."""
    records = np.zeros(RECORDS, _RECORD)
    records["sender"], records["phase"], records["packets"] = _FIRST + exporter, phase, 1
    records["number"] = number + np.arange(RECORDS)
    return _HEADER.pack(5, RECORDS, 0, int(time.time()), 0, number, 0, 0, 0) + records.tobytes()


def numbered(datagrams: NDArray[np.void]) -> NDArray[np.void]:
    """The records of datagrams, (n,) of DATAGRAM, as rows of NUMBERED, (n * RECORDS,)."""
    records = datagrams["records"].reshape(-1)
    rows = np.empty(len(records), NUMBERED)
    rows["sender"] = records["sender"] - np.uint32(_FIRST)
    rows["number"], rows["phase"] = records["number"], records["phase"]
    return rows


def sent_by_each(exporters: int, datagrams: int) -> NDArray[np.int64]:
    """How many records each has sent, (exporters,), when all together have sent so many datagrams."""
    turns, more = divmod(datagrams, exporters)
    return RECORDS * (turns + (np.arange(exporters) < more))


class Exporters(NumberedSource):
    """The process, in a namespace of exporters; a context manager. It sends as much as `allow` and `pace` let it."""

    module = __name__

    def __init__(self, namespace: Namespace, exporters: int) -> None:
        super().__init__(namespace, exporters, COLLECTOR, PORT, limit=1)

    @staticmethod
    def may_send_to(address: str) -> bool:
        return address == COLLECTOR

    def pace(self, rate: int) -> None:
        """From now on so many datagrams a second, at most; 0: as many as `allow` says."""
        self._words[RATE] = rate


class _Pace:
    """How many datagrams may have been sent by now."""

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._rate, self._since, self._before = 0, 0.0, 0

    def may_send(self, sent: int) -> bool:
        rate = self._words[RATE]
        if rate != self._rate:
            self._rate, self._since, self._before = rate, time.monotonic(), sent
        due = not rate or sent - self._before < rate * (time.monotonic() - self._since)
        return due and sent < self._words[MAY_SEND]


def _control(number: int) -> list[tuple[int, int, bytes]]:
    """The source address of one datagram: struct in_pktinfo (ip(7), IP_PKTINFO)."""
    return [(socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=I4s4s", 0, IPv4Address(_FIRST + number).packed, bytes(4)))]


def _send(fd: int, exporters: int, address: str, port: int) -> None:
    words = memoryview(mmap.mmap(fd, mmap.PAGESIZE)).cast("Q")
    pace, to, sent = _Pace(words), (address, port), 0
    sources = [_control(number) for number in range(exporters)]
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in _PORTS]
        for sock, own in zip(socks, _PORTS, strict=True):
            sock.bind(("", own))
        while not words[STOP]:
            turn, exporter = divmod(sent, exporters)
            if not pace.may_send(sent):
                time.sleep(_PAUSE)
                continue
            sock = socks[(turn // _STEADY + exporter) % len(socks)]
            sock.sendmsg([filled(turn * RECORDS, exporter, words[PHASE])], sources[exporter], 0, to)
            sent += 1
            words[SENT] = sent


if __name__ == "__main__":
    tell_parents_death(signal.SIGKILL)
    _send(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
