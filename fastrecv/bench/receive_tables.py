"""A result of the receive bench as Markdown on a terminal: a table a group, what is missing, gates and warnings."""

from __future__ import annotations

from fastrecv.bench.receive_results import Group, Ratio, ReceiveResult
from fastrecv.bench.tables import markdown

__all__ = ["group_table", "render"]


def _ratio(ratio: Ratio | None) -> tuple[str, str]:
    if ratio is None:
        return "", ""
    return f"\u00d7{ratio.estimate:.2f}", f"[{ratio.low:.2f}, {ratio.high:.2f}]"


def group_table(group: Group) -> str:
    """The rows of a group: time, rate, and a column of ratios with its intervals for each comparison."""
    header = [f"{group.name}: {group.title}", "ns a datagram", "datagrams/s"]
    for comparison in group.comparisons:
        header += [comparison.title, "95 % interval"]
    rows = []
    for row in group.rows:
        if not row.ns:
            continue
        cells = [row.title, f"{row.median:,.0f}", f"{row.rate:,.0f}"]
        for comparison in group.comparisons:
            cells += _ratio(comparison.of(row.name))
        rows.append(cells)
    parts = [markdown(header, rows)]
    parts += [f"left out: {title} ({library} is not installed)" for title, library in group.missing.items()]
    return "\n\n".join(parts)


def render(result: ReceiveResult) -> str:
    """The whole of a result as text."""
    environment = result.environment
    head = (
        f"fastrecv {result.version} · receive · {environment.get('kernel', '?')} · {environment.get('CPU', '?')}, "
        f"{environment.get('CPUs', '?')} CPUs, all on CPU {result.cpu} · Python {environment.get('Python', '?')} · "
        f"{result.started}\n"
        f"prefill and drain: {result.rounds} rounds of {result.datagrams:,} datagrams from {result.sources:,} ports "
        "· times are medians over rounds, ratios are of datagrams/s: medians of ratios within a round"
    )
    parts = [head, *(group_table(group) for group in result.groups)]
    if result.warnings:
        parts.append("\n".join(f"WARNING: {warning}" for warning in result.warnings))
    failed = result.failed_gates
    parts += [f"GATE FAILED: {group.name}, {gate.name}: {gate.detail}" for group, gate in failed]
    if not failed:
        parts.append(f"gates passed: {', '.join(dict.fromkeys(gate.name for g in result.groups for gate in g.gates))}")
    return "\n\n".join(parts)
