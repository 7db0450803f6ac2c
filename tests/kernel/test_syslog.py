"""The syslog example under `fastrecv run`, told by util-linux's logger."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import logs

from tests.kernel.supervising import ADDRESS, PORT, Service, namespace, until
from tests.programs import program

EXAMPLE = Path(logs.__file__).parent
FORMS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    ((), {"format": "rfc5424", "data": {"timeQuality": {"tzKnown", "isSynced"}}}),
    (("--rfc3164", "--id=77"), {"format": "rfc3164", "process": "77"}),
    (("--rfc5424=notime,nohost",), {"format": "rfc5424", "time": None, "host": None}),
    (
        ("--rfc5424=notq", "--sd-id", "a@1", "--sd-param", 'k="v"', "--msgid", "M1", "-p", "local0.err", "-t", "app"),
        {
            "format": "rfc5424",
            "facility": "local0",
            "severity": "err",
            "app": "app",
            "id": "M1",
            "data": {"a@1": {"k"}},
        },
    ),
]


def log(*options: str) -> None:
    words = [program("logger", "bsdutils"), "-n", ADDRESS, "-P", str(PORT), "-d", *options]
    subprocess.run(words, check=True, timeout=10)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_message_of_logger_is_one_row_over_a_rolling_restart_and_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    told = {"PYTHONPATH": str(EXAMPLE), "SYSLOG_SINK": f"jsonl:{path}"}
    numbers = 40
    with namespace(), Service(tmp_path, "logs:Logs", "-w", 2, "--policy", "source+port", environment=told) as service:
        service.begun(2)
        for options, _ in FORMS:
            log(*options, "hello wörld")
        for number in range(numbers):
            log(f"message {number}")
            if number == 10:
                service.send(signal.SIGHUP)
            if number == 20:
                service.says("all workers are new")
                until(lambda: len(rows(path)) == len(FORMS) + 21, lambda: service.log)  # nothing in anybody's hands
                os.kill(service.pids(2)[0], signal.SIGKILL)
        until(lambda: len(rows(path)) == len(FORMS) + numbers, lambda: f"{rows(path)}\n{service.log}")
        assert service.stop() == 0
    found = rows(path)
    messages = Counter(row["message"] for row in found)
    assert messages == {"hello wörld": len(FORMS)} | {f"message {number}": 1 for number in range(numbers)}
    assert {row["source"] for row in found} == {ADDRESS}
    by_form = [row for row in found if row["message"] == "hello wörld"]
    for _, expected in FORMS:
        assert any(_fits(row, expected) for row in by_form), (expected, by_form)


def _fits(row: dict[str, Any], expected: dict[str, Any]) -> bool:
    seen = row | {"data": {name: set(parameters) for name, parameters in (row["data"] or {}).items()}}
    return all(seen[name] == value for name, value in expected.items())


def test_rows_that_no_sink_takes_are_counted_as_failed(tmp_path: Path) -> None:
    told = {"PYTHONPATH": str(EXAMPLE), "SYSLOG_SINK": "jsonl:/dev/full"}
    with namespace(), Service(tmp_path, "logs:Logs", environment=told) as service:
        service.begun(1)
        log("hello")
        until(lambda: int(service.rows()["failed"][0]) == 1, lambda: service.log)
        service.stop()


def test_a_service_without_a_sink_says_so_and_ends(tmp_path: Path) -> None:
    told = {"PYTHONPATH": str(EXAMPLE), "SYSLOG_SINK": ""}
    with namespace(), Service(tmp_path, "logs:Logs", environment=told) as service:
        assert service.process.wait(20) == 1
        assert "SYSLOG_SINK: '' is no sink" in service.log
