"""A result of the AF_XDP bench as Markdown on a terminal: rates by loss, received and lost by rate, gates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastrecv.bench.tables import markdown
from fastrecv.bench.xdp_results import LOSSES, Row, XdpResult

__all__ = ["ladder", "rates", "render"]

_COLUMNS = 4  # contenders that a table has room for


def rates(result: XdpResult) -> str:
    """By contender: the rate at each loss, its ratio to the socket's, and the time of a datagram in user space."""
    ratios = {ratio.row: ratio for ratio in result.ratios if result.row(ratio.reference).of == "socket"}
    rows = []
    for row in result.rows:
        ratio = ratios.get(row.name)
        against = ("", "") if ratio is None else (f"\u00d7{ratio.estimate:.2f}", f"[{ratio.low:.2f}, {ratio.high:.2f}]")
        rows.append([row.title, *(f"{row.rate(loss):,.0f}" for loss in LOSSES), *against, f"{row.ns_each:.0f}"])
    header = ["datagrams/s with at most so much lost", *(f"{100 * loss:g} %" for loss in LOSSES),
              "of the socket's, at 0.1 %", "95 % interval", "ns a datagram"]  # fmt: skip
    return markdown(header, rows)


def ladder(result: XdpResult, rows: Sequence[Row]) -> str:
    """By rate: what these contenders were offered, the median over rounds, and how much of it all was lost."""
    lines = [[f"{rate / 1e6:g} M", *(_rung(row, rate) for row in rows)] for rate in result.rates]
    return markdown(["frames/s offered, and lost; asked for", *(row.title for row in rows)], lines)


def _rung(row: Row, rate: float) -> str:
    windows = [window for window in row.windows if window.asked == rate]
    if not windows:
        return ""
    lost = sum(window.sent - window.received for window in windows) / sum(window.sent for window in windows)
    return f"{np.median([window.offered for window in windows]) / 1e6:.2f} M, {100 * lost:.3g} %"


def render(result: XdpResult) -> str:
    """The whole of a result as text."""
    known = result.environment
    head = (
        f"fastrecv {result.version} · xdp · {known.get('kernel', '?')} · {known.get('CPU', '?')}, "
        f"{known.get('CPUs', '?')} CPUs: source and NAPI on CPU {result.source_cpu}, reader on CPU {result.cpu} · "
        f"Python {known.get('Python', '?')} · {result.started}\n"
        f"live across a veth, copy mode: {result.rounds} rounds, windows of {result.seconds:g} s, room for "
        f"{result.room:,} datagrams · rates are the highest with no more loss, medians over rounds; ratios are medians "
        "of those within a round; ns are of user space and its system calls, draining what is queued"
    )
    dropping = f"XDP_DROP (source and wire alone): {1e9 / float(np.median(result.dropping_ns)):,.0f} frames/s"
    parts = [head, rates(result), dropping]
    parts += [ladder(result, result.rows[at : at + _COLUMNS]) for at in range(0, len(result.rows), _COLUMNS)]
    parts += [f"WARNING: {warning}" for warning in result.warnings]
    parts += [f"GATE {'passed' if gate.passed else 'FAILED'}: {gate.name}: {gate.detail}" for gate in result.gates]
    return "\n\n".join(parts)
