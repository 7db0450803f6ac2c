"""Buckets: which slot of a balanced group has which share of the senders, and how that changes with the fewest moves.

A sender's key hashes to a bucket, the bucket names a slot. A change of slots or weights moves buckets of the slots that
have too many, and no others: every sender whose bucket stays, stays.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

__all__ = ["EMPTY", "Table", "interleaved", "rebalance", "shares"]

EMPTY = 0xFFFF
"""The slot of a bucket that nobody has."""

Table = NDArray[np.uint16]


def shares(table: Table) -> dict[int, int]:
    """How many buckets each slot has; EMPTY counts those of nobody."""
    slots, counts = np.unique(table, return_counts=True)
    return dict(zip(slots.tolist(), counts.tolist(), strict=True))


def rebalance(table: Table, weights: Mapping[int, int]) -> Table:
    """The table for these slots and weights that differs from `table` in the fewest buckets.

    table : uint16, shape (buckets,), the slot of each. weights : slot -> a positive integer; slots that are not there
    lose all their buckets. Of B buckets a slot with weight w out of W gets B * w / W, rounded up or down; rounded up
    are those that have the buckets already, then those with the largest remainder, then the lowest slots. Without
    slots every bucket is EMPTY. ValueError for a weight that is not positive, or a slot that is none.
    """
    _check(weights)
    following = table.copy()
    if not weights:
        following[:] = EMPTY
        return following
    have = shares(table)
    due = _due(len(table), weights, have)
    # Surplus buckets are free; which of a slot's buckets go makes no difference to anybody but their senders.
    free = ~np.isin(table, list(weights))
    for slot, count in due.items():
        free[np.flatnonzero(table == slot)[count:]] = True
    missing = [np.full(max(count - have.get(slot, 0), 0), slot, table.dtype) for slot, count in sorted(due.items())]
    following[free] = np.concatenate(missing)
    return following


def interleaved(buckets: int, weights: Mapping[int, int]) -> Table:
    """The table that deals the buckets out in turn, so that bucket i (CPU i) has the i-th slot, and round again.

    A slot of weight w has w turns. Changes of slots move most buckets. ValueError as `rebalance`.
    """
    _check(weights)
    turns = [slot for slot, weight in sorted(weights.items()) for _ in range(weight)] or [EMPTY]
    return np.resize(np.array(turns, np.uint16), buckets)


def _check(weights: Mapping[int, int]) -> None:
    for slot, weight in weights.items():
        if not 0 <= slot < EMPTY:
            raise ValueError(f"slot {slot}: give 0 to {EMPTY - 1}")
        if weight < 1:
            raise ValueError(f"slot {slot} has weight {weight}: give 1 or more, or leave the slot out")


def _due(buckets: int, weights: Mapping[int, int], have: Mapping[int, int]) -> dict[int, int]:
    """How many buckets each slot is to have."""
    total = sum(weights.values())
    due = {slot: buckets * weight // total for slot, weight in weights.items()}
    rest = {slot: buckets * weight % total for slot, weight in weights.items()}
    rounded = sorted(
        (slot for slot in weights if rest[slot]), key=lambda slot: (have.get(slot, 0) <= due[slot], -rest[slot], slot)
    )
    for slot in rounded[: buckets - sum(due.values())]:
        due[slot] += 1
    return due
