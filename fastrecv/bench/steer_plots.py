"""The picture of `steer`: what each way of choosing changes against one socket, and against the kernel's own hash."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastrecv.bench.drawing import (
    BAND,
    INK,
    MUTED,
    PLACEHOLDERS,
    ROW,
    beside,
    bounds,
    drawing,
    label_rows,
    legend,
    share_axis,
    signed,
    svg,
)
from fastrecv.bench.results import Configuration, Flood, Result
from fastrecv.bench.ways import HASH, ONE_SENDER

__all__ = ["steer"]

_INKS = {"again": "again", HASH: "base", "modulo": "c4", "connected": "c3"}


def steer(result: Result) -> str:
    """A panel a flood. From the dashed line on, the group as the kernel spreads it, it is the program that costs.

    What has one sender only is drawn against its like: one sender alone is faster by far, and would stretch the axis.
    """
    rows = [[row for row in flood.configurations if row.delta and row.name != ONE_SENDER] for flood in result.floods]
    with drawing([len(flood) * ROW for flood in rows]) as (figure, panels):
        for flood, listed, axes in zip(result.floods, rows, panels, strict=True):
            _panel(flood, listed, axes)
        share_axis(panels)
        for axes in panels:
            axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %".replace("-", "\u2212")))
        panels[-1].set_xlabel("\u0394 rx pps against one socket of the same block")
        this_run = Line2D([], [], color=INK, marker="o", markersize=7, linewidth=3, label="this run, 95 % interval")
        noise = Patch(facecolor=BAND, edgecolor=MUTED, linewidth=0.5, label="A/A half-width (noise floor)")
        hashed = Line2D([], [], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="the kernel's hash")
        legend(figure, [this_run, noise, hashed])
        names = ", ".join(flood.name for flood in result.floods)
        return svg(figure, "steer", f"Change of rx pps by way of choosing a socket, with 95 % intervals, {names}")


def _panel(flood: Flood, rows: list[Configuration], axes: Axes) -> None:
    label_rows(axes, rows, f"{flood.name}: {flood.title}")
    half = flood.noise.half_width
    axes.axvspan(-half, half, color=BAND, linewidth=0)
    axes.axvline(0, color=INK, linewidth=1)
    hashed = flood.row(HASH).delta
    assert hashed is not None
    axes.axvline(hashed.estimate, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    for y, row in enumerate(rows):
        shown = row.change if row.against == ONE_SENDER else row.delta
        assert shown is not None
        ink = PLACEHOLDERS[_INKS.get(row.name, "c1" if row.name.startswith("classic") else "c2")]
        axes.plot([shown.low, shown.high], [y, y], color=ink, linewidth=3, solid_capstyle="butt")
        axes.plot(shown.estimate, y, "o", color=ink, markersize=7)
        beside(axes, y, f"{signed(shown.estimate)} %  {bounds(shown)}", _note(row))


def _note(row: Configuration) -> str:
    if row.change is None:
        return ""
    return "against one-sender" if row.against == ONE_SENDER else f"{signed(row.change.estimate)} % against hash"
