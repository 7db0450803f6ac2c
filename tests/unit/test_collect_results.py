"""What the collect bench leaves behind, and how it is told."""

from __future__ import annotations

import msgspec

from fastrecv.bench.collect import Plan
from fastrecv.bench.collect_cli import render
from fastrecv.bench.collect_contenders import CONTENDERS
from fastrecv.bench.collect_results import Collected, CollectResult, encode
from fastrecv.bench.results import Gate


def result() -> CollectResult:
    return CollectResult(
        version="1", started="2026-11-22T00:00:00Z", argv=[], groups=["v5"], seed=1, cpu=0, rounds=3, datagrams=100,
        environment={"kernel": "6.18"}, rows=[
            Collected(stream="v5", contender="arrow", title="ours", ns=[200.0, 250.0, 500.0]),
            Collected(stream="ipfix", contender="nfcapd", title="theirs", ns=[100.0, 100.0, 100.0]),
        ], absent={"nfacctd": "Debian's pmacct"}, gates=[Gate(name="every flow", passed=True, detail="all")],
        profiles={"NetFlow v5, ours": "50 % walk"},
    )  # fmt: skip


def test_the_document_has_all_that_was_measured() -> None:
    assert msgspec.json.decode(encode(result()), type=CollectResult) == result()
    assert not result().failed
    wrong = result()
    wrong.gates.append(Gate(name="not slower", passed=False, detail="0.9"))
    assert wrong.failed


def test_the_text_has_rates_what_is_absent_gates_and_profiles() -> None:
    lines = render(result()).splitlines()
    assert lines[0] == "flows a second of one CPU, median of 3 rounds, [min, max]"
    assert [line.split() for line in lines if "M/s" in line] == [
        ["ours", "4.000", "M/s", "[2.000,", "5.000]"], ["theirs", "10.000", "M/s", "[10.000,", "10.000]"]]  # fmt: skip
    assert "nfacctd: not here: Debian's pmacct" in lines
    assert "passed  every flow: all" in lines
    assert lines[-2:] == ["where the time goes, NetFlow v5, ours", "50 % walk"]


def test_a_plan_has_a_step_for_every_drain() -> None:
    assert Plan(groups=["v5", "v9"], rounds=3, datagrams=20_000, seed=1, cpu=0).steps == 3 * 2 * len(CONTENDERS)
