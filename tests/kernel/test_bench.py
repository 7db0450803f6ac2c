"""`python -m fastrecv.bench`, whole: what it measures, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrecv import bpf
from fastrecv.bench import cli, results, sampler
from fastrecv.bench.lab import quick_grace_periods
from fastrecv.bench.stage import Stage
from fastrecv.netns import Namespace

pytestmark = pytest.mark.alone  # expedites RCU on the whole host

BENCH = [sys.executable, "-m", "fastrecv.bench"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BENCH, *arguments], capture_output=True, text=True, timeout=120, check=False)


def kept(path: Path, done: subprocess.CompletedProcess[str]) -> results.Result:
    assert path.exists(), f"nothing was measured (exit {done.returncode}): {done.stderr}"
    return results.load(path)


def passed(result: results.Result) -> set[str]:
    """The gates that all floods passed. Nobody asks for A/A: once in hundreds of short runs it fails by chance."""
    failed = {gate.name for _, gate in result.failed_gates}
    return {gate.name for flood in result.floods for gate in flood.gates} - failed


@pytest.fixture(autouse=True)
def quiet_host() -> None:
    links = bpf.sk_lookup_links()
    assert not links, f"these tests need a host without sk_lookup programs of others; attached: {links}"
    with quick_grace_periods():  # refuses beside another bench, in words
        pass


def in_process(monkeypatch: pytest.MonkeyPatch, disturb: Callable[[Stage], None], *arguments: str) -> int:
    """Run the command line here, with `disturb` called after every block."""
    measure = sampler.measure

    def measured(flood: Any, plan: Any, on_block: Callable[[Stage], None]) -> Any:
        def block(stage: Stage) -> None:
            on_block(stage)
            disturb(stage)

        return measure(flood, plan, block)

    monkeypatch.setattr(sampler, "measure", measured)
    before = signal.getsignal(signal.SIGTERM)
    try:
        return cli.main(list(arguments))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_all_floods_with_profile_json_report_and_plot(tmp_path: Path) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("json", "html", "svg")}
    done = bench("--flood", "all", "--program", "letter,assign-only", "--seconds", "1", "--json", str(files["json"]),
                 "--report", str(files["html"]), "--plot", str(files["svg"]))  # fmt: skip
    result = kept(files["json"], done)
    assert passed(result) >= {"no foreign program", "exact counts", "one run a packet"}, done.stdout + done.stderr
    assert done.returncode == (1 if result.failed_gates else 0)
    assert [flood.name for flood in result.floods] == ["udp4", "udp6", "syn4", "syn6"]
    for flood in result.floods:
        names = [row.name for row in flood.configurations]
        assert names == ["baseline", "again", "no-program", "letter", "assign-only", "harness"]
        assert f"{flood.name}: {flood.title}" in done.stdout
        blocks = len(flood.order)
        assert blocks == sum(flood.setups) == len(flood.steal_ticks) > 5
        for row in flood.configurations:
            assert len(row.ns) == len(row.sent) == len(row.counted) == blocks
            assert row.sent == [flood.window_packets + flood.warmup_packets] * blocks
            assert row.counted == ([0] * blocks if row.name == "harness" else row.sent)
        assert all(sorted(order) == list(range(6)) for order in flood.order)
        assert len({tuple(order) for order in flood.order}) > 1  # shuffled
        letter = flood.row("letter")
        assert letter.run is not None
        assert letter.run.ns_per_run > 0
        assert letter.share is not None
        assert letter.share.symbol in ("__udp4_lib_lookup", "__udp6_lib_lookup", "__inet_lookup_listener",
                                       "inet6_lookup_listener")  # fmt: skip
        assert letter.share.hits > 0
    assert result.environment["kernel"].startswith("Linux ")
    assert files["html"].read_text().startswith("<!doctype html>")
    assert "<svg" in files["svg"].read_text()[:500]
    assert "udp4: measuring\nudp4: sampling the CPU with perf\nudp6: measuring" in done.stderr

    again = bench("show", str(files["json"]))
    assert again.stdout == done.stdout
    compared = bench("compare", "--json", str(files["json"]), str(files["json"]))
    assert compared.returncode == done.returncode
    assert {row["difference"]["estimate"] for row in json.loads(compared.stdout)["rows"]} == {0.0}


def test_wire_mode_loses_nothing_and_reads_the_interface(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    json_file = tmp_path / "wire.json"
    done = bench("--flood", "udp6", "--mode", "wire", "--seconds", "1", "--json", str(json_file))
    result = kept(json_file, done)
    assert passed(result) == {"no foreign program", "exact counts", "one run a packet"}, done.stdout
    assert done.returncode == 0
    assert "WARNING: udp6: only 1 blocks: nothing is judged below 12" in done.stdout
    assert result.mode == "wire"
    (flood,) = result.floods
    assert [row.name for row in flood.configurations] == ["baseline", "again", "no-program", "letter", "harness"]
    for row in flood.configurations:
        assert row.sent[0] > 10_000
        assert row.pps_mean > 10_000
        # The rate is the interface's over one second, the count is the stack's over the whole flow.
        assert row.pps_mean < row.sent[0] * 1.05
    inject = tmp_path / "inject.json"
    in_process(monkeypatch, lambda _: None, "--flood", "udp6", "--seconds", "1", "--no-profile", "--json", str(inject))
    other = results.load(inject)
    assert passed(other) >= {"exact counts", "one run a packet"}
    assert [row.share for row in other.floods[0].configurations] == [None] * 5
    capsys.readouterr()
    assert in_process(monkeypatch, lambda _: None, "compare", str(json_file), str(inject)) == 2
    assert capsys.readouterr().err == "fastrecv.bench: the two results are of different modes: wire and inject\n"


def test_scale_measures_all_sizes_in_the_same_blocks(tmp_path: Path) -> None:
    json_file, report = tmp_path / "scale.json", tmp_path / "scale.html"
    done = bench(
        "scale",
        "--flood",
        "udp6",
        "--entries",
        "1,1000",
        "--seconds",
        "1.5",
        "--json",
        str(json_file),
        "--report",
        str(report),
    )
    result = kept(json_file, done)
    assert "exact counts" in passed(result), done.stdout
    assert result.kind == "scale"
    rows = [(row.name, row.entries) for row in result.floods[0].configurations if row.entries]
    assert rows == [("letter-1", 1), ("letter-1000", 1000)]
    assert "<svg" in report.read_text()


@pytest.mark.parametrize("flood", ["udp4", "syn6"])
def test_a_sink_closed_half_way_fails_the_gate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, flood: str
) -> None:
    json_file = tmp_path / "out.json"

    def close_the_sink(stage: Stage) -> None:
        if len(stage.record.order) >= 3:
            stage.rows[0].members[0].close()

    code = in_process(monkeypatch, close_the_sink, "--flood", flood, "--seconds", "5", "--json", str(json_file))
    assert code == 1
    output = capsys.readouterr().out
    blocks = len(results.load(json_file).floods[0].order)  # a block whose numbers mean nothing is the last
    assert f"GATE FAILED: {flood}, exact counts: block {blocks}, baseline: " in output
    assert "0 in " in output
    assert blocks >= 4


def test_a_program_attached_meanwhile_fails_the_gate_and_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    json_file = tmp_path / "out.json"
    namespace = Namespace()
    with bpf.packaged("decoy") as decoy:
        links: list[bpf.Link] = []

        def attach(stage: Stage) -> None:
            if not links:
                links.append(decoy.programs["decoy"].attach_netns(namespace.fd))

        decoy.load()
        code = in_process(monkeypatch, attach, "--flood", "udp", "--seconds", "5", "--json", str(json_file))
        number = links[0].info.id
        links[0].close()
    namespace.close()
    assert code == 1
    output = capsys.readouterr().out
    failure = "GATE FAILED: udp4, no foreign program: a foreign sk_lookup program is attached: "
    assert f"{failure}link {number}, " in output
    assert "WARNING: a gate failed in udp4: the floods behind it were not measured" in output
    assert [len(flood.order) for flood in results.load(json_file).floods] == [1]  # what was measured is kept


def test_a_foreign_program_is_refused_by_its_id() -> None:
    namespace = Namespace()
    with bpf.packaged("decoy") as decoy, decoy.load().programs["decoy"].attach_netns(namespace.fd) as link:
        done = bench("--flood", "udp")
        expected = f"link {link.info.id}, program {link.info.program_id} (decoy), network namespace {namespace.inode}"
    namespace.close()
    assert done.returncode == 1
    assert done.stdout == ""
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("mode", ["inject", "wire"])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals, code: int, mode: str) -> None:
    """The fixture nothing_left_behind looks for namespaces, links and the RCU knob afterwards."""
    with subprocess.Popen([*BENCH, "--flood", "udp4", "--mode", mode], stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "udp4: measuring\n"
        time.sleep(0.3)  # somewhere in the first or second set-up
        assert Path("/sys/kernel/rcu_expedited").read_text() == "1\n"
        os.kill(child.pid, number)
        rest = child.stderr.read()
    assert child.returncode == code
    assert "Traceback" not in rest
    if number == signal.SIGINT:
        assert rest.strip() == "fastrecv.bench: interrupted; nothing was left behind"


def test_a_killed_run_leaves_nothing() -> None:
    with subprocess.Popen([*BENCH, "--flood", "udp4"], stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        child.stderr.readline()
        time.sleep(0.3)
        child.kill()
    deadline = time.monotonic() + 10
    while Path("/sys/kernel/rcu_expedited").read_text() == "1\n" and time.monotonic() < deadline:
        time.sleep(0.01)


def test_without_privileges_one_line_and_77() -> None:
    program = (
        "import os, sys; from fastrecv.bench.cli import main\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.exit(main(['--flood', 'udp']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 77
    assert done.stdout == ""
    assert done.stderr == (
        "fastrecv.bench: network namespaces not available: run as root, or grant the privilege "
        "(needs Linux 3.0 and CAP_SYS_ADMIN)\n"
    )


def test_without_perf_there_are_no_shares_and_a_warning(tmp_path: Path) -> None:
    json_file = tmp_path / "out.json"
    done = subprocess.run(
        [*BENCH, "--flood", "udp4", "--seconds", "1", "--json", str(json_file)],
        env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    result = kept(json_file, done)
    assert done.returncode == (1 if result.failed_gates else 0)
    assert "WARNING: perf is not installed: no CPU shares (Debian: apt install linux-perf)" in done.stdout
    assert result.floods[0].row("letter").share is None
    assert result.floods[0].row("letter").run is not None
