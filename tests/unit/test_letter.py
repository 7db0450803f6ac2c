"""The letter's figures give the percentages that the letter itself prints."""

from __future__ import annotations

import pytest

from fastrecv.bench import letter


@pytest.mark.parametrize(
    ("series", "flood", "no_program", "attached"),
    [
        ("v1", "syn4", -1.1, -2.2),
        ("v1", "syn6", -0.4, -2.2),
        ("v1", "udp4", -5.9, -7.6),
        ("v1", "udp6", -7.7, -12.1),
        ("v5", "syn4", -1.1, -3.4),
        ("v5", "syn6", 1.1, -0.3),
        ("v5", "udp4", 0.0, -5.9),
        ("v5", "udp6", 0.7, -3.5),
    ],
)
def test_deltas_are_the_published_ones(series: str, flood: str, no_program: float, attached: float) -> None:
    assert letter.delta(series, flood, "no-program") == pytest.approx(no_program, abs=0.06)
    assert letter.delta(series, flood, "letter") == pytest.approx(attached, abs=0.06)


def test_rows_that_the_letter_does_not_have_are_none() -> None:
    assert letter.delta("v5", "udp4", "baseline") is None
    assert letter.delta("v5", "udp4", "assign-only") is None
    assert letter.share("v5", "udp4", "again") is None
    assert letter.share("v5", "udp4", "baseline") == 3.70
    assert letter.share("v1", "udp6", "letter") == 10.14
