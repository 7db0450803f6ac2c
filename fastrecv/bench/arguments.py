"""What the options of several commands accept: checked before anything is measured, not after it."""

from __future__ import annotations

import os
from pathlib import Path

import click

__all__ = ["STDOUT", "one_cpu", "refuse_twice", "writable_file"]

STDOUT = Path("-")


def writable_file(_context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that cannot be written before the measurement, not after it."""
    if value is None or (value == STDOUT and parameter.name == "json_file"):
        return value
    try:
        existed = value.exists()
        value.open("ab").close()
        if not existed:
            value.unlink()
    except OSError as error:
        raise click.BadParameter(f"{value} cannot be written: {error.strerror}") from None
    return value


def one_cpu(_context: click.Context, _parameter: click.Parameter, value: int | None) -> int:
    """The CPU, one that this process may use; the last of them by default."""
    allowed = os.sched_getaffinity(0)
    if value is None:
        return max(allowed)
    if value not in allowed:
        raise click.BadParameter(f"CPU {value} is not one of {sorted(allowed)}")
    return value


def refuse_twice(*files: Path | None) -> None:
    """Refuse the same file for two products."""
    named = [file for file in files if file]
    if len(set(named)) < len(named):
        raise click.UsageError("the same file is named twice")
