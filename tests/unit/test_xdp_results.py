"""The arithmetic of the AF_XDP bench over windows made up here: rates by loss, ratios, what fails, what is printed."""

from __future__ import annotations

import json
from typing import Literal

import pytest

from fastrecv.bench import xdp_tables
from fastrecv.bench.xdp_results import Row, Window, XdpResult, encode, judge

ROUNDS = (1, 2, 3)
NAMES = ("socket", "xdp", "socket-c", "xdp-c")


def window(number: int, rate: int, lost: int = 0, sent: int = 10_000) -> Window:
    """A window at a rate that divides 1e9."""
    return Window(round=number, asked=rate, ns=10**9 // rate, sent=sent, arrived=sent, received=sent - lost,
                  lost={"queue full": lost})  # fmt: skip


def row(name: str, windows: list[Window]) -> Row:
    of: Literal["socket", "xdp"] = "xdp" if name.startswith("xdp") else "socket"
    return Row(name=name, title=f"the {name}", of=of, payload=64, drained=100, drained_ns=[900, 1000, 5000],
               windows=windows)  # fmt: skip


def result(**rates: int) -> XdpResult:
    """Every contender, by default or as told, loses nothing up to this rate and half at twice of it."""
    highest = dict.fromkeys(NAMES, 1_000_000) | {name.replace("_", "-"): rate for name, rate in rates.items()}
    rows = [
        row(name, [one for n in ROUNDS for one in (window(n, 100_000), window(n, rate), window(n, 2 * rate, 5000))])
        for name, rate in highest.items()
    ]
    return XdpResult(
        version="0", started="", argv=[], seed=1, cpu=1, source_cpu=0, rounds=3, seconds=0.1,
        rates=sorted({one.asked for row in rows for one in row.windows}), room=4096, environment={}, rows=rows,
        dropping_ns=[200, 210, 190],
    )  # fmt: skip


def test_a_window_says_what_was_offered_received_and_lost() -> None:
    one = window(1, 500_000, lost=100)
    assert (one.offered, one.rate, one.loss) == (500_000, 495_000, 0.01)
    assert not one.wrong


@pytest.mark.parametrize(("arrived", "received"), [(10_000, 9_899), (9_999, 9_900)])
def test_a_frame_in_no_counter_is_told(arrived: int, received: int) -> None:
    one = window(1, 500_000, lost=100)
    one.arrived, one.received = arrived, received
    assert one.wrong == (f"10,000 sent, {arrived:,} arrived, {received:,} received; lost: 100 queue full")


def test_the_rate_at_a_loss_is_the_highest_of_a_round_and_the_median_of_rounds() -> None:
    one = row("xdp", [
        window(1, 100_000), window(1, 200_000, 10), window(1, 250_000), window(1, 400_000, 100),
        window(2, 100_000), window(2, 200_000, 10), window(2, 250_000, 11),
        window(3, 100_000, 10), window(3, 200_000, 5000),
    ])  # fmt: skip
    assert one.best(0) == {1: 250_000, 2: 100_000}
    assert one.best(0.001) == {1: 250_000, 2: pytest.approx(199_800), 3: pytest.approx(99_900)}
    assert one.rate(0) == 100_000  # the median of 250, 100 and none
    assert one.rate(0.001) == pytest.approx(199_800)
    assert one.rate(0.01) == pytest.approx(249_725)
    assert row("xdp", []).rate(0) == 0
    assert one.ns_each == 10


@pytest.mark.parametrize(
    ("xdp", "xdp_c", "failed"),
    [
        (2_500_000, 2_500_000, []),
        (2_500_000, 5_000_000, ["0.9 x the xdp-c"]),
        (2_000_000, 2_000_000, ["2.5 x the socket"]),
        (1_000_000, 4_000_000, ["2.5 x the socket", "0.9 x the xdp-c"]),
    ],
)
def test_targets_are_judged_by_the_ratio_within_rounds(xdp: int, xdp_c: int, failed: list[str]) -> None:
    measured = result(xdp=xdp, xdp_c=xdp_c)
    judge(measured)
    assert [gate.name for gate in measured.failed_gates] == failed
    ratios = {(ratio.row, ratio.reference): ratio.estimate for ratio in measured.ratios}
    assert ratios == {
        ("xdp", "socket"): pytest.approx(xdp / 1_000_000),
        ("xdp", "xdp-c"): pytest.approx(xdp / xdp_c),
        ("xdp-c", "socket-c"): pytest.approx(xdp_c / 1_000_000),
    }


def test_a_round_in_which_only_the_xdp_receiver_lost_too_much_counts_against_it() -> None:
    measured = result(xdp=5_000_000, xdp_c=5_000_000)
    for one in measured.row("xdp").windows:
        if one.round < 3:
            one.received, one.lost = one.sent - 200, {"queue full": 200}
    judge(measured)
    ratio = measured.ratios[0]
    assert ratio.row == "xdp"
    assert ratio.estimate == pytest.approx(0)
    assert {gate.name for gate in measured.failed_gates} == {"2.5 x the socket", "0.9 x the xdp-c"}


def test_without_a_rate_to_compare_with_the_target_is_not_met() -> None:
    measured = result()
    for one in measured.row("socket").windows:
        one.received, one.lost = 0, {"queue full": one.sent}
    judge(measured)
    (gate,) = measured.failed_gates
    assert gate.detail == "the socket lost more than 0.1 % at every rate"


def test_a_window_that_does_not_add_up_fails_the_run() -> None:
    measured = result(xdp=2_500_000, xdp_c=2_500_000)
    measured.row("socket-c").windows[4].received -= 1
    judge(measured)
    (gate,) = measured.failed_gates
    assert gate.name == "every frame found again"
    assert gate.detail.startswith("round 2, socket-c at 1,000,000/s: 10,000 sent, 10,000 arrived, 9,999 received")


@pytest.mark.parametrize(("every", "warned"), [(1, True), (18, True), (37, False)])
def test_a_reader_that_shares_its_cpu_is_a_warning(every: int, warned: bool) -> None:
    measured = result()
    windows = [window for row in measured.rows for window in row.windows]
    for one in windows[::every][: len(windows) // every]:
        one.waited_ns = round(0.03 * one.ns * one.sent)
    judge(measured)
    assert [f"in {36 // every} of 36 windows" in text for text in measured.warnings] == [True] * warned


def test_what_is_printed_says_rates_ratios_losses_and_gates() -> None:
    measured = result(xdp=2_500_000, xdp_c=5_000_000)
    judge(measured)
    text = xdp_tables.render(measured)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["the xdp", *["2,500,000"] * 3, "\u00d72.50", "[2.50, 2.50]", "10"] in lines
    assert ["the socket", *["1,000,000"] * 3, "", "", "10"] in lines
    assert ["1 M", "1.00 M, 0 %", "", "1.00 M, 0 %", ""] in lines
    assert ["5 M", "", "5.00 M, 50 %", "", "5.00 M, 0 %"] in lines
    assert "XDP_DROP (source and wire alone): 5,000,000 frames/s" in text
    assert "GATE FAILED: 0.9 x the xdp-c: the xdp with at most 0.1 % lost: 0.50 x" in text
    assert "GATE passed: 2.5 x the socket" in text
    assert json.loads(encode(measured))["rows"][1]["windows"][0]["lost"] == {"queue full": 0}
