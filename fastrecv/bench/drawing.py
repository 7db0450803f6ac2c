"""The canvas of the plots: SVG text in which every colour is a CSS variable and every label stays text.

So one drawing serves a light page and a dark one, and prints in the fonts of whoever reads it. matplotlib knows no
variables: it draws with placeholder colours, which are replaced in what it wrote.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from numpy.typing import NDArray

from fastrecv.bench.results import Configuration, Interval

__all__ = [
    "BAND",
    "GRID",
    "INK",
    "MUTED",
    "PLACEHOLDERS",
    "ROW",
    "beside",
    "bounds",
    "dots",
    "drawing",
    "label_ends",
    "label_rows",
    "legend",
    "share_axis",
    "signed",
    "standalone",
    "svg",
    "theme",
]

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
PLACEHOLDERS = {name: f"#0a0b{index:02x}" for index, name in enumerate(_THEME)}
INK, MUTED, GRID, BAND = (PLACEHOLDERS[name] for name in ("ink", "muted", "grid", "band"))

# Units of the drawing: 1/72 inch, which is one user unit of the SVG.
_WIDTH = 680.0
_LEFT, _RIGHT, _TOP = 194.0, 150.0, 30.0
_TITLE, _FOOT, _GAP = 24.0, 40.0, 14.0
ROW = 38.0


def theme(selector: str) -> str:
    """CSS that gives `selector` the variables of the plots, for a light and (on a screen) for a dark page."""
    light, dark = (";".join(f"--{name}:{pair[side]}" for name, pair in _THEME.items()) for side in (0, 1))
    return f"{selector}{{{light}}}\n@media screen and (prefers-color-scheme: dark){{{selector}{{{dark}}}}}"


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign, and a true minus; what rounds to nothing has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", "\u2212")


def bounds(interval: Interval) -> str:
    """`[low, high]`."""
    return f"[{signed(interval.low, 2)}, {signed(interval.high, 2)}]"


def standalone(svg: str) -> str:
    """The same plot as a file of its own: with a background, and a style that follows the reader's light or dark."""
    head, body = svg.split(">", 1)
    style = f"<style>{theme('svg')}</style>"
    page = '<rect width="100%" height="100%" style="fill: var(--page)"/>'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>\n{style}\n{page}{body}'


def dots(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], ink: str, size: float, alpha: float) -> None:
    """All dots as one path of lines without length and with round ends: thousands of marks would make a huge file."""
    corners = np.repeat(np.column_stack([x, y]), 2, axis=0)
    if len(corners):
        path = Path(corners, [Path.MOVETO, Path.LINETO] * len(x))
        axes.add_patch(
            PathPatch(path, fill=False, edgecolor=ink, linewidth=size, alpha=alpha, capstyle="round", zorder=1.5)
        )


def label_rows(axes: Axes, rows: Sequence[Configuration], title: str) -> None:
    """One row a configuration from the top down, its name to the left and below that what it is."""
    axes.set_title(title, x=-(_LEFT - 4) / (_WIDTH - _LEFT - _RIGHT))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    for y, row in enumerate(rows):
        lines = textwrap.wrap(row.title.removeprefix(f"{row.name}: "), 34, max_lines=2, placeholder=" \u2026")
        place: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "textcoords": "offset points",
            "ha": "right",
            "va": "center",
        }
        lift = 5.5 * len(lines)
        axes.annotate(row.name, (0, y), (-10, lift), color=INK, fontweight="bold", **place)
        for line in lines:
            lift -= 11.5
            axes.annotate(line, (0, y), (-10, lift), color=MUTED, fontsize=8.5, **place)


def beside(axes: Axes, y: float, text: str, note: str = "") -> None:
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (1, y), (8, 5.5 if note else 0), color=INK, fontsize=10, **place)
    if note:
        axes.annotate(note, (1, y), (8, -6.5), color=MUTED, fontsize=8.5, **place)


def label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Name lines at their right ends, from the bottom up, pushed apart where they end too close to each other."""
    low, high = axes.get_ylim()
    gap = (high - low) / (axes.bbox.height / axes.figure.dpi * 72 / 13)
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
            textcoords=("axes fraction", "data"), color=INK, fontsize=10, va="center",
            arrowprops={"arrowstyle": "-", "color": ink, "linewidth": 1.4, "shrinkA": 1, "shrinkB": 0,
                        "relpos": (0, 0.5)},  # from the label's left edge: a steep line would cross its text
        )  # fmt: skip


def share_axis(panels: Sequence[Axes]) -> None:
    """The same horizontal range for all panels, so that they compare by eye."""
    limits = [axes.get_xlim() for axes in panels]
    for axes in panels:
        axes.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))


def legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    place = (4 / _WIDTH, 1 - 2 / (72 * figure.get_figheight()))
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=place, borderaxespad=0, borderpad=0.2,
                  ncols=len(handles), frameon=False, fontsize=10, labelcolor=INK, columnspacing=1.6)  # fmt: skip


@contextlib.contextmanager
def drawing(heights: Sequence[float], left: float = _LEFT) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with panels of these heights, one below the other, under a line for the legend."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "path.simplify": False,  # it would drop the lines without length that are the dots
        "text.parse_math": False,  # a title may hold dollar signs
        "font.family": "sans-serif",
        "font.size": 10.5,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": INK,
        "axes.titlepad": 7,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": MUTED,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
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


def svg(figure: Figure, name: str, label: str) -> str:
    """What matplotlib draws, to stand in a page: variables for placeholders, no metadata, no ids but unique ones."""
    matplotlib.rcParams["svg.hashsalt"] = name  # of the ids; undone with the other settings
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    body = written.getvalue().split(">", 3)[3]  # behind the XML declaration, the document type and the opening tag
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1)  # it would be one for the whole page
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", body)
    body = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', _shorten, body)
    for variable, placeholder in PLACEHOLDERS.items():
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
