"""Slots that are drained sender by sender: who is known to have one stays there until nobody has come for a while.

A slot begins to leave while it still has its buckets: its senders are recorded as they come. When its buckets are given
to others, those who are known stay, and the rest go where their buckets are. Nothing is looked up or recorded while no
slot leaves.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrecv.balance_maps import Maps
from fastrecv.errors import StateError

__all__ = ["Known", "Leaving"]


class Known(NamedTuple):
    """senders : how many are known to have a slot. quiet : seconds since any of them came; None without any."""

    senders: int
    quiet: float | None


class Leaving:
    """Which slots of a balancer leave."""

    def __init__(self, maps: Maps, senders: int) -> None:
        self._maps, self._senders = maps, senders

    def slots(self) -> set[int]:
        words = self._control()["leaving"][0]
        return {64 * word + bit for word in range(len(words)) for bit in range(64) if int(words[word]) >> bit & 1}

    def begin(self, slot: int) -> None:
        """Record from now on who comes to a slot. StateError where the balancer was made to know no senders."""
        if not self._senders:
            raise StateError("this balancer knows no senders: create it with --senders, or drain by table")
        present = self.slots()
        if slot not in present:
            self._forget(self._of(slot)[0])  # of one who was killed while he ended it
            self._mark(present | {slot})

    def end(self, slot: int) -> None:
        """Forget whom the slot had: from the next packet on they go where their buckets are."""
        present = self.slots()
        if slot not in present:
            return
        self._mark(present - {slot})  # first: nobody is recorded any more
        self._forget(self._of(slot)[0])

    def known(self, slot: int) -> Known:
        _, seen = self._of(slot)
        if not len(seen):
            return Known(0, None)
        return Known(len(seen), max(0.0, (time.monotonic_ns() - int(seen.max())) / 1e9))

    def home(self, key: int) -> int | None:
        """The leaving slot that a sender is known to have, by the hash of his key; None where he is not known."""
        try:
            found = int(self._maps["senders"][np.array([key], np.uint64)]["slot"])
        except KeyError:
            return None
        return found if found in self.slots() else None

    def _of(self, slot: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """The hashes of those who are known to have a slot, and when they came last."""
        keys, rows = self._maps["senders"].items()
        wanted = rows["slot"] == slot
        return keys[wanted], rows["seen"][wanted]

    def _forget(self, keys: NDArray[np.uint64]) -> None:
        for key in keys:  # one by one: an LRU map may have dropped any of them since, which ends a batch
            try:
                self._maps["senders"].delete(key.reshape(1))
            except KeyError:
                continue

    def _mark(self, slots: set[int]) -> None:
        control = self._control()
        words = [sum(1 << slot % 64 for slot in slots if slot // 64 == word) for word in range(2)]
        control["leaving"][0], control["draining"][0] = words, bool(slots)
        self._maps["control"].update([0], control)

    def _control(self) -> NDArray[np.void]:
        return self._maps["control"].lookup([0])
