"""Debian's softflowd as a source of flows: what it exports of a capture, datagram by datagram."""

from __future__ import annotations

import re
import socket
import struct
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from tests.programs import program

__all__ = ["captured", "softflowd"]

LINKTYPE_RAW = 101  # https://www.tcpdump.org/linktypes.html


def captured(flows: Iterable[tuple[str, int]]) -> bytes:
    """A pcap file with one UDP datagram of each flow, which comes from that address and port."""
    records = [struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, LINKTYPE_RAW)]
    for number, (source, port) in enumerate(flows):
        udp = struct.pack("!HHHH4s", port, 53, 12, 0, b"data")
        addresses = socket.inet_aton(source) + socket.inet_aton("203.0.113.9")
        packet = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, socket.IPPROTO_UDP, 0) + addresses + udp
        records.append(struct.pack("=IIII", int(time.time()), number, len(packet), len(packet)) + packet)
    return b"".join(records)


def softflowd(capture: Path, version: int, flows: int) -> list[bytes]:
    """The datagrams that it exports of a capture of so many flows: all are in the queue when it has ended.

    With a control socket, softflowd 1.1.0 may wait on it for ever when it reads a file.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as near:
        near.bind(("127.0.0.1", 0))
        near.settimeout(5)
        said = subprocess.run(
            [program("softflowd", "softflowd"), "-r", capture.name, "-v", str(version),
             "-n", f"127.0.0.1:{near.getsockname()[1]}", "-p", "softflowd.pid", "-c", "none"],
            cwd=capture.parent, check=True, capture_output=True, text=True, timeout=10,
        ).stdout  # fmt: skip
        exported = re.search(rf"Flows exported: {flows} \({flows} records\) in (\d+) packets \(0 failures\)", said)
        assert exported is not None, said
        return [near.recv(65535) for _ in range(int(exported[1]))]
