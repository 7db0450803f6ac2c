"""The published figures that every table and plot shows beside its own (letter.toml)."""

from __future__ import annotations

import functools
import tomllib
from importlib.resources import files
from typing import Any

__all__ = ["SERIES", "delta", "share"]

SERIES = ("v1", "v5")  # the cover letter of v1, the benchmark mail to v5

# Our floods and rows -> the letter's.
_FLOODS = {"udp4": "udp4", "udp6": "udp6", "syn4": "tcp4", "syn6": "tcp6"}
_ROWS = {"baseline": "baseline", "no-program": "no_program", "letter": "attached", "letter-200": "attached"}


@functools.cache
def _figures() -> dict[str, Any]:
    text = files(__package__).joinpath("letter.toml").read_text()
    return {series["name"]: series for series in tomllib.loads(text)["series"]}


def delta(series: str, flood: str, row: str) -> float | None:
    """Percent of rx pps against the letter's baseline; None where it has no such row, or that is the baseline."""
    if row not in _ROWS or row == "baseline":
        return None
    table = _figures()[series][_FLOODS[flood]]
    return float(100 * (table[_ROWS[row]]["rx_pps"][0] / table["baseline"]["rx_pps"][0] - 1))


def share(series: str, flood: str, row: str) -> float | None:
    """Inclusive share of cpu-cycles samples of the flood's lookup function, in percent; None where there is none."""
    if row not in _ROWS:
        return None
    return float(_figures()[series][_FLOODS[flood]][_ROWS[row]]["share"])
