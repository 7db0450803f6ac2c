"""On paper: what a hundred hosts would need of the engine, each as busy as the one that was measured alone.

Multiplication, no more: it presumes that a record costs what it cost here, and that all is shared evenly.
"""

from __future__ import annotations

from typing import NamedTuple

from fastrecv.bench.scale_out.addresses import NODES
from fastrecv.bench.scale_out.engine import WINDOW
from fastrecv.bench.scale_out.throughput import Throughput

__all__ = ["HOSTS", "OUTAGE", "Need", "needed"]

HOSTS = 100
OUTAGE = 600.0
"""Seconds for which consumers are away, or the engine is."""


class Need(NamedTuple):
    """records, messages, bytes : a second, that the engine takes; bytes are of one copy. copied : bytes a second that
    all nodes write. cpus : CPUs that are busy, by who uses them. stored : bytes on all nodes together when no consumer
    has taken anything for as long as an outage lasts. spooled : bytes on a host when the engine was away for as long.
    ids : of messages that streams know at once.
    """

    records: float
    messages: float
    bytes: float
    copied: float
    cpus: dict[str, float]
    stored: float
    spooled: float
    ids: float


def needed(one: Throughput) -> Need:
    """From the figures of one host. What is spooled is as long as what is stored, but for some bytes a message."""
    records, messages, size = (HOSTS * count / one.seconds for count in (one.records, one.messages, one.bytes))
    return Need(
        records, messages, size, NODES * size,
        {name: records * cost / 1e6 for name, cost in one.microseconds.items()},
        NODES * size * OUTAGE, size / HOSTS * OUTAGE, messages * WINDOW,
    )  # fmt: skip
