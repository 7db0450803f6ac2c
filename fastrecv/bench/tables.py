"""A result as Markdown on a terminal: the letter's two tables for each flood, gates and warnings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastrecv.bench import letter
from fastrecv.bench.results import Configuration, Flood, Interval, Result

__all__ = ["blocks_of", "flood_tables", "foot", "head", "interval", "markdown", "render", "signed"]


def signed(value: float | None, places: int = 1, unit: str = " %") -> str:
    return "" if value is None else f"{value:+.{places}f}{unit}"


def interval(delta: Interval | None) -> str:
    return "" if delta is None else f"[{delta.low:+.2f}, {delta.high:+.2f}]"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up; the first is flush left, the others right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    text = []
    for number, line in enumerate(lines):
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        text.append("| " + " | ".join(cells) + " |")
        if number == 0:
            text.append("| " + " | ".join(rule) + " |")
    return "\n".join(text)


def blocks_of(flood: Flood) -> str:
    """How the flood was sampled, in words."""
    window = f"{flood.window_packets:,} packets" if flood.window_packets else "one second"
    return f"{len(flood.order):,} blocks in {flood.seconds:.0f} s and {len(flood.setups)} set-ups, windows of {window}"


def flood_tables(flood: Flood) -> str:
    """The letter's tables for one flood, ours beside its own."""
    rates = markdown(
        [f"{flood.name}: {flood.title}", "rx pps (mean ± sstdev)", "Δ rx pps", "95 % interval", "verdict",
         *(f"letter {series}" for series in letter.SERIES)],
        ([row.title, f"{row.pps_mean:,.0f} ± {row.pps_sstdev:4.1f} %", signed(row.delta.estimate) if row.delta else "",
          interval(row.delta), row.verdict,
          *(signed(letter.delta(series, flood.name, row.name)) for series in letter.SERIES)]
         for row in flood.configurations),
    )  # fmt: skip
    parts = [f"{blocks_of(flood)}; noise floor ±{flood.noise.half_width:.2f} %", rates]
    sampled = [row for row in flood.configurations if row.share is not None]
    if sampled:
        parts.append(_shares(flood, sampled))
    parts += [
        f"{row.title}: {row.run.ns_per_run:.0f} ns a run (BPF statistics, {row.run.runs:,} runs)"
        for row in flood.configurations
        if row.run is not None
    ]
    return "\n\n".join(parts)


def _shares(flood: Flood, sampled: list[Configuration]) -> str:
    first = sampled[0].share
    assert first is not None
    lines = []
    for row in sampled:
        share = row.share
        assert share is not None
        lines.append(
            [row.title, f"{share.percent:.2f} % ± {share.standard_error:.2f}",
             signed(flood.share_change(row), 2, " pp"),
             f"{share.samples:,}",
             *(f"{figure:.2f} %" if (figure := letter.share(series, flood.name, row.name)) is not None else ""
               for series in letter.SERIES)]
        )  # fmt: skip
    header = [f"{first.symbol}, {first.event} samples, inclusive", "share ± s.e.", "Δ", "samples",
              *(f"letter {series}" for series in letter.SERIES)]  # fmt: skip
    return markdown(header, lines)


def head(result: Result, traffic: str) -> str:
    """What was measured on what; `traffic` is the second line."""
    environment = result.environment
    return (
        f"fastrecv {result.version} · {result.kind} · mode {result.mode} · {environment.get('kernel', '?')} · "
        f"{environment.get('CPU', '?')}, {environment.get('CPUs', '?')} CPUs, flood on CPU {result.cpu} · "
        f"{result.started}\n{traffic}"
    )


def foot(result: Result) -> list[str]:
    """Warnings and gates."""
    parts = ["\n".join(f"WARNING: {warning}" for warning in result.warnings)] if result.warnings else []
    failed = result.failed_gates
    parts += [f"GATE FAILED: {flood.name}, {gate.name}: {gate.detail}" for flood, gate in failed]
    if not failed:
        names = dict.fromkeys(gate.name for flood in result.floods for gate in flood.gates)
        parts.append(f"gates passed: {', '.join(names)}")
    return parts


def render(result: Result) -> str:
    """The whole of a result as text."""
    parts = [head(result, f"{result.sources:,} sources · rule sets: {result.prefixes}")]
    parts += [flood_tables(flood) for flood in result.floods]
    parts.append(
        "The letter's Δ were taken on another machine, kernel and network card"
        + (", through a driver: a shape to compare with." if result.mode == "wire" else
           "; there is no driver in our denominator, so ours read larger: a shape to compare with.")
    )  # fmt: skip
    return "\n\n".join([*parts, *foot(result)])
