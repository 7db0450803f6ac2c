"""Keeping, comparing and printing results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrecv.bench import compare, results, tables
from fastrecv.bench.results import Gate, ResultError

from . import results_factory as factory

TAKEN = [f"{name}: taken 2026-11-22T12:00:00Z, fastrecv 0.1.0" for name in "AB"]
NOTE = (
    "an interval speaks of its run alone; equal runs were seen to differ by 8 % of a Δ, so less than a tenth is "
    "not judged: repeat each side"
)


def test_a_kept_result_comes_back_the_same(tmp_path: Path) -> None:
    made = factory.result()
    (tmp_path / "a.json").write_bytes(results.encode(made))
    assert results.load(tmp_path / "a.json") == made


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema": 2}', "no json", "\udcff"])
def test_what_is_no_result_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ResultError, match=r"a\.json is not a result of fastrecv.bench: "):
        results.load(tmp_path / "a.json")


def test_a_result_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(results.encode(factory.result()))
    document = json.loads((tmp_path / "a.json").read_text())
    document["floods"][0]["surprise"] = 1
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(ResultError, match="surprise"):
        results.load(tmp_path / "a.json")


def test_the_tables_line_up_and_name_the_letters_figures() -> None:
    made = factory.result()
    text = tables.render(made)
    for flood in made.floods:
        for row in flood.configurations:
            assert row.title in text
    assert "-7.6 %" in text  # the letter's v1 figure for udp4
    assert "WARNING: the moon is full" in text
    assert "gates passed: exact counts, A/A" in text
    assert "150 ns a run" in text
    for table in text.split("\n\n"):
        lines = table.splitlines()
        if lines[0].startswith("|"):
            assert len({len(line) for line in lines}) == 1
            assert len({line.count("|") for line in lines}) == 1


def test_a_failed_gate_is_printed() -> None:
    made = factory.result()
    made.floods[0].gates.append(Gate(name="exact counts", passed=False, detail="7 packets are missing"))
    text = tables.render(made)
    assert "GATE FAILED: udp4, exact counts: 7 packets are missing" in text
    assert "gates passed" not in text


def test_a_change_between_two_runs_is_found() -> None:
    before = factory.result(factory.flood(rows={"baseline": 1, "again": 1, "letter": 1.2, "assign-only": 1.14}))
    after = factory.result(factory.flood(rows={"baseline": 1, "again": 1, "letter": 1.1, "assign-only": 1.14}))
    rows, notes = compare.compare(before, after)
    verdicts = {row.row: row.verdict for row in rows}
    assert verdicts == {"again": "noise floor", "letter": "faster", "assign-only": "not resolved"}
    assert notes == [*TAKEN, NOTE]
    change = next(row for row in rows if row.row == "letter").difference
    assert change.low < 100 * (1 / 1.1 - 1 / 1.2) < change.high


def test_what_equal_runs_may_differ_by_is_not_called_a_difference() -> None:
    first, second = (factory.result(factory.flood(rows={"baseline": 1, "again": 1, "letter": factor}))
                     for factor in (1.2, 1.222))  # fmt: skip
    row = next(row for row in compare.compare(first, second)[0] if row.row == "letter")
    assert row.difference.excludes(0)
    assert row.verdict == "not resolved"


def test_what_differs_between_two_runs_is_noted() -> None:
    first, second = factory.result(), factory.result()
    second.environment["kernel"] = "Linux 7.0"
    second.floods[0].gates.append(Gate(name="A/A", passed=False, detail=""))
    _, notes = compare.compare(first, second)
    assert notes == [
        *TAKEN,
        "kernels differ: Linux 6.18 | Linux 7.0",
        NOTE,
        "a gate failed in the second run: its numbers mean nothing",
    ]


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (factory.result(mode="wire"), "modes: inject and wire"),
        (factory.result(factory.flood("udp4")), "floods"),
        (factory.scale(), "kinds of run: flood and scale"),
    ],
)
def test_what_does_not_compare_is_refused(other: results.Result, what: str) -> None:
    with pytest.raises(compare.IncomparableError, match=what):
        compare.compare(factory.result(), other)
