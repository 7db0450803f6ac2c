"""The pictures of a run, as SVG text in which every colour is a CSS variable and every label stays text.

So one drawing serves a light page and a dark one, and prints in the fonts of whoever reads it. matplotlib knows no
variables: it draws with placeholder colours, which are replaced in what it wrote.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

import matplotlib
import numpy as np
import scipy.ndimage
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray

from fastrecv.bench import letter
from fastrecv.bench.results import Configuration, Flood, Interval, Result

__all__ = ["bounds", "colour", "drift", "forest", "scale", "shares", "signed", "standalone", "theme", "windows"]

# Variable: its colour on a light page, on a dark one. c1 to c6 differ in lightness too, for readers who see few hues.
_THEME = {
    "page": ("#ffffff", "#15181c"),
    "ink": ("#1b2027", "#e8eaed"),
    "muted": ("#59636e", "#9ba5b0"),
    "grid": ("#dde2e7", "#2e343b"),
    "band": ("#e3e7eb", "#2b3138"),
    "base": ("#3b434c", "#cdd3da"),
    "again": ("#7d8791", "#8b95a0"),
    "c1": ("#b35c00", "#f0a24a"),
    "c2": ("#0067a8", "#5ab4ee"),
    "c3": ("#00785a", "#35c79c"),
    "c4": ("#a83279", "#ec8fc6"),
    "c5": ("#6a4fc4", "#b3a1f7"),
    "c6": ("#7a6a00", "#dccb4b"),
}
_PLACEHOLDERS = {name: f"#0a0b{index:02x}" for index, name in enumerate(_THEME)}
_INK, _MUTED, _GRID, _BAND = (_PLACEHOLDERS[name] for name in ("ink", "muted", "grid", "band"))

_FIXED = {"baseline": "base", "again": "again", "no-program": "c1", "letter": "c2", "assign-only": "c3"}
_FREE = ("c4", "c5", "c6")

# Units of the drawing: 1/72 inch, which is one user unit of the SVG.
_WIDTH = 680.0
_LEFT, _RIGHT, _TOP = 194.0, 150.0, 30.0
_TITLE, _FOOT, _GAP = 24.0, 40.0, 14.0
_ROW = 38.0

_MARKERS = dict(zip(letter.SERIES, "Ds", strict=True))


def theme(selector: str) -> str:
    """CSS that gives `selector` the variables of the plots, for a light and (on a screen) for a dark page."""
    light, dark = (";".join(f"--{name}:{pair[side]}" for name, pair in _THEME.items()) for side in (0, 1))
    return f"{selector}{{{light}}}\n@media screen and (prefers-color-scheme: dark){{{selector}{{{dark}}}}}"


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign, and a true minus; what rounds to nothing has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", "\u2212")


def bounds(interval: Interval) -> str:
    """`[low, high]`, with a second decimal where the first would hide the width."""
    digits = 2 if interval.half_width < 0.5 else 1
    return f"[{signed(interval.low, digits)}, {signed(interval.high, digits)}]"


def colour(result: Result, row: Configuration) -> str:
    """The CSS colour that `row` has in all plots of `result`."""
    series = [_series(other) for flood in result.floods for other in flood.configurations if other.name != "harness"]
    free = [name for name in dict.fromkeys(series) if name not in _FIXED]
    name = _series(row)
    if name in _FIXED:
        return f"var(--{_FIXED[name]})"
    return f"var(--{_FREE[free.index(name) % len(_FREE)]})" if name in free else "var(--muted)"


def standalone(svg: str) -> str:
    """The same plot as a file of its own: with a background, and a style that follows the reader's light or dark."""
    head, body = svg.split(">", 1)
    style = f"<style>{theme('svg')}</style>"
    page = '<rect width="100%" height="100%" style="fill: var(--page)"/>'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>\n{style}\n{page}{body}'


def forest(result: Result) -> str:
    """The main plot: what each configuration changes, against the noise of this run and beside the letter's figures."""
    rows = [[row for row in flood.configurations if row.delta is not None] for flood in result.floods]
    with _drawing([len(flood) * _ROW for flood in rows]) as (figure, panels):
        for flood, listed, axes in zip(result.floods, rows, panels, strict=True):
            _label_rows(axes, listed, f"{flood.name}: {flood.title}")
            half = flood.noise.half_width
            axes.axvspan(-half, half, color=_BAND, linewidth=0)
            axes.axvline(0, color=_INK, linewidth=1)
            for y, row in enumerate(listed):
                assert row.delta is not None
                ink = _placeholder(result, row)
                axes.plot([row.delta.low, row.delta.high], [y, y], color=ink, linewidth=3, solid_capstyle="butt")
                axes.plot(row.delta.estimate, y, "o", color=ink, markersize=7)
                _beside(axes, y, f"{signed(row.delta.estimate)} %  {bounds(row.delta)}")
                _letter_marks(axes, y, lambda series, row=row, flood=flood: letter.delta(series, flood.name, row.name))
        _share_axis(panels)
        for axes in panels:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %".replace("-", "\u2212")))
        panels[-1].set_xlabel("\u0394 rx pps against the baseline of the same block")
        this_run = Line2D([], [], color=_INK, marker="o", markersize=7, linewidth=3, label="this run, 95 % interval")
        noise = Patch(facecolor=_BAND, edgecolor=_MUTED, linewidth=0.5, label="A/A half-width (noise floor)")
        _legend(figure, [this_run, noise, *_letter_legend()])
        return _svg(figure, "forest", f"Change of rx pps per configuration with 95 % intervals, {_names(result)}")


def scale(result: Result) -> str:
    """The cost of a rule set against its size; rows that have no size are level lines to compare with."""
    with _drawing([240.0] * len(result.floods)) as (figure, panels):
        for flood, axes in zip(result.floods, panels, strict=True):
            axes.set_title(f"{flood.name}: {flood.title}")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=12))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %".replace("-", "\u2212")))
            axes.grid(axis="both", color=_GRID, linewidth=0.8)
            half = flood.noise.half_width
            axes.axhspan(-half, half, color=_BAND, linewidth=0)
            axes.axhline(0, color=_INK, linewidth=1)
            ends = _scale_lines(result, flood, axes)
            axes.margins(x=0.06)
            _label_ends(axes, ends)
            axes.set_ylabel("\u0394 rx pps against the baseline")
        panels[-1].set_xlabel("entries in the rule set (logarithmic)")
        this_run = Line2D([], [], color=_INK, marker="o", markersize=6, linewidth=1.5, label="this run, 95 % interval")
        noise = Patch(facecolor=_BAND, edgecolor=_MUTED, linewidth=0.5, label="A/A half-width (noise floor)")
        _legend(figure, [this_run, noise])
        return _svg(figure, "scale", f"Change of rx pps against the size of the rule set, {_names(result)}")


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
    with _drawing([len(_measured(flood)) * _ROW for flood in result.floods]) as (figure, panels):
        random = np.random.default_rng(0)
        for flood, axes in zip(result.floods, panels, strict=True):
            rows = _measured(flood)
            _label_rows(axes, rows, f"{flood.name}: {flood.title}")
            low, high = _axis_range(rows)
            axes.set_xlim(low, high)
            for y, row in enumerate(rows):
                pps = _pps(row)
                inside = pps[(pps >= low) & (pps <= high)]
                jitter = 0.4 * _density(inside) * random.uniform(-1, 1, len(inside))
                _dots(axes, inside, y + jitter, _placeholder(result, row), 2.6, 0.55)
                middle = float(np.median(pps))
                axes.plot([middle, middle], [y - 0.42, y + 0.42], color=_INK, linewidth=2)
                _beside(axes, y, f"{middle:,.0f} pps", _outside(len(pps) - len(inside)))
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        panels[-1].set_xlabel("rx packets per second (axis does not start at 0)")
        dot = Line2D([], [], color=_INK, marker="o", markersize=3, linestyle="", label="one window")
        median = Line2D([], [], color=_INK, marker="|", markersize=12, markeredgewidth=2, linestyle="", label="median")
        _legend(figure, [dot, median])
        return _svg(figure, "windows", f"Received packets per second of every window, {_names(result)}")


def drift(result: Result) -> str:
    """The run as time went by: a dot per window and a running median per configuration."""
    with _drawing([230.0] * len(result.floods), left=76.0) as (figure, panels):
        for flood, axes in zip(result.floods, panels, strict=True):
            rows = _measured(flood)
            axes.set_title(f"{flood.name}: {flood.title}")
            low, high = _axis_range(rows)
            outside, ends = 0, []
            for row in rows:
                pps = _pps(row)
                blocks = np.arange(1, len(pps) + 1)
                inside = (pps >= low) & (pps <= high)
                outside += int((~inside).sum())
                ink = _placeholder(result, row)
                _dots(axes, blocks[inside], pps[inside], ink, 2.2, 0.3)
                smooth = scipy.ndimage.median_filter(pps, max(3, len(pps) // 20 | 1), mode="nearest")
                axes.plot(blocks, smooth, color=ink, linewidth=1.6)
                ends.append((float(smooth[-1]), row.name, ink))
            axes.set_xlim(0, max(len(row.ns) for row in rows) + 1)
            axes.set_ylim(low, high)
            axes.grid(axis="y", color=_GRID, linewidth=0.8)
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(6))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.set_ylabel("rx packets per second")
            _label_ends(axes, ends)
            axes.set_title(_outside(outside), loc="right", color=_MUTED, fontweight="normal", fontsize=9.5)
        panels[-1].set_xlabel("block, in the order of time")
        dot = Line2D([], [], color=_INK, marker="o", markersize=3, linestyle="", label="one window")
        line = Line2D([], [], color=_INK, linewidth=1.6, label="running median")
        _legend(figure, [dot, line])
        return _svg(figure, "drift", f"Received packets per second over the blocks, {_names(result)}")


def shares(result: Result) -> str | None:
    """CPU shares of the lookup function beside the letter's; None where nothing was profiled."""
    profiled = [(flood, [row for row in flood.configurations if row.share is not None]) for flood in result.floods]
    profiled = [(flood, rows) for flood, rows in profiled if rows]
    if not profiled:
        return None
    with _drawing([len(rows) * _ROW for _, rows in profiled]) as (figure, panels):
        for (flood, rows), axes in zip(profiled, panels, strict=True):
            for y, row in enumerate(rows):
                assert row.share is not None
                percent, error = row.share.percent, row.share.standard_error
                ink = _placeholder(result, row)
                axes.barh(y - 0.08, percent, 0.4, color=ink, xerr=error, error_kw={"ecolor": _INK, "capsize": 4})
                _beside(axes, y, f"{percent:.1f} \u00b1 {error:.1f} %")
                _letter_marks(axes, y, lambda series, row=row, flood=flood: letter.share(series, flood.name, row.name))
                title = f"{flood.name}: samples of {row.share.event} in {row.share.symbol}"
            _label_rows(axes, rows, title)
        _share_axis(panels)
        for axes in panels:
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        panels[-1].set_xlabel("inclusive share of the samples")
        bar = Patch(facecolor=_MUTED, label="this run \u00b1 standard error")
        _legend(figure, [bar, *_letter_legend()])
        return _svg(figure, "shares", f"CPU share of the lookup function per configuration, {_names(result)}")


def _names(result: Result) -> str:
    return ", ".join(flood.name for flood in result.floods)


def _series(row: Configuration) -> str:
    """What rows of one program with rule sets of several sizes have in common."""
    return row.name.removesuffix(f"-{row.entries}")


def _placeholder(result: Result, row: Configuration) -> str:
    return _PLACEHOLDERS[colour(result, row)[len("var(--") : -1]]


def _measured(flood: Flood) -> list[Configuration]:
    return [row for row in flood.configurations if row.name != "harness"]


def _pps(row: Configuration) -> NDArray[np.float64]:
    return 1e9 / np.asarray(row.ns, float)


def _axis_range(rows: Iterable[Configuration]) -> tuple[float, float]:
    """A range for all rows that a few far windows cannot stretch: the middle nine tenths of each and half as much."""
    lows, highs = [], []
    for row in rows:
        pps = _pps(row)
        low, high = np.percentile(pps, [5, 95])
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


def _dots(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], ink: str, size: float, alpha: float) -> None:
    """All dots as one path of lines without length and with round ends: thousands of marks would make a huge file."""
    corners = np.repeat(np.column_stack([x, y]), 2, axis=0)
    if len(corners):
        path = Path(corners, [Path.MOVETO, Path.LINETO] * len(x))
        axes.add_patch(
            PathPatch(path, fill=False, edgecolor=ink, linewidth=size, alpha=alpha, capstyle="round", zorder=1.5)
        )


def _letter_marks(axes: Axes, y: float, figure_of: Callable[[str], float | None]) -> None:
    for series, marker in _MARKERS.items():
        value = figure_of(series)
        if value is not None:
            axes.plot(value, y + 0.3, marker, markersize=6, markerfacecolor="none", markeredgecolor=_INK)


def _letter_legend() -> list[Line2D]:
    return [
        Line2D([], [], linestyle="", marker=marker, markersize=6, markerfacecolor="none", markeredgecolor=_INK,
               label=f"letter {series}")
        for series, marker in _MARKERS.items()
    ]  # fmt: skip


def _label_rows(axes: Axes, rows: Sequence[Configuration], title: str) -> None:
    """One row a configuration from the top down, its name to the left and below that what it is."""
    axes.set_title(title, x=-(_LEFT - 4) / (_WIDTH - _LEFT - _RIGHT))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    for y, row in enumerate(rows):
        lines = textwrap.wrap(row.title.removeprefix(f"{row.name}: "), 34, max_lines=2, placeholder=" \u2026")
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "va": "center"}
        lift = 5.5 * len(lines)
        axes.annotate(row.name, (0, y), (-10, lift), color=_INK, fontweight="bold", **place)
        for line in lines:
            lift -= 11.5
            axes.annotate(line, (0, y), (-10, lift), color=_MUTED, fontsize=8.5, **place)


def _beside(axes: Axes, y: float, text: str, note: str = "") -> None:
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (1, y), (8, 5.5 if note else 0), color=_INK, fontsize=10, **place)
    if note:
        axes.annotate(note, (1, y), (8, -6.5), color=_MUTED, fontsize=8.5, **place)


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Name lines at their right ends, from the bottom up, pushed apart where they end too close to each other."""
    low, high = axes.get_ylim()
    gap = (high - low) / (axes.get_position().height * axes.figure.get_figheight() * 72 / 13)
    ends = sorted(ends)
    places: list[float] = []
    for value, _, _ in ends:
        places.append(max(value, places[-1] + gap) if places else max(value, low))
    ceiling = high
    for index in reversed(range(len(places))):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - gap
    for (value, text, ink), place in zip(ends, places, strict=True):
        axes.annotate(
            text, (1, value), (1 + 18 / (_WIDTH - 76.0 - _RIGHT), place), xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"), color=_INK, fontsize=10, va="center",
            arrowprops={"arrowstyle": "-", "color": ink, "linewidth": 1.4, "shrinkA": 1, "shrinkB": 0},
        )  # fmt: skip


def _share_axis(panels: Sequence[Axes]) -> None:
    """The same horizontal range for all panels, so that they compare by eye."""
    limits = [axes.get_xlim() for axes in panels]
    for axes in panels:
        axes.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))


def _legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    place = (4 / _WIDTH, 1 - 2 / (72 * figure.get_figheight()))
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=place, borderaxespad=0, borderpad=0.2,
                  ncols=len(handles), frameon=False, fontsize=10, labelcolor=_INK, columnspacing=1.6)  # fmt: skip


@contextlib.contextmanager
def _drawing(heights: Sequence[float], left: float = _LEFT) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with panels of these heights, one below the other, under a line for the legend."""
    settings = {
        "svg.fonttype": "none",
        "text.parse_math": False,  # a title may hold dollar signs
        "font.family": "sans-serif",
        "font.size": 10.5,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": _INK,
        "axes.titlepad": 7,
        "axes.labelcolor": _MUTED,
        "axes.edgecolor": _MUTED,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "xtick.minor.visible": False,
        "xtick.minor.size": 0,
        "ytick.major.size": 0,
        "figure.facecolor": "none",
    }
    height = _TOP + sum(heights) + len(heights) * (_TITLE + _FOOT) + (len(heights) - 1) * -_GAP
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(_WIDTH / 72, height / 72))
        panels, top = [], height - _TOP
        for panel in heights:
            top -= _TITLE + panel
            panels.append(
                figure.add_axes(
                    (left / _WIDTH, top / height, (_WIDTH - left - _RIGHT) / _WIDTH, panel / height),
                )
            )
            top -= _FOOT - _GAP
        yield figure, panels


def _svg(figure: Figure, name: str, label: str) -> str:
    """What matplotlib draws, to stand in a page: variables for placeholders, no metadata, no ids but unique ones."""
    matplotlib.rcParams["svg.hashsalt"] = name  # of the ids; undone with the other settings
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    body = written.getvalue().split(">", 3)[3]  # behind the XML declaration, the document type and the opening tag
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1)  # it would be one for the whole page
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", body)
    body = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', _shorten, body)
    for variable, placeholder in _PLACEHOLDERS.items():
        body = body.replace(placeholder, f"var(--{variable})")
    width, height = (72 * length for length in figure.get_size_inches())
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{html.escape(label)}" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" stroke-linejoin="round">{body}'
    )


def _shorten(attribute: re.Match[str]) -> str:
    """A hundredth of a unit is finer than any screen; a line without length needs its place only once."""
    text = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.2f}", attribute[0])
    return re.sub(r"M (\S+ \S+) \nL \1 \n", r"M\1h0", text)
