"""Two tasks done whole, since nobody receives for its own sake: NetFlow v5 parsed and summed up, senders counted.

Each is written as a loop over datagrams and over whole batches, and each of these is timed twice: from the socket to
the sum, and alone on what was received before.
"""

from __future__ import annotations

import contextlib
import importlib
import socket
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat, starmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrecv import Batch, Receiver
from fastrecv.bench.receivers import Contender, Ready

__all__ = ["NETFLOW", "SENDERS", "Task", "contenders", "count_senders", "netflow_totals", "sum_netflow"]

_LARGEST = 65535
_RECORDS = 30
_PACKETS, _OCTETS = 7, 9000  # of every record

# NetFlow v5, Cisco NetFlow Collection Engine User Guide, appendix B.
_HEADER = struct.Struct("!HHIIIIBBH")
_RECORD = struct.Struct("!IIIHHIIIIHHBBBBHHBBH")
_TOTALS = struct.Struct("!16xII24x")  # packets and octets of a record, and nothing else of it
_PACKET = np.dtype(
    [
        ("version", ">u2"), ("count", ">u2"), ("uptime", ">u4"), ("seconds", ">u4"), ("nanoseconds", ">u4"),
        ("sequence", ">u4"), ("engine_type", "u1"), ("engine", "u1"), ("sampling", ">u2"),
        ("records", [
            ("source", ">u4"), ("destination", ">u4"), ("next_hop", ">u4"), ("input", ">u2"), ("output", ">u2"),
            ("packets", ">u4"), ("octets", ">u4"), ("first", ">u4"), ("last", ">u4"), ("source_port", ">u2"),
            ("destination_port", ">u2"), ("pad", "u1"), ("flags", "u1"), ("protocol", "u1"), ("tos", "u1"),
            ("source_as", ">u2"), ("destination_as", ">u2"), ("source_mask", "u1"), ("destination_mask", "u1"),
            ("pad2", ">u2"),
        ], (_RECORDS,)),
    ]
)  # fmt: skip

Datagrams = Iterable[tuple[bytes, tuple[Any, ...]]]


@dataclass(frozen=True)
class Way:
    """One way to do a task datagram by datagram. `work` returns how many datagrams its result stands for."""

    title: str
    work: Callable[[Datagrams], int]
    libraries: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What is made of datagrams. `batched` returns how many datagrams its result stands for.

    payload : what every datagram carries.
    """

    name: str
    payload: bytes
    each: tuple[Way, ...]
    batched: Callable[[Iterable[Batch]], int]
    batched_title: str


def netflow_totals(datagrams: Datagrams) -> tuple[int, int]:
    """Parse every field of every record, as a collector does, and sum up the packets and octets reported."""
    packets = octets = 0
    for data, _source in datagrams:
        version, count, *_ = _HEADER.unpack_from(data)
        if version != 5:
            continue
        for record in _RECORD.iter_unpack(data[24 : 24 + 48 * count]):
            packets += record[5]
            octets += record[6]
    return packets, octets


def netflow_two_fields(datagrams: Datagrams) -> tuple[int, int]:
    """The same sums by the least that Python can do: no other field is looked at."""
    packets = octets = 0
    for data, _source in datagrams:
        version, count, *_ = _HEADER.unpack_from(data)
        if version != 5:
            continue
        for record_packets, record_octets in _TOTALS.iter_unpack(data[24 : 24 + 48 * count]):
            packets += record_packets
            octets += record_octets
    return packets, octets


def netflow_package(datagrams: Datagrams) -> tuple[int, int]:
    """The same by the netflow package of PyPI: a dict for every record."""
    parse: Callable[[bytes, dict[Any, Any]], Any] = importlib.import_module("netflow").parse_packet
    packets = octets = 0
    for data, _source in datagrams:
        for flow in parse(data, {}).flows:
            packets += flow.data["IN_PACKETS"]
            octets += flow.data["IN_OCTETS"]
    return packets, octets


def sum_netflow(batches: Iterable[Batch]) -> tuple[int, int]:
    """The same by batches, every field a column; all exporters send full datagrams of 30 records."""
    packets = octets = 0
    for batch in batches:
        rows = batch.records(_PACKET)
        valid = rows["version"] == 5
        if not valid.all():
            rows = rows[valid]
        packets += int(rows["records"]["packets"].sum(dtype=np.uint64))
        octets += int(rows["records"]["octets"].sum(dtype=np.uint64))
    return packets, octets


def _count_each(datagrams: Datagrams) -> dict[tuple[Any, ...], int]:
    counts: defaultdict[tuple[Any, ...], int] = defaultdict(int)
    for _data, source in datagrams:
        counts[source] += 1
    return counts


def count_senders(batches: Iterable[Batch]) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
    """Senders as address << 16 | port, and the datagrams of each: keys are gathered and counted once, at the end."""
    keys = []
    for batch in batches:
        sources = batch.sources
        assert sources is not None
        addresses = sources["address"][:, 12:].view(">u4")[:, 0].astype(np.uint64)
        keys.append(addresses << np.uint64(16) | sources["port"])
    return np.unique(np.concatenate(keys), return_counts=True)


def _netflow_payload() -> bytes:
    record = _RECORD.pack(
        0xC0000201, 0xC6336401, 0, 1, 2, _PACKETS, _OCTETS, 1, 2, 53, 53, 0, 0, 17, 0, 1, 2, 24, 24, 0
    )
    return _HEADER.pack(5, _RECORDS, 1, 1, 1, 1, 0, 0, 0) + record * _RECORDS


def _whole(octets: int) -> int:
    """The datagrams that a sum of octets stands for: a decoder that misreads fails the gate of exact counts."""
    return octets // (_RECORDS * _OCTETS)


NETFLOW = Task(
    "netflow", _netflow_payload(),
    (
        Way("recvfrom + struct", lambda datagrams: _whole(netflow_totals(datagrams)[1])),
        Way("recvfrom + struct, two fields only", lambda datagrams: _whole(netflow_two_fields(datagrams)[1])),
        Way("recvfrom + netflow.parse_packet", lambda datagrams: _whole(netflow_package(datagrams)[1]), ("netflow",)),
    ),
    lambda batches: _whole(sum_netflow(batches)[1]),
    "Receiver, batch.records + numpy",
)  # fmt: skip
SENDERS = Task(
    "senders", bytes(128),
    (Way("recvfrom + dict", lambda datagrams: sum(_count_each(datagrams).values())),),
    lambda batches: int(count_senders(batches)[1].sum()),
    "Receiver, batch.sources + numpy.unique",
)  # fmt: skip


@contextlib.contextmanager
def _each(sock: socket.socket, *, work: Callable[[Datagrams], int], alone: bool) -> Iterator[Ready]:
    def ready(expected: int) -> Callable[[], int]:
        datagrams: Datagrams = starmap(sock.recvfrom, repeat((_LARGEST, socket.MSG_DONTWAIT), expected))
        if alone:
            datagrams = list(datagrams)
        return lambda: work(datagrams)

    yield ready


@contextlib.contextmanager
def _batched(sock: socket.socket, *, task: Task, alone: bool, batch_size: int, slot_size: int) -> Iterator[Ready]:
    most = 1 << 16 if alone else None  # alone, all that was received is held at once
    with Receiver(sock, batch_size=batch_size, slot_size=slot_size, max_arenas=most) as receiver:

        def drain() -> Iterator[Batch]:
            while batch := receiver.recv(0):
                yield batch

        def ready(_expected: int) -> Callable[[], int]:
            batches: Iterable[Batch] = drain()
            if alone:
                batches = list(batches)
            return lambda: task.batched(batches)

        yield ready


_SIZES = ((64, _LARGEST, ""), (1024, 2048, ", batch_size 1024, slot_size 2048"))


def contenders(task: Task) -> tuple[Contender, ...]:
    """The task by datagram and by batch, whole and alone; by batch of the default size and of a larger one.

    The first is what the others are measured against.
    """
    made = []
    for alone, suffix, what in ((False, "", ""), (True, "-alone", "decoding alone: ")):
        for number, way in enumerate(task.each):
            name = f"each{'' if number == 0 else f'-{number + 1}'}{suffix}"
            opened = partial(_each, work=way.work, alone=alone)
            made.append(Contender(name, f"{what}{way.title}", "python", opened, libraries=way.libraries))
        for batch_size, slot_size, options in _SIZES:
            batches = partial(_batched, task=task, alone=alone, batch_size=batch_size, slot_size=slot_size)
            title = f"{what}{task.batched_title}{options}"
            made.append(Contender(f"batch-{batch_size}{suffix}", title, "fastrecv", batches, warm=3 * batch_size))
    return tuple(made)
