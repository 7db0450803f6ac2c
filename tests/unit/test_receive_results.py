"""Results of the receive bench: kept, read again, printed and drawn."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrecv.bench import cli, receive, receive_plots, receive_results, receive_tables
from fastrecv.bench.receive_groups import GROUPS
from fastrecv.bench.receive_results import Comparison, Drained, Group, ReceiveResult, summarise
from fastrecv.bench.results import Gate, ResultError

ROUNDS = 9


@pytest.fixture(autouse=True)
def keep_the_signal_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def row(name: str, ns: float, rounds: int = ROUNDS) -> Drained:
    """A contender whose every round takes `ns` a datagram, times what the machine did in that round to all."""
    drift = [1 + 0.3 * (index % 3) for index in range(rounds)]
    return Drained(name=name, title=f"the {name}", kind="python", ns=[round(100 * ns * factor) for factor in drift],
                   sent=[100] * rounds, drained=[100] * rounds)  # fmt: skip


def result() -> ReceiveResult:
    rows = [row("c-loop", 500), row("recvfrom", 1000), row("receiver", 625)]
    pairs = {"recvfrom": "c-loop", "receiver": "c-loop", "nobody": "c-loop"}
    group = Group(
        name="payload-128", title="128 bytes", payload=128, order=[[0, 1, 2]] * ROUNDS, rows=rows,
        comparisons=[Comparison(title="of the C loop", pairs=pairs)], missing={"uvloop": "uvloop"},
        gates=[Gate(name="exact counts", passed=True, detail="2,700 datagrams sent and drained")],
    )  # fmt: skip
    summarise(group)
    return ReceiveResult(
        version="0.1.0", started="2026-11-22T12:00:00Z", argv=["receive"], seed=1, cpu=1, rounds=ROUNDS, datagrams=100,
        sources=1000, environment={"kernel": "Linux 6.18", "CPU": "AMD EPYC", "CPUs": "2"}, groups=[group],
        warnings=["the moon is full"],
    )  # fmt: skip


def test_a_kept_result_comes_back_the_same(tmp_path: Path) -> None:
    made = result()
    (tmp_path / "a.json").write_bytes(receive_results.encode(made))
    assert receive_results.load(tmp_path / "a.json") == made
    assert receive_results.is_one(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"kind": "flood"}', "no json", "\udcff"])
def test_what_is_no_result_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    assert not receive_results.is_one(tmp_path / "a.json")
    with pytest.raises(ResultError, match=r"a\.json is not a result of fastrecv.bench receive: "):
        receive_results.load(tmp_path / "a.json")


def test_a_result_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    document = json.loads(receive_results.encode(result()))
    document["groups"][0]["surprise"] = 1
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(ResultError, match="surprise"):
        receive_results.load(tmp_path / "a.json")


def test_the_ratio_is_of_rates_within_a_round_and_free_of_drift() -> None:
    (comparison,) = result().groups[0].comparisons
    ratios = {ratio.row: (ratio.low, ratio.estimate, ratio.high) for ratio in comparison.ratios}
    assert ratios == {
        "recvfrom": pytest.approx((0.5, 0.5, 0.5)),
        "receiver": pytest.approx((0.8, 0.8, 0.8)),
    }
    assert comparison.of("nobody") is None


def test_a_round_that_was_cut_short_is_left_out_of_the_ratio() -> None:
    group = Group(name="x", title="x", payload=0, rows=[row("c-loop", 500, 5), row("recvfrom", 1000, 4)],
                  comparisons=[Comparison(title="of the C loop", pairs={"recvfrom": "c-loop"})])  # fmt: skip
    summarise(group)
    assert group.comparisons[0].ratios[0].estimate == pytest.approx(0.5)


def test_an_again_row_that_differs_is_warned_of() -> None:
    pairs = {"c-loop-again": "c-loop", "receiver": "c-loop"}
    rows = [row("c-loop", 500), row("c-loop-again", 520), row("receiver", 9)]
    group = Group(name="x", title="x", payload=0, rows=rows,
                  comparisons=[Comparison(title="of the C loop", pairs=pairs)])  # fmt: skip
    summarise(group)
    (warning,) = receive._noise(group)
    assert warning.startswith("x: the A/A row is 3.8 % off, and its 95 % interval excludes 1")


def test_the_median_is_over_rounds() -> None:
    drained = row("recvfrom", 1000)
    assert drained.median == pytest.approx(1300)
    assert drained.rate == pytest.approx(1e9 / 1300)


def test_the_tables_line_up_and_say_everything() -> None:
    text = receive_tables.render(result())
    for part in ("the receiver", "1,538,462", "\u00d70.80", "[0.80, 0.80]", "WARNING: the moon is full",
                 "left out: uvloop (uvloop is not installed)", "gates passed: exact counts"):  # fmt: skip
        assert part in text
    (table,) = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert len({line.count("|") for line in table}) == 1


def test_a_failed_gate_is_printed() -> None:
    made = result()
    made.groups[0].gates.append(Gate(name="exact counts", passed=False, detail="7 are missing"))
    assert made.failed_gates == [(made.groups[0], made.groups[0].gates[1])]
    text = receive_tables.render(made)
    assert "GATE FAILED: payload-128, exact counts: 7 are missing" in text
    assert "gates passed" not in text


def test_a_group_in_which_nothing_ran_is_printed_and_drawn() -> None:
    made = result()
    made.groups[0].rows = [Drained(name="c-loop", title="the C loop", kind="limit")]
    assert "payload-128: 128 bytes" in receive_tables.render(made)
    assert "<svg" in receive_plots.figure(made)


def test_the_plot_is_one_page_with_every_row() -> None:
    text = receive_plots.figure(result())
    assert text.startswith("<?xml")
    for part in ("the c-loop", "the recvfrom", "1,538,462/s", "socket module"):
        assert part in text


def test_show_prints_and_draws_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, plot = tmp_path / "a.json", tmp_path / "a.svg"
    kept.write_bytes(receive_results.encode(result()))
    assert cli.main(["show", str(kept), "--plot", str(plot)]) == 0
    assert "the receiver" in capsys.readouterr().out
    assert "<svg" in plot.read_text()
    assert cli.main(["show", str(kept), "--report", str(tmp_path / "a.html")]) == 2
    assert "has no HTML page: take --plot" in capsys.readouterr().err
    assert cli.main(["compare", str(kept), str(kept)]) == 2
    assert "is not a result of fastrecv.bench" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group", "payload-7"], "no group 'payload-7': choose from payload-0, payload-128"),
        (["--group", "gro-128,gro-128"], "a group is named twice"),
        (["--rounds", "0"], "0 is not in the range 1<=x<=10000"),
        (["--datagrams", "99"], "99 is not in the range 100<=x<=100000"),
        (["--cpu", "4096"], "CPU 4096 is not one of ["),
        (["--json", "/nonexistent/out.json"], "/nonexistent/out.json cannot be written"),
        (["--json", "same.out", "--plot", "same.out"], "the same file is named twice"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["receive", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_every_comparison_is_between_rows_of_its_group() -> None:
    for group in GROUPS.values():
        names = [contender.name for contender in group.contenders]
        assert len(set(names)) == len(names)
        for pairs in group.comparisons.values():
            assert set(pairs) | set(pairs.values()) <= set(names)
