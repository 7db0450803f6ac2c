"""Usage: every wrong word has a line that says what would be right, and nothing is measured."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrecv.bench import cli, results
from fastrecv.bench.results import Gate

from . import results_factory as factory


@pytest.fixture(autouse=True)
def keep_the_signal_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--flood", "icmp"], "'icmp' is not one of"),
        (["--program", "letter,nonsense"], "no program 'nonsense': choose from letter, dispatcher, assign-only"),
        (["--program", "letter,letter"], "a program is named twice"),
        (["--entries", "0"], "0 is not in the range 1<=x<=1000000"),
        (["--sources", "70000"], "70000 is not in the range 1<=x<=64512"),
        (["--seconds", "0"], "not in the range"),
        (["--seconds", "nan"], "nan is no number of seconds"),
        (["--json", "x.json", "scale"], "options of scale go behind its name"),
        (["--cpu", "4096"], "CPU 4096 is not one of ["),
        (["--json", "/nonexistent/out.json"], "/nonexistent/out.json cannot be written"),
        (["--report", "/"], "is a directory"),
        (["--json", "/proc/out.json"], "/proc/out.json cannot be written: No such file"),
        (["--json", "same.out", "--report", "same.out"], "the same file is named twice"),
        (["scale", "--entries", "10"], "give two or more sizes"),
        (["scale", "--entries", "10,many"], "no list of numbers like 1,10,200"),
        (["scale", "--program", "assign-only"], "'assign-only' is not one of 'letter', 'dispatcher'"),
        (["compare", "/nonexistent.json", "/nonexistent.json"], "does not exist"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_a_file_that_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert cli.main(["show", str(tmp_path / "a.json")]) == 2
    assert capsys.readouterr().err.startswith(f"fastrecv.bench: {tmp_path}/a.json is not a result")


def test_show_and_compare_read_what_was_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, page, plot = (tmp_path / name for name in ("a.json", "a.html", "a.svg"))
    kept.write_bytes(results.encode(factory.result()))
    assert cli.main(["show", str(kept), "--report", str(page), "--plot", str(plot)]) == 0
    assert "letter: as it is" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")
    assert "<svg" in plot.read_text()
    assert cli.main(["compare", str(kept), str(kept)]) == 0
    assert "+0.00 pp" in capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("compare", "scale", "show", "--flood", "--no-profile"):
        assert name in text


def test_comparing_a_run_whose_gate_failed_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = factory.result()
    made.floods[0].gates.append(Gate(name="exact counts", passed=False, detail=""))
    (tmp_path / "a.json").write_bytes(results.encode(made))
    assert cli.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 1
    assert "a gate failed in the first run" in capsys.readouterr().out
