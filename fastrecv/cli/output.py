"""What reading commands print: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

__all__ = ["as_json", "json_lines", "json_lines_option", "json_option", "table"]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
json_lines_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, an object a line.")


def as_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def json_lines(documents: Iterable[object]) -> None:
    """An object a line, for what goes on."""
    click.echo("\n".join(json.dumps(document, ensure_ascii=False) for document in documents))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], remarkable: Callable[[Sequence[Any]], bool] | None = None
) -> None:
    """Columns of words, never wrapped, so that they can be copied; numbers to the right.

    remarkable : of a row, whether it is shown in yellow.
    """
    rows = list(rows)
    numeric = [bool(rows) and all(isinstance(row[place], int) for row in rows) for place in range(len(columns))]
    cells = [columns, *([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for number, line in enumerate(cells):
        words = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        text = "  ".join(words).rstrip()
        if number == 0:
            text = click.style(text, bold=True)
        elif remarkable is not None and remarkable(rows[number - 1]):
            text = click.style(text, fg="yellow")
        lines.append(text)
    click.echo("\n".join(lines))  # at once: a hundred thousand lines are one write
