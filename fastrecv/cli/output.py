"""What reading commands print: a table for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["as_json", "json_option", "table"]

_WIDE = 10_000  # columns: what is piped is never wrapped

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def as_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], style: Callable[[Sequence[Any]], str] | None = None
) -> None:
    """Columns of words; numbers to the right. style : of a row, in rich's words."""
    rows = list(rows)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[number], int) for row in rows)
        shown.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        cells = [Text(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row]
        shown.add_row(*cells, style=style(row) if style else None)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    with console.capture() as printed:
        console.print(shown)
    for line in printed.get().splitlines():
        click.echo(line.rstrip())
