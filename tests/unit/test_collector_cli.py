"""`fastrecv collect` as a command: what makes no sense, what the environment gives, and what --check says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrecv.cli.main import run
from fastrecv.collector.settings import VARIABLE, CollectorSettings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Missing option '--sink'"),
        (("--sink", "parqet:/x"), "'parqet:/x' is no sink, did you mean 'parquet'?"),
        (("--sink", "jsonl:-", "--exporters", "x"), "'--exporters': 'x' is no sink"),
        (("--sink", "jsonl:-", "--aggregate", "sourceIPv4Adress"), "did you mean 'sourceIPv4Address'?"),
        (("--sink", "jsonl:-", "--aggregate", "octetDeltaCount"), "'octetDeltaCount' is no key"),
        (("--sink", "jsonl:-", "--aggregate", "protocolIdentifier,protocolIdentifier"), "a key is named twice"),
        (("--sink", "jsonl:-", "--window", "0"), "'--window'"),
        (("--sink", "jsonl:-", "--flush", "nan"), "'--flush'"),
        (("--sink", "jsonl:-", "--flush", "0.001"), "'--flush': 0.001: give 0, or 0.01 seconds or more"),
        (("--sink", "nats://h/flows?spool=/x", "--shards", "3"), "3 shards: give a power of two up to 4096"),
        (("--sink", "nats://h/flows?spool=/x", "--shards", "0"), "0 shards: give a power of two up to 4096"),
        (("--sink", "jsonl:-", "--shards", "8"), "8 shards are for sinks with subjects, nats: or tls:, not 'jsonl:-'"),
        (("--sink", "jsonl:-", "-b", "tcp:127.0.0.1:2055"), "flows come over UDP: leave tcp: out"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert run(["collect", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_sinks_stand_in_the_environment_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv("FASTRECV_SINK", "nats://jane:s3cret@localhost/flows?spool=/tmp/x")
    monkeypatch.setenv("FASTRECV_EXPORTERS", "jsonl:-")
    assert run(["collect", "-b", "127.0.0.1:2055", "--check"]) == 0
    printed = capsys.readouterr().out
    assert "s3cret" not in printed
    assert [line.split() for line in printed.splitlines()[1:6]] == [
        ["sink", "nats://...@localhost/flows?spool=/tmp/x", "FASTRECV_SINK"],
        ["aggregate", "-", "default"],
        ["window", "60.0", "default"],
        ["exporters", "jsonl:-", "FASTRECV_EXPORTERS"],
        ["flush", "1.0", "default"],
    ]
    assert CollectorSettings.given().sink.startswith("nats://jane:s3cret@")
    assert CollectorSettings.given().exporters == "jsonl:-"
    monkeypatch.setenv("FASTRECV_SINK", "none")
    assert run(["collect", "-b", "127.0.0.1:2055"]) == 2
    assert "'none' is no sink" in capsys.readouterr().err


def test_check_says_as_json_what_options_have_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    words = ["--sink", "jsonl:-", "--aggregate", "exporterAddress,protocolIdentifier", "--window", "5"]
    assert run(["collect", "-b", "127.0.0.1:2055", *words, "--check", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said)[:5] == ["sink", "aggregate", "window", "exporters", "flush"]
    assert said["sink"] == {"value": "jsonl:-", "source": "--sink"}
    assert said["exporters"] == {"value": None, "source": "default"}
    assert said["aggregate"] == {"value": "exporterAddress,protocolIdentifier", "source": "--aggregate"}
    assert said["window"] == {"value": 5.0, "source": "--window"}
    assert said["bind"] == {"value": "127.0.0.1:2055", "source": "--bind"}


def test_connections_are_refused_whoever_asks_for_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    file = tmp_path / "collector.toml"
    file.write_text('bind = "tcp:127.0.0.1:2055"\n')
    assert run(["collect", "--sink", "jsonl:-", "--config", str(file)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"fastrecv collect: {file}: bind: flows come over UDP: leave tcp: out")
    monkeypatch.setenv("FASTRECV_BIND", "tcp:127.0.0.1:2055")
    assert run(["collect", "--sink", "jsonl:-"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("fastrecv collect: FASTRECV_BIND: flows come over UDP: leave tcp: out")
