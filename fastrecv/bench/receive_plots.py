"""The picture of the receive bench: datagrams a second of every contender, a panel a group."""

from __future__ import annotations

from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastrecv.bench.drawing import GRID, INK, PLACEHOLDERS, beside, drawing, legend, share_axis, standalone, svg
from fastrecv.bench.receive_results import Group, ReceiveResult

__all__ = ["figure"]

_INKS = {"limit": "base", "python": "again", "asyncio": "c1", "fastrecv": "c2"}
_LABELS = {"limit": "C", "python": "socket module", "asyncio": "event loops' own", "fastrecv": "fastrecv"}
_ROW = 22.0
_LEFT = 250.0


def _drawn(result: ReceiveResult) -> list[Group]:
    """The payload sizes where they were measured; what they were not part of, else."""
    payloads = [group for group in result.groups if group.name.startswith("payload-")]
    return payloads or result.groups


def figure(result: ReceiveResult) -> str:
    """Bars from 0 on one axis for all panels: lengths compare, within a panel and across. An SVG file of its own."""
    groups = [(group, [row for row in group.rows if row.ns]) for group in _drawn(result)]
    with drawing([max(len(rows), 1) * _ROW for _, rows in groups], left=_LEFT) as (drawn, panels):
        for (group, rows), axes in zip(groups, panels, strict=True):
            axes.set_title(f"{group.name}: {group.title}", x=-(_LEFT - 4) / (680 - _LEFT - 150))
            axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)  # a gate may have failed before any was measured
            axes.set_yticks(range(len(rows)), [row.title for row in rows], color=INK)
            axes.grid(axis="x", color=GRID, linewidth=0.8)
            for y, row in enumerate(rows):
                axes.barh(y, row.rate / 1e6, 0.66, color=PLACEHOLDERS[_INKS[row.kind]])
                beside(axes, y, f"{row.rate:,.0f}/s")
        share_axis(panels)
        for axes in panels:
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[-1].set_xlabel("million datagrams a second, median over rounds")
        kinds = dict.fromkeys(row.kind for _, rows in groups for row in rows)
        legend(drawn, [Patch(facecolor=PLACEHOLDERS[_INKS[kind]], label=_LABELS[kind]) for kind in kinds])
        names = ", ".join(group.name for group, _ in groups)
        return standalone(svg(drawn, "receive", f"Datagrams a second by receiver, {names}"))
