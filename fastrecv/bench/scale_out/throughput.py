"""How much goes through with so many hosts: as many records on their way as there is room for, and no more.

All processes share the CPUs that there are, so this says what they cost, not what as many machines would do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

from fastrecv.bench.scale_out.consumers import Consumers
from fastrecv.bench.scale_out.engine import Engine
from fastrecv.bench.scale_out.exporters import RECORDS, Exporters
from fastrecv.bench.scale_out.processes import cpu_seconds

__all__ = ["WINDOW", "Throughput", "measured"]

WINDOW = 4000
"""Datagrams on their way: what the queues of one host have room for, and more than any other part keeps."""
_TICK = 0.005  # seconds
_WARM = 0.25  # of the time, before it counts


class Throughput(NamedTuple):
    """What came of it. records : at consumers. messages, bytes : that the engine has stored, a copy. microseconds : of
    CPU a record, by who has used them.
    """

    hosts: int
    seconds: float
    records: int
    messages: int
    bytes: int
    microseconds: Mapping[str, float]

    @property
    def rate(self) -> float:
        """Records a second."""
        return self.records / self.seconds


def measured(
    hosts: int, seconds: float, source: Exporters, consumers: Consumers, engine: Engine, pids: Mapping[str, list[int]]
) -> Throughput:  # fmt: skip
    """While `hosts` share the exporters. pids : of who else is measured, by name."""
    source.pace(0)
    _push(source, consumers, _WARM * seconds)
    held = engine.held()
    began, kept = time.monotonic(), consumers.count()
    used = {name: cpu_seconds(found) for name, found in pids.items()}
    _push(source, consumers, seconds)
    took, records = time.monotonic() - began, consumers.count() - kept
    cost = {name: 1e6 * (cpu_seconds(found) - used[name]) / max(1, records) for name, found in pids.items()}
    more = engine.held()
    return Throughput(hosts, took, records, more.messages - held.messages, more.bytes - held.bytes, cost)


def _push(source: Exporters, consumers: Consumers, seconds: float) -> None:
    """Keep the window full, and stop there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        source.allow(consumers.count() // RECORDS + WINDOW)
        consumers.look()
        time.sleep(_TICK)
