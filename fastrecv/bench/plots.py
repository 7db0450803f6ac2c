"""The pictures of a run: what each configuration changes, every window, the run as time went by, where the CPU was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import scipy.ndimage
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray

from fastrecv.bench import letter
from fastrecv.bench.drawing import (
    BAND,
    GRID,
    INK,
    MUTED,
    PLACEHOLDERS,
    ROW,
    beside,
    bounds,
    dots,
    drawing,
    label_ends,
    label_rows,
    legend,
    share_axis,
    signed,
    svg,
)
from fastrecv.bench.results import Configuration, Flood, Result

__all__ = ["drift", "forest", "scale", "shares", "windows"]

_FIXED = {"baseline": "base", "again": "again", "no-program": "c1", "letter": "c2", "assign-only": "c3"}
_FREE = ("c4", "c5", "c6")

_MARKERS = dict(zip(letter.SERIES, "Ds", strict=True))


def forest(result: Result) -> str:
    """The main plot: what each configuration changes, against the noise of this run and beside the letter's figures."""
    rows = [[row for row in flood.configurations if row.delta is not None] for flood in result.floods]
    with drawing([len(flood) * ROW for flood in rows]) as (figure, panels):
        for flood, listed, axes in zip(result.floods, rows, panels, strict=True):
            label_rows(axes, listed, f"{flood.name}: {flood.title}")
            half = flood.noise.half_width
            axes.axvspan(-half, half, color=BAND, linewidth=0)
            axes.axvline(0, color=INK, linewidth=1)
            for y, row in enumerate(listed):
                assert row.delta is not None
                ink = _placeholder(result, row)
                axes.plot([row.delta.low, row.delta.high], [y, y], color=ink, linewidth=3, solid_capstyle="butt")
                axes.plot(row.delta.estimate, y, "o", color=ink, markersize=7)
                beside(axes, y, f"{signed(row.delta.estimate)} %  {bounds(row.delta)}")
                _letter_marks(axes, y, partial(letter.delta, flood=flood.name, row=row.name))
        share_axis(panels)
        for axes in panels:
            axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %".replace("-", "\u2212")))
        panels[-1].set_xlabel("\u0394 rx pps against the baseline of the same block")
        this_run = Line2D([], [], color=INK, marker="o", markersize=7, linewidth=3, label="this run, 95 % interval")
        noise = Patch(facecolor=BAND, edgecolor=MUTED, linewidth=0.5, label="A/A half-width (noise floor)")
        legend(figure, [this_run, noise, *_letter_legend()])
        return svg(figure, "forest", f"Change of rx pps per configuration with 95 % intervals, {_names(result)}")


def scale(result: Result) -> str:
    """The cost of a rule set against its size; rows that have no size are level lines to compare with."""
    with drawing([240.0] * len(result.floods), left=76.0) as (figure, panels):
        for flood, axes in zip(result.floods, panels, strict=True):
            axes.set_title(f"{flood.name}: {flood.title}")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=12))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %".replace("-", "\u2212")))
            axes.grid(axis="both", color=GRID, linewidth=0.8)
            half = flood.noise.half_width
            axes.axhspan(-half, half, color=BAND, linewidth=0)
            axes.axhline(0, color=INK, linewidth=1)
            ends = _scale_lines(result, flood, axes)
            axes.margins(x=0.06)
            label_ends(axes, ends)
            axes.set_ylabel("\u0394 rx pps against the baseline")
        panels[-1].set_xlabel("entries in the rule set (logarithmic)")
        this_run = Line2D([], [], color=INK, marker="o", markersize=6, linewidth=1.5, label="this run, 95 % interval")
        noise = Patch(facecolor=BAND, edgecolor=MUTED, linewidth=0.5, label="A/A half-width (noise floor)")
        legend(figure, [this_run, noise])
        return svg(figure, "scale", f"Change of rx pps against the size of the rule set, {_names(result)}")


def _scale_lines(result: Result, flood: Flood, axes: Axes) -> list[tuple[float, str, str]]:
    """Draw a line per series of rows; returns where each ends, its label and its colour."""
    ends = []
    series: dict[str, list[Configuration]] = {}
    for row in flood.configurations:
        if row.delta is not None and row.name != "again":
            series.setdefault(_series(row), []).append(row)
    for name, rows in series.items():
        ink = _placeholder(result, rows[0])
        deltas = [row.delta for row in rows if row.delta is not None]
        sizes = [row.entries for row in rows if row.entries is not None]
        if len(sizes) < len(rows):
            axes.axhline(deltas[-1].estimate, color=ink, linewidth=1.5, linestyle=(0, (5, 3)))
        else:
            low, middle, high = (np.array([getattr(d, part) for d in deltas]) for part in ("low", "estimate", "high"))
            axes.errorbar(sizes, middle, [middle - low, high - middle], color=ink, marker="o", capsize=4, linewidth=1.5)
        ends.append((deltas[-1].estimate, f"{name}  {signed(deltas[-1].estimate)} %", ink))
    return ends


def windows(result: Result) -> str:
    """Every window as a dot. The traffic source alone is left out: it is faster by orders of magnitude."""
    with drawing([len(_measured(flood)) * ROW for flood in result.floods]) as (figure, panels):
        random = np.random.default_rng(0)
        for flood, axes in zip(result.floods, panels, strict=True):
            rows = _measured(flood)
            label_rows(axes, rows, f"{flood.name}: {flood.title}")
            low, high = _axis_range(rows)
            axes.set_xlim(low, high)
            for y, row in enumerate(rows):
                pps = _pps(row)
                inside = pps[(pps >= low) & (pps <= high)]
                jitter = 0.4 * _density(inside) * random.uniform(-1, 1, len(inside))
                dots(axes, inside, y + jitter, _placeholder(result, row), 2.6, 0.55)
                middle = float(np.median(pps))
                axes.plot([middle, middle], [y - 0.42, y + 0.42], color=INK, linewidth=2)
                beside(axes, y, f"{middle:,.0f} pps", _outside(len(pps) - len(inside)))
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        panels[-1].set_xlabel("rx packets per second (axis does not start at 0)")
        dot = Line2D([], [], color=INK, marker="o", markersize=3, linestyle="", label="one window")
        median = Line2D([], [], color=INK, marker="|", markersize=12, markeredgewidth=2, linestyle="", label="median")
        legend(figure, [dot, median])
        return svg(figure, "windows", f"Received packets per second of every window, {_names(result)}")


def drift(result: Result) -> str:
    """The run as time went by: a dot per window and a running median per configuration."""
    with drawing([230.0] * len(result.floods), left=76.0) as (figure, panels):
        for flood, axes in zip(result.floods, panels, strict=True):
            rows = _measured(flood)
            axes.set_title(f"{flood.name}: {flood.title}")
            low, high = _axis_range(rows)
            outside, ends = 0, []
            for row in rows:
                pps = _pps(row)
                blocks = np.arange(1.0, len(pps) + 1)
                inside = (pps >= low) & (pps <= high)
                outside += int((~inside).sum())
                ink = _placeholder(result, row)
                dots(axes, blocks[inside], pps[inside], ink, 2.2, 0.3)
                smooth = scipy.ndimage.median_filter(pps, max(3, len(pps) // 20 | 1), mode="reflect")
                axes.plot(blocks, smooth, color=ink, linewidth=1.6)
                ends.append((float(smooth[-1]), row.name, ink))
            axes.set_xlim(0, max(len(row.ns) for row in rows) + 1)
            axes.set_ylim(low, high)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(6))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.set_ylabel("rx packets per second")
            label_ends(axes, ends)
            axes.set_title(_outside(outside), loc="right", color=MUTED, fontweight="normal", fontsize=9.5)
        panels[-1].set_xlabel("block, in the order of time")
        dot = Line2D([], [], color=INK, marker="o", markersize=3, linestyle="", label="one window")
        line = Line2D([], [], color=INK, linewidth=1.6, label="running median")
        legend(figure, [dot, line])
        return svg(figure, "drift", f"Received packets per second over the blocks, {_names(result)}")


def shares(result: Result) -> str | None:
    """CPU shares of the lookup function beside the letter's; None where nothing was profiled."""
    profiled = [(flood, [row for row in flood.configurations if row.share is not None]) for flood in result.floods]
    profiled = [(flood, rows) for flood, rows in profiled if rows]
    if not profiled:
        return None
    with drawing([len(rows) * ROW for _, rows in profiled]) as (figure, panels):
        for (flood, rows), axes in zip(profiled, panels, strict=True):
            for y, row in enumerate(rows):
                assert row.share is not None
                percent, error = row.share.percent, row.share.standard_error
                ink = _placeholder(result, row)
                axes.barh(y - 0.08, percent, 0.4, color=ink, xerr=error, error_kw={"ecolor": INK, "capsize": 4})
                beside(axes, y, f"{percent:.1f} \u00b1 {error:.1f} %")
                _letter_marks(axes, y, partial(letter.share, flood=flood.name, row=row.name))
                title = f"{flood.name}: samples of {row.share.event} in {row.share.symbol}"
            label_rows(axes, rows, title)
        share_axis(panels)
        for axes in panels:
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        panels[-1].set_xlabel("inclusive share of the samples")
        bar = Patch(facecolor=MUTED, label="this run \u00b1 standard error")
        legend(figure, [bar, *_letter_legend()])
        return svg(figure, "shares", f"CPU share of the lookup function per configuration, {_names(result)}")


def _names(result: Result) -> str:
    return ", ".join(flood.name for flood in result.floods)


def _series(row: Configuration) -> str:
    """What rows of one program with rule sets of several sizes have in common."""
    return row.name.removesuffix(f"-{row.entries}")


def _placeholder(result: Result, row: Configuration) -> str:
    """The colour that `row` has in all plots of `result`."""
    series = [_series(other) for flood in result.floods for other in _measured(flood)]
    free = [name for name in dict.fromkeys(series) if name not in _FIXED]
    name = _series(row)
    return PLACEHOLDERS[_FIXED[name] if name in _FIXED else _FREE[free.index(name) % len(_FREE)]]


def _measured(flood: Flood) -> list[Configuration]:
    return [row for row in flood.configurations if row.name != "harness"]


def _pps(row: Configuration) -> NDArray[np.float64]:
    return 1e9 / np.asarray(row.ns, float)


def _axis_range(rows: Iterable[Configuration]) -> tuple[float, float]:
    """A range for all rows that a few far windows cannot stretch: the middle nine tenths of each and half as much.

    At least one window is left out at either end: a percentile of five windows would reach for the farthest.
    """
    lows, highs = [], []
    for row in rows:
        pps = np.sort(_pps(row))
        cut = min(1 + len(pps) // 20, (len(pps) - 1) // 2)
        low, high = pps[cut], pps[-1 - cut]
        reach = (high - low) / 2
        lows.append(max(low - reach, pps.min()))
        highs.append(min(high + reach, pps.max()))
    margin = (max(highs) - min(lows)) / 40 or max(highs) / 100
    return float(min(lows) - margin), float(max(highs) + margin)


def _outside(count: int) -> str:
    return f"{count:,} {'dot' if count == 1 else 'dots'} beyond the axis" if count else ""


def _density(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each value how crowded it is there, up to 1: dots jittered by it show the shape of the distribution."""
    if not len(values):
        return values
    counts, edges = np.histogram(values, bins=max(1, min(50, int(len(values) ** 0.6))))
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(counts) - 1)
    return np.asarray(counts[bins] / counts.max(), float)


def _letter_marks(axes: Axes, y: float, figure_of: Callable[[str], float | None]) -> None:
    for series, marker in _MARKERS.items():
        value = figure_of(series)
        if value is not None:
            axes.plot(value, y + 0.3, marker, markersize=6, markerfacecolor="none", markeredgecolor=INK)


def _letter_legend() -> list[Line2D]:
    return [
        Line2D([], [], linestyle="", marker=marker, markersize=6, markerfacecolor="none", markeredgecolor=INK,
               label=f"letter {series}")
        for series, marker in _MARKERS.items()
    ]  # fmt: skip
