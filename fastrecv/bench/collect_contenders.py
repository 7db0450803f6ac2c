"""Who collects: `fastrecv collect`, nfcapd and nfacctd as Debian has them, and the netflow package of PyPI.

Each is a program that is started, told to listen, and asked in its own words, when it has ended or before, what it has
collected. Those that keep every flow write files; those that sum up have the same keys.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["CONTENDERS", "Contender", "Found", "missing"]

_ADDRESS = "127.0.0.1"
_PACKAGE = """
import json, socket, sys
import netflow
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("127.0.0.1", int(sys.argv[1])))
sock.settimeout(0.2)
by_sender, flows, packets, octets = {}, 0, 0, 0
while True:
    try:
        data, sender = sock.recvfrom(65535)
    except TimeoutError:
        with open(sys.argv[2], "w") as file:
            json.dump([flows, packets, octets], file)
        continue
    for flow in netflow.parse_packet(data, by_sender.setdefault(sender[0], {"netflow": {}, "ipfix": {}})).flows:
        flows += 1
        packets += next(flow.data[name] for name in ("IN_PACKETS", "IN_PKTS", "packetDeltaCount") if name in flow.data)
        octets += next(flow.data[name] for name in ("IN_OCTETS", "IN_BYTES", "octetDeltaCount") if name in flow.data)
"""


class Found(NamedTuple):
    """What a collector says it has collected. flows : None where it sums them up and counts them no more."""

    flows: int | None
    packets: int
    octets: int


class Contender(NamedTuple):
    """A collector. needs : a program, or a module after a colon. package : what brings it.

    command : in a folder, on a port. found : what it has collected, running, or `ended`. share : of the datagrams that
    others get, for those that take long, or hand what they take to a process that has no room for more. least : of
    the packets and octets that it must have: one that hands over by buffers holds the last one back.
    """

    title: str
    needs: str
    package: str
    command: Callable[[Path, int], list[str]]
    found: Callable[[Path], Found]
    ended: bool
    share: float = 1.0
    least: float = 1.0


def missing(contender: Contender) -> str:
    """What is missing, and what brings it; "" where nothing is."""
    if contender.needs.startswith(":"):
        import importlib.util  # noqa: PLC0415

        here = importlib.util.find_spec(contender.needs[1:]) is not None
    else:
        here = shutil.which(contender.needs, path="/usr/sbin:/usr/bin:/sbin:/bin") is not None
    return "" if here else f"{contender.needs.lstrip(':')} ({contender.package})"


def _ours(*options: str) -> Callable[[Path, int], list[str]]:
    def command(folder: Path, port: int) -> list[str]:
        return [
            sys.executable, "-m", "fastrecv", "collect", "-b", f"{_ADDRESS}:{port}", "--control", f"{folder}/control",
            "--batch-size", "256", "--flush", "0.2", *(option.format(folder=folder) for option in options),
        ]  # fmt: skip

    return command


def _of_parquet(folder: Path) -> Found:
    import pyarrow.parquet as pq  # noqa: PLC0415 - an extra

    return _summed(pq.read_table(path, columns=_COUNTED) for path in (folder / "flows").glob("*.parquet"))


def _of_arrow(folder: Path) -> Found:
    from pyarrow import ipc  # noqa: PLC0415 - an extra

    return _summed(ipc.open_stream(path).read_all().select(_COUNTED) for path in (folder / "flows").glob("*.arrows"))


def _summed(tables: Iterable[pa.Table]) -> Found:
    sums = [0, 0, 0]
    for table in tables:
        sums[0] += len(table)
        for place, column in enumerate(table.columns, 1):
            sums[place] += sum(column.to_numpy().tolist())
    return Found(*sums)


def _of_lines(folder: Path) -> Found:
    rows = [json.loads(line) for line in (folder / "sums").read_text().splitlines()]
    names = ("deltaFlowCount", "packetDeltaCount", "octetDeltaCount")
    return Found(*(sum(row[name] for row in rows) for name in names))


def _nfcapd(*options: str) -> Callable[[Path, int], list[str]]:
    def command(folder: Path, port: int) -> list[str]:
        (folder / "flows").mkdir()
        return ["nfcapd", "-b", _ADDRESS, "-p", str(port), "-w", str(folder / "flows"), "-t", "3600", *options]

    return command


def _of_nfdump(folder: Path) -> Found:
    said = subprocess.run(["nfdump", "-q", "-R", str(folder / "flows"), "-I"],  # noqa: S603, S607 - our own files
                          capture_output=True, text=True, check=True).stdout  # fmt: skip
    counted = {name: int(count) for name, count in re.findall(r"^(Flows|Packets|Bytes): (\d+)$", said, re.MULTILINE)}
    return Found(counted["Flows"], counted["Packets"], counted["Bytes"])


def _nfacctd(folder: Path, port: int) -> list[str]:
    (folder / "conf").write_text(
        f"nfacctd_ip: {_ADDRESS}\nnfacctd_port: {port}\nplugins: memory\nimt_path: {folder}/pipe\n"
        "aggregate: peer_src_ip, src_host, dst_port\n"
        "imt_mem_pools_number: 1024\nimt_mem_pools_size: 1048576\nimt_buckets: 65537\n"
        f"plugin_pipe_size: 536870912\nplugin_buffer_size: 524288\nlogfile: {folder}/nfacctd.log\n"
    )
    return ["nfacctd", "-f", str(folder / "conf")]


def _of_pmacct(folder: Path) -> Found:
    said = subprocess.run(["pmacct", "-s", "-p", str(folder / "pipe"), "-O", "json"],  # noqa: S603, S607 - our own
                          capture_output=True, text=True, check=True).stdout  # fmt: skip
    rows = [json.loads(line) for line in said.splitlines()]
    return Found(None, sum(row["packets"] for row in rows), sum(row["bytes"] for row in rows))


def _netflow(folder: Path, port: int) -> list[str]:
    return [sys.executable, "-c", _PACKAGE, str(port), str(folder / "sums")]


def _of_package(folder: Path) -> Found:
    return Found(*json.loads((folder / "sums").read_text()))


_COUNTED = ["packetDeltaCount", "octetDeltaCount"]
_KEYS = "exporterAddress,sourceIPv4Address,destinationTransportPort"
CONTENDERS = {
    "parquet": Contender("fastrecv collect, every flow to Parquet", ":pyarrow", "pip install 'fastrecv[flow]'",
                         _ours("--sink", "parquet:{folder}/flows?rotate=500ms"), _of_parquet, ended=True),
    "arrow": Contender("fastrecv collect, every flow to Arrow files", ":pyarrow", "pip install 'fastrecv[flow]'",
                       _ours("--sink", "arrow:{folder}/flows?rotate=500ms&compression=none"), _of_arrow, ended=True),
    "nfcapd": Contender("nfcapd, every flow to its files", "nfcapd", "Debian package nfdump",
                        _nfcapd(), _of_nfdump, ended=True),
    "arrow-lz4": Contender("fastrecv collect, the same, LZ4", ":pyarrow", "pip install 'fastrecv[flow]'",
                           _ours("--sink", "arrow:{folder}/flows?rotate=500ms"), _of_arrow, ended=True),
    "nfcapd-lz4": Contender("nfcapd -y, the same, LZ4", "nfcapd", "Debian package nfdump",
                            _nfcapd("-y"), _of_nfdump, ended=True),
    "sums": Contender("fastrecv collect, sums by three keys", ":pyarrow", "pip install 'fastrecv[flow]'",
                      _ours("--sink", "jsonl:{folder}/sums", "--aggregate", _KEYS, "--window", "3600"), _of_lines,
                      ended=True),
    "nfacctd": Contender("nfacctd, memory plugin, sums by the same", "nfacctd", "Debian package pmacct",
                         _nfacctd, _of_pmacct, ended=False, share=0.1, least=0.95),
    "netflow": Contender("recvfrom + netflow.parse_packet", ":netflow", "pip install netflow",
                         _netflow, _of_package, ended=False, share=0.02),
}  # fmt: skip
