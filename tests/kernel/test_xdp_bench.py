"""`python -m fastrecv.bench xdp`: every frame is found again, whoever receives it; speed is not judged here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrecv.bench import cli, limit, xdp
from fastrecv.bench.floods import BURST, FIRST_SOURCE_PORT
from fastrecv.bench.lab import Lab, quick_grace_periods
from fastrecv.bench.xdp import Wire
from fastrecv.bench.xdp_contenders import CONTENDERS, ROOM, Contender, Stop

pytestmark = [
    pytest.mark.needs("AF_XDP in copy mode"),
    pytest.mark.alone,  # expedites RCU on the whole host
]

BENCH = [sys.executable, "-m", "fastrecv.bench", "xdp"]
SPEED = {"2.5 x Receiver.recv", "0.9 x C loop (AF_XDP)"}


@pytest.fixture
def wire() -> Iterator[Wire]:
    with quick_grace_periods(), Lab(wire=True) as lab, contextlib.ExitStack() as stack:
        yield Wire(lab, min(os.sched_getaffinity(0)), stack)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_every_contender_receives_what_is_queued_and_the_rest_is_counted_as_lost(
    wire: Wire, contender: Contender
) -> None:
    source = wire.sources[contender.traffic]
    with contender.open(wire.lab, source.flood) as opened:
        before = wire.lab.received()
        assert wire.fill(source, 16 * BURST)[0] == 16 * BURST
        assert opened.run(Stop(1)) == 16 * BURST
        assert set(opened.lost().values()) == {0}
        sent, _ = wire.fill(source, 4 * ROOM, 1e6)
        assert wire.lab.received() - before == sent + 16 * BURST
        received, lost = opened.run(Stop(1)), sum(opened.lost().values())
    assert received + lost == sent == 4 * ROOM
    assert received >= ROOM
    assert lost > 0


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_every_contender_reads_while_the_source_sends(wire: Wire, contender: Contender) -> None:
    source = wire.sources[contender.traffic]
    with contender.open(wire.lab, source.flood) as opened:
        sent, _, received = wire.offer(source, 100 * BURST, 100_000, opened.run)
        assert received + sum(opened.lost().values()) == sent == 100 * BURST
        assert received > 0


@pytest.mark.parametrize("rate", [100_000, 400_000])
def test_the_source_is_never_ahead_of_its_schedule(wire: Wire, rate: int) -> None:
    bursts = 50
    with wire.lab.swallowing():
        before = wire.lab.received()
        sent, ns = wire.fill(wire.sources["plain"], bursts * BURST, rate)
        assert wire.lab.received() - before == sent == bursts * BURST
    assert ns >= 0.99 * (bursts - 2) / (bursts - 1) * 1e9 / rate  # a burst that is late by less than one keeps to it


def test_a_reader_that_fails_ends_the_sending(wire: Wire) -> None:
    class GoneError(Exception):
        pass

    def fail(_: Stop) -> int:
        raise GoneError

    with pytest.raises(GoneError):
        wire.offer(wire.sources["plain"], 10 * BURST, 100_000, fail)
    assert wire.fill(wire.sources["plain"], 2 * BURST)[0] == 2 * BURST


def test_datagrams_that_come_from_elsewhere_fail_the_content_check(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = xdp._same_bytes(wire)
    assert passed.passed, passed.detail
    monkeypatch.setattr(xdp, "FIRST_SOURCE_PORT", FIRST_SOURCE_PORT + 1)
    failed = xdp._same_bytes(wire)
    assert failed.detail == "socket: 3,840 datagrams sent, 3,840 received that are not the same"
    assert not failed.passed


def test_a_tiny_run_through_the_command_line(tmp_path: Path) -> None:
    kept = tmp_path / "xdp.json"
    done = subprocess.run(
        [*BENCH, "--rates", "0.2,0.1", "--rounds", "1", "--seconds", "0.02", "--json", str(kept)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert kept.exists(), done.stderr
    result = json.loads(kept.read_bytes())
    failed = {gate["name"] for gate in result["gates"] if not gate["passed"]}
    assert {gate["name"] for gate in result["gates"]} == {"same bytes", "every frame found again", *SPEED}
    assert failed <= SPEED  # at rates that the socket takes, too, nothing is 2.5 times as fast
    assert done.returncode == (1 if failed else 0)
    assert [row["name"] for row in result["rows"]] == [contender.name for contender in CONTENDERS]
    for row in result["rows"]:
        assert row["title"] in done.stdout
        assert len(row["drained_ns"]) == 1
        assert [one["asked"] for one in row["windows"]] == [100_000, 200_000]
        for one, sent in zip(row["windows"], (1984, 3968), strict=True):
            assert one["sent"] == one["arrived"] == one["received"] + sum(one["lost"].values()) == sent
    assert "Traceback" not in done.stderr


def test_without_a_compiler_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    limit.compiled.cache_clear()
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(["xdp"]) == 77
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "the C loop to compare with not available: no cc in PATH" in capsys.readouterr().err
