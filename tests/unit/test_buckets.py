"""Buckets: the fewest moves there can be, and shares within one bucket of what is due."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrecv.buckets import EMPTY, Table, rebalance, shares

WEIGHTS = st.dictionaries(st.integers(0, 12), st.integers(1, 9), min_size=1, max_size=8)


def built(history: list[dict[int, int]], buckets: int) -> Table:
    table = np.full(buckets, EMPTY, np.uint16)
    for weights in history:
        table = rebalance(table, weights)
    return table


@given(st.lists(WEIGHTS, min_size=1, max_size=6), st.integers(1, 600))
def test_every_slot_has_its_share_within_one_bucket(history: list[dict[int, int]], buckets: int) -> None:
    table = built(history, buckets)
    total = sum(history[-1].values())
    counts = shares(table)
    assert set(counts) <= set(history[-1])
    for slot, weight in history[-1].items():
        assert abs(counts.get(slot, 0) - Fraction(buckets * weight, total)) < 1


@given(st.lists(WEIGHTS, min_size=1, max_size=4), WEIGHTS, st.integers(1, 400))
def test_no_other_table_with_such_shares_moves_fewer(
    history: list[dict[int, int]], weights: dict[int, int], buckets: int
) -> None:
    before = built(history, buckets)
    after = rebalance(before, weights)
    have = shares(before)
    total = sum(weights.values())
    # A slot keeps at most what it has and at most its share rounded up; only so many can be rounded up.
    floors = {slot: buckets * weight // total for slot, weight in weights.items()}
    ups = buckets - sum(floors.values())
    kept = sum(min(have.get(slot, 0), floor) for slot, floor in floors.items())
    gains = sum(have.get(slot, 0) > floor and buckets * weights[slot] % total > 0 for slot, floor in floors.items())
    assert np.count_nonzero(before == after) == kept + min(ups, gains)


def test_the_fewest_moves_by_trying_all_tables() -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        before = rng.integers(0, 3, 6).astype(np.uint16)
        weights = {slot: int(rng.integers(1, 4)) for slot in rng.permutation(4)[: rng.integers(1, 4)].tolist()}
        total = sum(weights.values())
        fewest = min(
            sum(a != b for a, b in zip(before.tolist(), candidate, strict=True))
            for candidate in itertools.product(weights, repeat=6)
            if all(abs(candidate.count(slot) - Fraction(6 * weight, total)) < 1 for slot, weight in weights.items())
        )
        assert np.count_nonzero(before != rebalance(before, weights)) == fewest


def test_what_does_not_change_does_not_move_and_without_slots_nobody_has_a_bucket() -> None:
    table = built([{0: 1, 1: 1, 2: 2}], 4093)
    assert np.array_equal(rebalance(table, {2: 4, 1: 2, 0: 2}), table)
    assert shares(rebalance(table, {})) == {EMPTY: 4093}


@pytest.mark.parametrize("weights", [{0: 0}, {0: -1}, {-1: 1}, {EMPTY: 1}])
def test_what_makes_no_sense_is_refused(weights: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="give"):
        rebalance(np.zeros(8, np.uint16), weights)


def test_senders_move_no_more_than_buckets_do() -> None:
    """10,000 senders, 4096 buckets, 4 to 5 to 3 slots: the moved share is the ideal one, within 1.1."""
    senders = np.random.default_rng(2).integers(0, 4096, 10_000)
    table = built([dict.fromkeys(range(4), 1)], 4096)
    for before, after in ((4, 5), (5, 3)):
        following = rebalance(table, dict.fromkeys(range(after), 1))
        moved = np.count_nonzero(table[senders] != following[senders]) / len(senders)
        ideal = abs(after - before) / max(before, after)
        assert moved <= 1.1 * ideal
        table = following
