"""`python -m fastrecv.bench steer`: every row there, every packet counted, every sender where it must come to."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fastrecv.bench import cli, results
from fastrecv.bench.results import Flood, Gate
from fastrecv.bench.stage import Row, Stage
from fastrecv.bench.steer import STEERED, SteerPlan
from fastrecv.classic import Filter
from fastrecv.policies import Policy
from fastrecv.reuseport import detach

pytestmark = pytest.mark.alone  # expedites RCU on the whole host

BENCH = [sys.executable, "-m", "fastrecv.bench"]
BPF = ["source", "flow", "uncounted", "tracking", "leaving", "modulo"]
ROWS = {
    "udp": ["baseline", "again", "hash", "classic-destination", "classic-payload", *BPF, "one-sender", "connected",
            "harness"],
    "syn": ["baseline", "again", "hash", "classic-destination", *BPF, "harness"],
}  # fmt: skip


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BENCH, *arguments], capture_output=True, text=True, timeout=120, check=False)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """`show`, run here: exit code, what is printed, complaints."""
    before = signal.getsignal(signal.SIGTERM)
    capsys.readouterr()
    try:
        return (cli.main(["show", *arguments]), *capsys.readouterr())
    finally:
        signal.signal(signal.SIGTERM, before)


def planned(flood: str, sources: int = 1000) -> tuple[SteerPlan, Flood]:
    plan = SteerPlan(floods=[flood], seconds=1, seed=5, sources=sources, cpu=0)
    rows = plan.configurations(flood)
    return plan, Flood(name=flood, title="", counter="", window_packets=1, warmup_packets=1, configurations=rows)


def row_of(stage: Stage, name: str) -> Row:
    return next(row for row in stage.rows if row.configuration.name == name)


@pytest.mark.parametrize("name", STEERED)
def test_every_row_is_measured_counted_and_kept(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, plot = tmp_path / "steer.json", tmp_path / "steer.svg"
    done = bench("steer", "--flood", name, "--seconds", "1", "--sources", "500", "--json", str(json_file),
                 "--plot", str(plot))  # fmt: skip
    assert json_file.exists(), f"nothing was measured (exit {done.returncode}): {done.stderr}"
    result = results.load(json_file)
    (flood,) = result.floods
    failed = {gate.name for _, gate in result.failed_gates}
    assert failed <= {"A/A"}, done.stdout  # nobody asks for that one: once in hundreds of short runs it fails by chance
    assert {gate.name for gate in flood.gates} >= {"no foreign program", "exact counts", "one run a packet",
                                                   "right members"}  # fmt: skip
    assert done.returncode == (1 if failed else 0)
    assert [row.name for row in flood.configurations] == ROWS[name[:3]]
    blocks = len(flood.order)
    assert blocks == sum(flood.setups) > 0
    for row in flood.configurations:
        assert len(row.ns) == blocks
        assert row.sent == [flood.window_packets + flood.warmup_packets] * blocks
        assert row.counted == ([0] * blocks if row.name == "harness" else row.sent)
        assert (row.change is not None) == (row.name.startswith("classic") or row.name in [*BPF, "connected"])
        assert (row.run is not None) == (row.name in BPF)
        assert f"| {row.title} " in done.stdout
    assert ElementTree.fromstring(plot.read_text()).tag.endswith("svg")
    assert shown(capsys, str(json_file)) == (0, done.stdout, "")
    code, _, refusal = shown(capsys, str(json_file), "--report", str(tmp_path / "page.html"))
    assert code == 2
    assert "a result of `steer` has no HTML page: take --plot" in refusal


@pytest.mark.parametrize("name", STEERED)
@pytest.mark.usefixtures("quick")
def test_rows_have_ports_of_their_own_which_change_with_the_set_up(name: str) -> None:
    plan, record = planned(name)
    found = []
    for setups in ([], [1]):
        record.setups = setups
        with plan.open(record) as stage:
            rows = [row for row in stage.rows if row.members]
            assert all({sock.getsockname()[1] for sock in row.members} == {row.source.flood.port} for row in rows)
            found.append([row.source.flood.port for row in rows])
            groups = {row.configuration.name: len(row.members) for row in rows}
    assert [len(set(ports)) for ports in found] == [len(ROWS[name[:3]]) - 1] * 2
    assert found[0] != found[1]
    assert {groups.pop(row) for row in ("baseline", "again")} == {1}
    assert {groups.pop(row, 1) for row in ("one-sender", "connected")} == {1}
    assert set(groups.values()) == {4}


def detached(row: Row) -> None:
    assert detach(row.members[0])


def replaced(row: Row) -> None:
    Filter(Policy("source", seed=99), 4).attach(row.members[0])


def swapped(row: Row) -> None:
    assert row.program is not None
    assert row.program.owner is not None
    slots = row.program.owner.maps["slots"]
    slots.delete([0])
    slots.delete([1])
    slots.update([0, 1], [row.members[1].fileno(), row.members[0].fileno()])


@pytest.mark.parametrize("name", STEERED)
@pytest.mark.usefixtures("quick")
def test_the_gate_passes_what_is_right_with_few_senders_and_many(name: str) -> None:
    for sources in (100, 3000):
        plan, record = planned(name, sources)
        with plan.open(record) as stage:
            (gate,) = plan.prove(stage)
        assert gate.passed, gate.detail
        assert f"each of {sources:,} sources came to the member" in gate.detail


@pytest.mark.parametrize("name", ["udp4", "syn4"])
@pytest.mark.parametrize(
    ("row", "sabotage"),
    [
        ("source", detached),
        ("source", replaced),
        ("flow", swapped),
        ("leaving", swapped),
        ("modulo", detached),
        ("classic-destination", detached),
        ("classic-destination", replaced),
    ],
)
@pytest.mark.usefixtures("quick")
def test_the_gate_finds_the_row_whose_members_are_wrong(name: str, row: str, sabotage: Callable[[Row], None]) -> None:
    plan, record = planned(name)
    with plan.open(record) as stage:
        sabotage(row_of(stage, row))
        (gate,) = plan.prove(stage)
    assert not gate.passed
    assert gate.detail.startswith(f"{row}: members got [")
    assert gate.detail.count("members got") == 1


@pytest.mark.usefixtures("quick")
def test_the_gate_finds_a_group_that_the_kernel_does_not_spread() -> None:
    plan, record = planned("udp4")
    with plan.open(record) as stage:
        Filter(Policy("interface", seed=1), 1).attach(row_of(stage, "hash").members[0])
        (gate,) = plan.prove(stage)
    assert gate.detail == "hash: members got [1000, 0, 0, 0] packets where all of 1,000, with some at each were due"


def test_wrong_members_fail_the_run_and_its_claims(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prove = SteerPlan.prove

    def sabotaged(plan: SteerPlan, stage: Stage) -> list[Gate]:
        detached(row_of(stage, "source"))
        return prove(plan, stage)

    monkeypatch.setattr(SteerPlan, "prove", sabotaged)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(["steer", "--flood", "udp4", "--seconds", "1"]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    output = capsys.readouterr().out
    assert "GATE FAILED: udp4, right members: source: members got [" in output
    assert "costs too much" not in output
