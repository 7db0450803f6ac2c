"""Flow exports that are made up, the same every time: what exporters with real templates send, and what it adds up to.

Templates are those of common exporters: v9 as Cisco's Flexible NetFlow has its "netflow ipv4 original-input" record,
IPFIX as pmacctd and softflowd have theirs. Datagrams are full, as an Ethernet frame takes them.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

__all__ = ["EXPORTERS", "STREAMS", "Export", "Stream", "exported"]

EXPORTERS = 8
_SOURCES, _PORTS = 4000, 200  # addresses, and ports of services, that flows are drawn from
_UPTIME, _SECONDS = 86_400_000, 1_700_000_000

_FIELDS = {
    "v9": [(8, 4), (12, 4), (15, 4), (10, 4), (14, 4), (2, 4), (1, 4), (22, 4), (21, 4), (7, 2), (11, 2), (6, 1),
           (4, 1), (5, 1), (9, 1), (13, 1), (16, 2), (17, 2), (61, 1)],
    "ipfix": [(8, 4), (12, 4), (10, 4), (14, 4), (2, 8), (1, 8), (152, 8), (153, 8), (7, 2), (11, 2), (4, 1), (6, 2),
              (5, 1), (60, 1)],
}  # fmt: skip
_FIELDS5 = [(8, 4), (12, 4), (15, 4), (10, 2), (14, 2), (2, 4), (1, 4), (22, 4), (21, 4), (7, 2), (11, 2), (0, 1),
            (6, 1), (4, 1), (5, 1), (16, 2), (17, 2), (9, 1), (13, 1), (0, 2)]  # fmt: skip
_TEMPLATE = 256


class Stream(NamedTuple):
    """A version's datagrams. flows : of each."""

    title: str
    version: int
    flows: int


STREAMS = {
    "v5": Stream("NetFlow v5", 5, 30),
    "v9": Stream("NetFlow v9", 9, 28),
    "ipfix": Stream("IPFIX", 10, 24),
}


class Export(NamedTuple):
    """templates : a datagram of each exporter, none where there are none. datagrams : of each exporter, in order."""

    templates: list[bytes]
    datagrams: list[list[bytes]]
    flows: int
    packets: int
    octets: int


def exported(name: str, datagrams: int, first: int = 0, seed: int = 1) -> Export:
    """So many datagrams of a stream, spread evenly over exporters. first : how many each has sent before."""
    stream, rng = STREAMS[name], np.random.default_rng([seed, first])
    each = datagrams // EXPORTERS
    records = _records(_FIELDS.get(name, _FIELDS5), EXPORTERS * each * stream.flows, rng)
    size, data = stream.flows * records.itemsize, records.tobytes()
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    made = [
        [_datagram(stream, exporter, first + number, parts[exporter * each + number]) for number in range(each)]
        for exporter in range(EXPORTERS)
    ]
    templates = [_templates(name, exporter) for exporter in range(EXPORTERS)] if name in _FIELDS else []
    packets, octets = (int(records[f"f{_place(name, number)}"].astype(np.uint64).sum()) for number in (2, 1))
    return Export(templates, made, len(records), packets, octets)


def _place(name: str, number: int) -> int:
    return [field for field, _ in _FIELDS.get(name, _FIELDS5)].index(number)


def _records(
    fields: list[tuple[int, int]], count: int, rng: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Flows: few senders send most, services have well-known ports, as in any network."""
    drawn = {
        8: 0x0A000000 + (rng.pareto(1.2, count) * 40).astype(np.int64) % _SOURCES,
        12: 0xC6336400 + rng.integers(0, 256, count), 7: rng.integers(1024, 65536, count),
        11: (rng.pareto(1.5, count) * 20).astype(np.int64) % _PORTS,
        4: rng.choice([6, 17, 1], count, p=[0.7, 0.28, 0.02]),
        2: rng.integers(1, 200, count), 1: rng.integers(40, 150_000, count), 6: rng.choice([0, 16, 24, 27], count),
        10: rng.integers(1, 9, count), 14: rng.integers(1, 9, count), 9: 24, 13: 24, 60: 4,
        21: _UPTIME - rng.integers(0, 10_000, count), 22: _UPTIME - rng.integers(10_000, 70_000, count),
        153: 1000 * _SECONDS - rng.integers(0, 10_000, count),
        152: 1000 * _SECONDS - rng.integers(10_000, 70_000, count), 16: 64496, 17: 64511,
    }  # fmt: skip
    records = np.zeros(count, [(f"f{place}", f">u{length}") for place, (_, length) in enumerate(fields)])
    for place, (number, _) in enumerate(fields):
        records[f"f{place}"] = drawn.get(number, 0)
    return records


def _datagram(stream: Stream, exporter: int, number: int, records: bytes) -> bytes:
    flows = number * stream.flows % 2**32
    if stream.version == 5:
        return struct.pack("!HHIIIIBBH", 5, stream.flows, _UPTIME, _SECONDS, 0, flows, 0, exporter, 0) + records
    padding = bytes(-len(records) % 4)
    data = struct.pack("!HH", _TEMPLATE, 4 + len(records) + len(padding)) + records + padding
    if stream.version == 9:  # the first one was the template
        return struct.pack("!HHIIII", 9, stream.flows, _UPTIME, _SECONDS, number + 1, exporter) + data
    return struct.pack("!HHIII", 10, 16 + len(data), _SECONDS, flows, exporter) + data


def _templates(name: str, exporter: int) -> bytes:
    fields = _FIELDS[name]
    data = struct.pack("!HH", _TEMPLATE, len(fields)) + b"".join(struct.pack("!HH", *field) for field in fields)
    if name == "v9":
        return struct.pack("!HHIIIIHH", 9, 1, _UPTIME, _SECONDS, 0, exporter, 0, 4 + len(data)) + data
    return struct.pack("!HHIIIHH", 10, 20 + len(data), _SECONDS, 0, exporter, 2, 4 + len(data)) + data
