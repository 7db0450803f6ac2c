"""What `steer` says of its windows: the tables, the answer to the claim, the plot."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fastrecv.bench import compare, measuring, report, results, steer_tables
from fastrecv.bench.results import Gate

from . import results_factory as factory

KEPT = sorted((Path(__file__).parents[2] / "bench" / "results").glob("2*.json"))


def test_a_kept_result_comes_back_the_same(tmp_path: Path) -> None:
    made = factory.steer()
    (tmp_path / "a.json").write_bytes(results.encode(made))
    assert results.load(tmp_path / "a.json") == made


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_kept_results_of_every_kind_and_age_are_read(file: Path) -> None:
    result = results.load(file)
    compared = [row for flood in result.floods for row in flood.configurations if row.change is not None]
    assert bool(compared) == (result.kind == "steer")
    assert "gates passed" in measuring.render(result)


def test_a_row_is_compared_with_its_like_in_the_same_blocks() -> None:
    flood = factory.steered()
    row = flood.row("source")
    assert row.delta is not None
    assert row.change is not None
    assert row.delta.estimate == pytest.approx(100 * (1 / 1.3 - 1), abs=1)
    assert row.change.estimate == pytest.approx(100 * (1.1 / 1.3 - 1), abs=1)
    assert row.change_verdict == "slower"
    assert flood.row("connected").change_verdict == "faster"
    for name in ("baseline", "again", "hash", "one-sender", "harness"):
        assert flood.row(name).change is None
        assert flood.row(name).change_verdict is None


def test_the_tables_line_up_and_have_both_differences() -> None:
    made = factory.steer()
    text = measuring.render(made)
    for flood in made.floods:
        for row in flood.configurations:
            (line,) = [line for line in text.splitlines() if line.startswith("|") and row.title in line
                       and f"{row.pps_mean:,.0f}" in line]  # fmt: skip
            for shown in (row.delta, row.change):
                assert shown is None or f"[{shown.low:+.2f}, {shown.high:+.2f}]" in line
    for table in text.split("\n\n"):
        lines = table.splitlines()
        if lines[0].startswith("|"):
            assert len({len(line) for line in lines}) == 1
            assert len({line.count("|") for line in lines}) == 1
    assert "WARNING: the moon is full" in text
    assert "letter" not in text


def test_the_claim_is_judged_way_by_way() -> None:
    text = steer_tables.judgement(factory.steered())
    claim = '"BPF selection costs too much", if that is more than 10 % of the rx pps of the kernel\'s own hash'
    assert f"udp4: {claim}, holds for source, leaving; does not hold for classic-destination.\n" in text


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"source": 1.12, "leaving": 1.15}, "does not hold for classic-destination, source, leaving."),
        ({"classic-destination": 1.4}, "holds for classic-destination, source, leaving."),
        ({"border": 1.1 / 0.9}, "is undecided for border."),
    ],
)
def test_the_claim_follows_the_intervals(rows: dict[str, float], said: str) -> None:
    first = steer_tables.judgement(factory.steered(rows=rows)).splitlines()[0]
    assert first.endswith(said)
    assert ("undecided" in first) == ("border" in rows)


def test_the_cost_is_told_in_nanoseconds_of_the_same_blocks() -> None:
    flood = factory.steered(rows={"source": 1.1})
    text = steer_tables.judgement(flood)
    told = {name: int(ns) for name, ns in re.findall(r"([a-z-]+) ([+-]\d+) ns", text)}
    assert told["leaving"] == pytest.approx(700 * 0.5, rel=0.05)
    assert told["classic-destination"] == pytest.approx(700 * 0.05, rel=0.3)
    assert re.search(r"source [+-]\d+ ns \(not resolved\)", text)
    assert not re.search(r"leaving [+-]\d+ ns \(not resolved\)", text)


def test_a_connected_socket_is_compared_where_there_is_one() -> None:
    change = factory.steered().row("connected").change
    assert change is not None
    said = f"A connected socket, in which the article keeps what was chosen, changes them by {change.estimate:+.1f} %"
    assert said in steer_tables.judgement(factory.steered())
    assert "connected" not in steer_tables.judgement(factory.steered(rows={"one-sender": 0, "connected": 0}))


def test_few_blocks_and_failed_gates_carry_no_judgement() -> None:
    few = factory.steered()
    few.order = few.order[:11]
    assert steer_tables.judgement(few) == 'udp4: "BPF selection costs too much": too few blocks to say'
    failed = factory.steered()
    failed.gates.append(Gate(name="right members", passed=False, detail="source: members got [1] where [2] were due"))
    text = measuring.render(factory.steer(failed))
    assert "GATE FAILED: udp4, right members: source: members got [1] where [2] were due" in text
    assert "costs too much" not in text


def test_two_runs_compare() -> None:
    rows, _ = compare.compare(factory.steer(), factory.steer())
    assert {row.row for row in rows if row.flood == "udp4"} >= {"hash", "source", "connected"}
    with pytest.raises(compare.IncomparableError, match="kinds of run: steer and flood"):
        compare.compare(factory.steer(), factory.result())


def test_the_plot_stands_alone_and_names_what_it_shows() -> None:
    made = factory.steer()
    drawn = report.figure(made)
    assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
    text = " ".join(ElementTree.fromstring(drawn).itertext())
    for expected in ("udp4", "syn4", "leaving", "against hash", "against one-sender", "the kernel's hash"):
        assert expected in text
    colours = set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r"<style>.*?</style>", "", drawn, flags=re.DOTALL)))
    assert not colours  # each is a variable of the style
