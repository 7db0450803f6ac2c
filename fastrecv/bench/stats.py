"""From windows to a statement: the median of per-block ratios, its bootstrap interval, and a verdict.

Drift hits all configurations of a block alike, so a ratio within a block is free of it; the median does not care how
far an interrupted window lies out. The A/A row says how much two equal things differ here: what is smaller is not
resolved.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy  # its parts when they are asked for: statistics alone take half a second to import
from numpy.typing import ArrayLike, NDArray

from fastrecv.bench.results import Flood, Gate, Interval, Verdict

__all__ = ["MIN_BLOCKS", "difference", "estimate", "judge", "summarise"]

MIN_BLOCKS = 12  # of fewer a 99.9 % interval would exclude the truth by chance, so nothing is judged
_RESAMPLES = 2999
_WIDE_RESAMPLES = 9999  # the tails of a 99.9 % interval need more
_MIN_SETUPS = 8
_BATCH = 100  # resamples at a time: bounds the memory of a run of thousands of blocks


def _changes(baseline: ArrayLike, other: ArrayLike) -> NDArray[np.float64]:
    """Per block, by how many percent the rx pps of `other` differ from those of `baseline` (both in ns a packet)."""
    changes: NDArray[np.float64] = 100 * (np.asarray(baseline, float) / np.asarray(other, float) - 1)
    return changes


def estimate(
    baseline: ArrayLike,
    other: ArrayLike,
    setups: Sequence[int] = (),
    level: float = 0.95,
    resamples: int = _RESAMPLES,
) -> Interval:
    """The median over blocks of the change in rx pps, with a percentile bootstrap interval.

    baseline, other : (n,) ns a packet, one a block. setups : how many of the blocks belong to each set-up of the lab,
    in their order. Whole set-ups are resampled, since what is fixed for the life of one shifts all its blocks together;
    where there are fewer than eight, blocks are. The resampling is seeded: the same windows give the same interval.
    """
    changes = _changes(baseline, other)
    middle = float(np.median(changes))
    groups = list(setups) if len(setups) >= _MIN_SETUPS else [1] * len(changes)
    if len(groups) < 2 or np.ptp(changes) == 0:  # scipy has no interval for one value, or for a constant
        return Interval(estimate=middle, low=middle, high=middle, level=level)
    table = np.full((len(groups), max(groups)), np.nan)  # a row a group, filled up with NaN
    table[np.arange(table.shape[1]) < np.array(groups)[:, None]] = changes

    def statistic(drawn: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        """The median of all blocks of the drawn groups, for each resample; `axis` is always the last."""
        values = np.sort(table[drawn].reshape(*drawn.shape[:axis], -1), axis=axis)  # NaN goes to the end
        middles = (np.count_nonzero(~np.isnan(values), axis=axis) - 1) / 2
        pair = [np.take_along_axis(values, edge(middles).astype(int)[..., None], axis) for edge in (np.floor, np.ceil)]
        medians: NDArray[np.float64] = np.mean(pair, axis=0)[..., 0]
        return medians

    interval = scipy.stats.bootstrap(
        (np.arange(len(groups)),), statistic, confidence_level=level, n_resamples=resamples, batch=_BATCH,
        method="percentile", vectorized=True, rng=0,
    ).confidence_interval  # fmt: skip
    return Interval(estimate=middle, low=float(interval.low), high=float(interval.high), level=level)


def difference(first: Interval, second: Interval) -> Interval:
    """`second` - `first` of two independent runs, in percentage points; half-widths add in quadrature."""
    middle = second.estimate - first.estimate
    half = (first.half_width**2 + second.half_width**2) ** 0.5
    return Interval(estimate=middle, low=middle - half, high=middle + half, level=first.level)


def judge(delta: Interval, noise: Interval) -> Verdict:
    """Resolved only where the interval excludes 0 and the difference is larger than the A/A half-width."""
    if not delta.excludes(0) or abs(delta.estimate) <= noise.half_width:
        return "not resolved"
    return "slower" if delta.estimate < 0 else "faster"


def summarise(flood: Flood) -> None:
    """Fill in what is derived from the windows of a flood, and its A/A gate where there are blocks enough for one."""
    baseline = flood.row("baseline")
    for row in flood.configurations:
        pps = 1e9 / np.asarray(row.ns)
        row.pps_mean = float(pps.mean())
        row.pps_sstdev = float(100 * pps.std(ddof=1) / pps.mean()) if len(pps) > 1 else 0.0
        low, high = np.percentile(pps, [25, 75])
        reach = 1.5 * (high - low)  # Tukey's fences
        row.outliers = int(((pps < low - reach) | (pps > high + reach)).sum())
        if row.name == "harness":
            row.verdict = "source alone"
        elif row is not baseline:
            row.delta = estimate(baseline.ns, row.ns, flood.setups)
        if row.against is not None:
            row.change = estimate(flood.row(row.against).ns, row.ns, flood.setups)
    enough = len(flood.order) >= MIN_BLOCKS
    for row in flood.configurations:
        if row.name == "again":
            row.verdict = "noise floor"
        elif row.delta is not None:
            row.verdict = judge(row.delta, flood.noise) if enough else "not resolved"
        if row.change is not None:
            row.change_verdict = judge(row.change, flood.noise) if enough else "not resolved"
    if enough:
        wide = estimate(baseline.ns, flood.row("again").ns, flood.setups, 0.999, _WIDE_RESAMPLES)
        flood.gates.append(
            Gate(
                name="A/A",
                passed=not wide.excludes(0),
                detail=f"baseline against itself: {wide.estimate:+.2f} % [{wide.low:+.2f}, {wide.high:+.2f}] at 99.9 %",
            )
        )
