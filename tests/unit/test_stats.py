"""The estimator: right on average, honest about noise, blind to drift and to interrupted windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastrecv.bench.results import Configuration, Flood, Interval
from fastrecv.bench.stats import difference, estimate, judge, summarise


def windows(n: int, mean: float, seed: int, spread: float = 0.05) -> NDArray[np.float64]:
    return mean * np.random.default_rng(seed).lognormal(0, spread, n)


def flood(baseline: NDArray[np.float64], **others: NDArray[np.float64]) -> Flood:
    rows = {"baseline": baseline, "again": windows(len(baseline), 700, 99), **others}
    return Flood(
        name="udp4", title="t", counter="c", window_packets=1, warmup_packets=0, order=[[0]] * len(baseline),
        configurations=[Configuration(name=name, title=name, ns=ns.tolist()) for name, ns in rows.items()],
    )  # fmt: skip


def test_a_known_difference_is_found_within_its_interval() -> None:
    found = estimate(windows(600, 700, 1), windows(600, 700 / 0.9, 2))
    assert found.low < -10 < found.high
    assert found.half_width < 1


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = sum(
        not estimate(windows(80, 700, 2 * k), windows(80, 700, 2 * k + 1), resamples=300).excludes(0)
        for k in range(200)
    )
    assert 180 <= hits <= 199  # 95 % of 200 is 190; four binomial standard deviations are 12


def test_drift_that_hits_a_whole_block_does_not_matter() -> None:
    drift = np.linspace(1, 3, 300)
    found = estimate(700 * drift, 770 * drift)
    assert found.estimate == pytest.approx(100 * (1 / 1.1 - 1))
    assert found.half_width == pytest.approx(0)


def test_interrupted_windows_hardly_move_it() -> None:
    baseline, other = windows(500, 700, 1), windows(500, 770, 2)
    quiet = estimate(baseline, other)
    disturbed = other.copy()
    disturbed[::25] *= 40  # one in 25 met something that took 39 windows' time
    assert abs(estimate(baseline, disturbed).estimate - quiet.estimate) < 1


def test_what_shifts_whole_setups_widens_the_interval() -> None:
    rng = np.random.default_rng(1)
    setups = [40] * 18
    shifts = np.repeat(rng.normal(0, 0.03, 18), 40)
    baseline = windows(720, 700, 1, 0.02)
    other = windows(720, 800, 2, 0.02) * (1 + shifts)
    blind, aware = estimate(baseline, other), estimate(baseline, other, setups)
    assert aware.estimate == blind.estimate
    assert aware.half_width > 2 * blind.half_width
    assert aware.low < 100 * (700 / 800 - 1) < aware.high


@given(st.lists(st.integers(1, 30), min_size=8, max_size=20))
def test_setups_of_any_size_are_resampled_whole(setups: list[int]) -> None:
    """Every resampled median lies within the range of the changes, and a shift of all blocks shifts it as much."""
    n = sum(setups)
    baseline, other = windows(n, 700, 1), windows(n, 700, 2)
    found = estimate(baseline, other, setups, resamples=50)
    changes = 100 * (baseline / other - 1)
    assert changes.min() <= found.low <= found.high <= changes.max()
    assert found.estimate == pytest.approx(np.median(changes))


def test_the_same_windows_give_the_same_interval() -> None:
    assert estimate(windows(100, 1, 1), windows(100, 1, 2)) == estimate(windows(100, 1, 1), windows(100, 1, 2))


@given(st.floats(0.1, 10), st.integers(2, 50))
def test_a_constant_ratio_has_an_interval_of_no_width(ratio: float, blocks: int) -> None:
    found = estimate(np.full(blocks, 100.0), np.full(blocks, 100.0 * ratio))
    assert found.low == found.high == found.estimate == pytest.approx(100 * (1 / ratio - 1))


@pytest.mark.parametrize(
    ("delta", "verdict"),
    [
        ((-5.0, -6.0, -4.0), "slower"),
        ((5.0, 4.0, 6.0), "faster"),
        ((-0.5, -1.5, 0.5), "not resolved"),  # its interval has 0 in it
        ((-0.3, -0.4, -0.2), "not resolved"),  # sure, but smaller than what two equal things differ by
    ],
)
def test_a_difference_is_resolved_only_beyond_its_interval_and_the_noise(
    delta: tuple[float, float, float], verdict: str
) -> None:
    noise = Interval(estimate=0.1, low=-0.4, high=0.6)
    assert judge(Interval(estimate=delta[0], low=delta[1], high=delta[2]), noise) == verdict


def test_a_summary_has_the_letters_figures_and_the_verdicts() -> None:
    record = flood(windows(200, 700, 1), attached=windows(200, 800, 3), harness=windows(200, 70, 4))
    summarise(record)
    baseline, again, attached, harness = record.configurations
    pps = 1e9 / np.asarray(baseline.ns)
    assert baseline.pps_mean == pytest.approx(pps.mean())
    assert baseline.pps_sstdev == pytest.approx(100 * np.std(pps, ddof=1) / pps.mean())
    assert baseline.delta is None
    assert [row.verdict for row in (baseline, again, attached, harness)] == [
        "reference", "noise floor", "slower", "source alone"
    ]  # fmt: skip
    assert harness.delta is None
    assert record.gates[-1].name == "A/A"
    assert record.gates[-1].passed


def test_outliers_are_counted_and_kept() -> None:
    ns = 700 + np.arange(100) / 10
    ns[:3] = 70_000
    record = flood(ns)
    summarise(record)
    assert record.configurations[0].outliers == 3
    assert len(record.configurations[0].ns) == 100


def test_the_gate_fails_when_equal_things_differ() -> None:
    record = flood(windows(300, 700, 1))
    record.configurations[1].ns = windows(300, 730, 2).tolist()
    summarise(record)
    assert not record.gates[-1].passed
    assert "baseline against itself" in record.gates[-1].detail


@pytest.mark.parametrize("blocks", [1, 11])
def test_of_a_few_blocks_nothing_is_judged(blocks: int) -> None:
    record = flood(windows(blocks, 700, 1), attached=windows(blocks, 900, 3))
    summarise(record)
    assert record.configurations[2].verdict == "not resolved"
    assert record.gates == []


def test_differences_of_runs_add_their_noise() -> None:
    first, second = Interval(estimate=-5, low=-8, high=-2), Interval(estimate=-9, low=-13, high=-5)
    found = difference(first, second)
    assert found.estimate == -4
    assert found.half_width == pytest.approx(5)  # 3, 4, 5
