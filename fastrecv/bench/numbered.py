"""Numbered datagrams from thousands of senders, as fast as one process sends, so that each can be accounted for.

Every datagram says whose it is, its number among the sender's, and the phase in which it was sent: an even phase
between two changes, an odd one while a change is in flight. One process sends one after the other over loopback, where
sending is delivering, unless the kernel is so busy that it leaves that for later: then as many wait as
net.core.netdev_max_backlog says, and no more than so many of an even phase can meet the change that follows.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import numpy as np

from fastrecv.closing import Closing
from fastrecv.netns import Namespace
from fastrecv.policies import Sender

__all__ = [
    "IP_PKTINFO",
    "MAX_SENDERS",
    "MAY_SEND",
    "NUMBERED",
    "PHASE",
    "RATE",
    "SENT",
    "STOP",
    "NumberedSource",
    "sender",
    "udp_counters",
]

NUMBERED = np.dtype([("sender", "<u4"), ("number", "<u4"), ("phase", "<u4")])
MAX_SENDERS = 1 << 16
_FIRST = int(IPv4Address("127.1.0.0"))
_SOURCE_PORT = 4242
IP_PKTINFO = 8  # include/uapi/linux/in.h
# Shared memory, in words of 64 bits, each of one writer and stored at once: with struct.pack_into the other process can
# see a 0 in between.
PHASE, STOP, SENT, MAY_SEND, RATE = range(5)
_UNLIMITED = (1 << 64) - 1
_PAUSE = 0.0005  # seconds, while no more may be sent
_READY = 10.0  # seconds


def sender(number: int, address: str, port: int) -> Sender:
    """The sender with that number, as a policy sees it."""
    return Sender(IPv4Address(_FIRST + number), _SOURCE_PORT, ip_address(address), port)


class NumberedSource(Closing):
    """A process that sends to `address` in a namespace, where loopback is up; a context manager. Loopback only.

    limit : how many datagrams it may send until `allow` says more; 1 at least, since it begins with the first.
    """

    module = __name__
    """What the process runs; sources of other datagrams have their own."""

    def __init__(
        self, namespace: Namespace, senders: int, address: str, port: int, limit: int = _UNLIMITED
    ) -> None:  # fmt: skip
        if not self.may_send_to(address) or not 1 <= senders <= MAX_SENDERS:
            raise ValueError(f"{senders} senders to {address}: that is not ours, or not 1 to {MAX_SENDERS}")
        fd = os.memfd_create("numbered")
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            self._memory = mmap.mmap(fd, mmap.PAGESIZE)
            self._words = memoryview(self._memory).cast("Q")
            self.allow(limit)
            words = ["-m", self.module, *map(str, (fd, senders, address, port))]
            with namespace:
                self._process = subprocess.Popen([sys.executable, *words], pass_fds=[fd])  # noqa: S603 - ourselves
        finally:
            os.close(fd)
        self._phase = 0
        deadline = time.monotonic() + _READY
        while not self.sent:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RuntimeError("the numbered source does not send")
            time.sleep(0.01)

    @staticmethod
    def may_send_to(address: str) -> bool:
        """Whether nobody else can have that address."""
        return ip_address(address).is_loopback

    @property
    def sent(self) -> int:
        return self._words[SENT]

    def allow(self, limit: int) -> None:
        """Let it send so many datagrams in all."""
        self._words[MAY_SEND] = limit

    @property
    def phase(self) -> int:
        return self._phase

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """What is sent within has an odd phase, and what follows the next even one."""
        self.next_phase()
        try:
            yield
        finally:
            self.next_phase()

    def next_phase(self) -> None:
        """Into an odd phase where a change begins, out of it where it has ended."""
        self._phase += 1
        self._words[PHASE] = self._phase

    def stop(self) -> int:
        """Stop sending; how many datagrams were sent in all."""
        self._words[STOP] = 1
        if self._process.wait(_READY):
            raise RuntimeError(f"the numbered source failed with {self._process.returncode}")
        return self.sent

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._words.release()
        self._memory.close()


def udp_counters(namespace: Namespace) -> dict[str, int]:
    """The counters of IPv4's UDP (/proc/net/snmp) in a namespace."""
    with namespace:
        lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
    names, values = (line.split()[1:] for line in lines if line.startswith("Udp:"))
    return dict(zip(names, map(int, values), strict=True))


def _send(fd: int, senders: int, address: str, port: int) -> None:
    words = memoryview(mmap.mmap(fd, mmap.PAGESIZE)).cast("Q")
    numbers = [0] * senders
    payload = bytearray(NUMBERED.itemsize)
    # struct in_pktinfo: the source address of one datagram (ip(7), IP_PKTINFO).
    sources = [
        [(socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=I4s4s", 0, IPv4Address(_FIRST + n).packed, bytes(4)))]
        for n in range(senders)
    ]
    sent = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", _SOURCE_PORT))
        pack, message, to = struct.Struct("<III").pack_into, [payload], (address, port)
        while True:
            for number in range(senders):
                while True:
                    if words[STOP]:
                        return
                    if sent < words[MAY_SEND]:
                        break
                    time.sleep(_PAUSE)
                pack(payload, 0, number, numbers[number], words[PHASE])
                sock.sendmsg(message, sources[number], 0, to)
                numbers[number] += 1
                sent += 1
                words[SENT] = sent


if __name__ == "__main__":
    _send(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
