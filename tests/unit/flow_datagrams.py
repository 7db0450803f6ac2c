"""Datagrams of NetFlow v5, v9 and IPFIX, as RFC 3954 and RFC 7011 have them; and what a decoder makes of some."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrecv import Batch
from fastrecv._flow import MALFORMED
from fastrecv.collector.decoder import Decoder
from fastrecv.sockets import endpoints

__all__ = [
    "ENTERPRISE",
    "EXPORTER",
    "IPFIX",
    "NETFLOW5",
    "NETFLOW9",
    "OCTETS",
    "PACKETS",
    "SOURCE",
    "VARIABLE",
    "Taken",
    "a_set",
    "batch",
    "options",
    "options_templates",
    "record5",
    "sent",
    "sent5",
    "taken",
    "template",
    "templates",
]

NETFLOW5, NETFLOW9, IPFIX = 5, 9, 10
OCTETS, PACKETS, VARIABLE = 1, 2, 65535
ENTERPRISE = 0x8000 | OCTETS  # octets of an enterprise are its own affair
SOURCE, EXPORTER = 77, "192.0.2.1"


def sent(version: int, sequence: int, *sets: bytes, uptime: int = 1, seconds: int = 2) -> bytes:
    data = b"".join(sets)
    if version == NETFLOW9:
        return struct.pack("!HHIIII", 9, len(sets), uptime, seconds, sequence, SOURCE) + data
    return struct.pack("!HHIII", 10, 16 + len(data), seconds, sequence, SOURCE) + data


def a_set(number: int, *contents: bytes, padding: int = 0) -> bytes:
    data = b"".join(contents) + bytes(padding)
    return struct.pack("!HH", number, 4 + len(data)) + data


def template(name: int, fields: Sequence[tuple[int, int]]) -> bytes:
    return struct.pack("!HH", name, len(fields)) + specifiers(fields)


def specifiers(fields: Sequence[tuple[int, int]]) -> bytes:
    """With 0x8000 in its number an element is of the enterprise 9999."""
    return b"".join(
        struct.pack("!HH", element, length) + (struct.pack("!I", 9999) if element & 0x8000 else b"")
        for element, length in fields
    )


def options(version: int, name: int, scope: Sequence[tuple[int, int]], fields: Sequence[tuple[int, int]]) -> bytes:
    both = specifiers(scope) + specifiers(fields)
    if version == NETFLOW9:
        return struct.pack("!HHH", name, 4 * len(scope), 4 * len(fields)) + both
    return struct.pack("!HHH", name, len(scope) + len(fields), len(scope)) + both


def templates(version: int, *contents: bytes, padding: int = 0) -> bytes:
    return a_set({NETFLOW9: 0, IPFIX: 2}[version], *contents, padding=padding)


def options_templates(version: int, *contents: bytes) -> bytes:
    return a_set({NETFLOW9: 1, IPFIX: 3}[version], *contents)


def record5(packets: int, octets: int) -> bytes:
    return bytes(16) + struct.pack("!II", packets, octets) + bytes(24)


def sent5(sequence: int, *records: bytes, engine: int = 4) -> bytes:
    return struct.pack("!HHIIIIBBH", 5, len(records), 1, 2, 3, sequence, 1, engine, 0) + b"".join(records)


def batch(*datagrams: bytes, source: str = EXPORTER) -> Batch:
    return Batch.of(datagrams, endpoints([(source, 4711)] * len(datagrams)))


class Taken:
    """What a decoder has made of datagrams, all of one exporter unless it is said otherwise."""

    def __init__(self) -> None:
        self.decoder = Decoder()
        self.rows: list[dict[str, Any]] = []

    def take(self, *datagrams: bytes, source: str = EXPORTER) -> Taken:
        """A batch of these; its rows, each without what it has not."""
        for raws in (self.decoder.take(batch(*datagrams, source=source), 1000.5), self.decoder.flush()):
            for raw in raws:
                raw.validate(full=True)
                record = self.decoder.finish(raw)
                record.validate(full=True)
                self.rows += record.to_pylist()
        return self

    @property
    def exporters(self) -> NDArray[np.void]:
        return self.decoder.exporters.table()

    def __getitem__(self, name: str) -> int:
        """A count, summed up over all exporters."""
        if name in MALFORMED:
            return int(self.exporters["malformed"][:, MALFORMED.index(name)].sum())
        return int(self.exporters[name].sum())

    @property
    def counts(self) -> tuple[int, int, int, int]:
        return self["flows"], self["octets"], self["packets"], self["malformed"]


def taken(*datagrams: bytes) -> Taken:
    return Taken().take(*datagrams)
