"""Rates of a service: what two looks at its counters say of the time between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from fastrecv.workers.status import Counts, Service

__all__ = ["SECONDS", "History", "Rates"]

SECONDS = 60.0
"""How far a History reaches back."""


class Rates(NamedTuple):
    """datagrams, bits, drops : a second. fill : datagrams of a batch; nanoseconds : of the handler for a datagram; None
    where there was none. busy : of the time, how much the handler took; of all workers together it may exceed 1.
    """

    datagrams: float
    bits: float
    drops: float
    fill: float | None
    nanoseconds: float | None
    busy: float


class History:
    """The last rates of each slot and of all together (None), and how many datagrams a second there were before."""

    def __init__(self, interval: float) -> None:
        """`interval` : seconds between two looks."""
        self._room = max(2, round(SECONDS / interval))
        self._before: Service | None = None
        self.rates: dict[int | None, Rates] = {}
        self.datagrams: dict[int | None, deque[float]] = {}

    def take(self, service: Service) -> None:
        """The service as it is now; another one than before begins anew."""
        before, self._before = self._before, service
        if before is None:
            return
        seconds = service.uptime - before.uptime
        if seconds <= 0 or service.pid != before.pid:
            self.rates, self.datagrams = {}, {}
            return
        earlier: dict[int | None, Counts] = dict(_counts(before))
        self.rates = {
            slot: _rates(earlier[slot], counts, seconds) for slot, counts in _counts(service) if slot in earlier
        }
        self.datagrams = {slot: self.datagrams.get(slot, deque(maxlen=self._room)) for slot in self.rates}
        for slot, rates in self.rates.items():
            self.datagrams[slot].append(rates.datagrams)

    def line(self, slot: int | None, width: int) -> list[float]:
        """Datagrams a second over the last minute in so many places at most, the last the newest."""
        found = self.datagrams.get(slot, deque())
        each = -(-self._room // width)  # looks of a place
        values = list(found)
        groups = [values[max(0, end - each) : end] for end in range(len(values), 0, -each)]
        return [sum(group) / len(group) for group in reversed(groups)]


def _counts(service: Service) -> Iterable[tuple[int | None, Counts]]:
    return [(None, service.total), *((worker.slot, worker) for worker in service.workers)]


def _rates(before: Counts, after: Counts, seconds: float) -> Rates:
    def more(name: str) -> float:
        return max(0.0, float(getattr(after, name) - getattr(before, name)))

    datagrams, batches, handled, busy = more("datagrams"), more("batches"), more("handled"), more("handler_seconds")
    return Rates(
        datagrams=datagrams / seconds, bits=8 * more("bytes") / seconds, drops=more("kernel_drops") / seconds,
        fill=datagrams / batches if batches else None, nanoseconds=1e9 * busy / handled if handled else None,
        busy=busy / seconds,
    )  # fmt: skip
