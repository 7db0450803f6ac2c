"""Debian's softflowd and pmacctd export the flows of a capture, datagram by datagram; nfacctd collects them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.programs import program

__all__ = ["Flow", "Nfacctd", "captured", "nfprobe", "softflowd"]

LINKTYPE_RAW = 101  # https://www.tcpdump.org/linktypes.html
# Data without a template is logged at debug level only (pmacct's QUICKSTART).
CONFIGURATION = """
nfacctd_ip: {address}
nfacctd_port: {port}
debug: true
plugins: print
aggregate: peer_src_ip, src_host, dst_host, src_port, dst_port, proto
print_output: json
print_output_file: {folder}/flows
print_output_file_append: true
print_refresh_time: 1
logfile: {folder}/log
pidfile: {folder}/pid
"""
PROBE = """
daemonize: false
pcap_savefile: {capture}
plugins: nfprobe
aggregate: src_host, dst_host, src_port, dst_port, proto, tos
nfprobe_receiver: 127.0.0.1:{port}
nfprobe_version: {version}
nfprobe_source_ip: 127.3.0.{version}
"""


def captured(flows: Iterable[tuple[str, int]]) -> bytes:
    """A pcap file with one UDP datagram of each flow, which comes from that address, of either family, and port."""
    records = [struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, LINKTYPE_RAW)]
    for number, (source, port) in enumerate(flows):
        udp = struct.pack("!HHHH4s", port, 53, 12, 0, b"data")
        if ":" in source:
            addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, "2001:db8::9")
            packet = struct.pack("!IHBB", 6 << 28, len(udp), socket.IPPROTO_UDP, 64) + addresses + udp
        else:
            addresses = socket.inet_aton(source) + socket.inet_aton("203.0.113.9")
            head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, socket.IPPROTO_UDP, 0)
            packet = head + addresses + udp
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


def nfprobe(captures: dict[int, Path]) -> dict[int, list[bytes]]:
    """The datagrams that pmacctd exports of a capture, for each version, from 127.3.0.VERSION, as its options say, too.

    It pauses for two seconds before and after it reads a file; these pass for all versions at once.
    """
    with contextlib.ExitStack() as stack:
        running = {}
        for version, capture in captures.items():
            near = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            near.bind(("127.0.0.1", 0))
            near.setblocking(False)
            conf = capture.with_suffix(f".conf{version}")
            conf.write_text(PROBE.format(capture=capture, port=near.getsockname()[1], version=version))
            words = [program("pmacctd", "pmacct"), "-f", str(conf)]
            running[version] = (
                near,
                subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
            )
        found: dict[int, list[bytes]] = {}
        for version, (near, process) in running.items():
            assert process.wait(20) == 0
            found[version] = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    found[version].append(near.recv(65535))
    return found


class Flow(NamedTuple):
    exporter: str
    source: str
    port: int


class Nfacctd:
    """A running nfacctd at this address, in the namespace of who starts it, with its print plugin."""

    def __init__(self, folder: Path, address: str, port: int) -> None:
        folder.mkdir()
        self.flows, self.log, self.pid_file = folder / "flows", folder / "log", folder / "pid"
        (folder / "conf").write_text(CONFIGURATION.format(address=address, port=port, folder=folder))
        command = [program("nfacctd", "pmacct"), "-f", str(folder / "conf")]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    @property
    def ready(self) -> bool:
        assert self.process.poll() is None, "nfacctd has ended"
        return self.pid_file.exists() and self.log.exists() and "waiting for NetFlow/IPFIX" in self.log.read_text()

    def rows(self) -> list[dict[str, Any]]:
        """What it has printed: the flows of a second, summed up by the fields of the configuration."""
        text = self.flows.read_text() if self.flows.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def decoded(self, flows: set[Flow]) -> Counter[Flow]:
        """How often it has got each of these flows; every flow is of one packet."""
        found: Counter[Flow] = Counter()
        for row in self.rows():
            found[Flow(row["peer_ip_src"], row["ip_src"], row["port_src"])] += row["packets"]
        return Counter({flow: times for flow, times in found.items() if flow in flows})

    def discarded(self, flows: set[Flow]) -> int:
        """How many data sets of these flows' exporters it had no template for; softflowd puts one into a datagram."""
        exporters = {flow.exporter for flow in flows}
        found = re.findall(r"unknown template [0-9]+ \[([0-9.]+):", self.log.read_text())
        return sum(exporter in exporters for exporter in found)

    def kill(self) -> None:
        """It and its plugin, which is a process of its own."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
