"""The example units: systemd understands them, and the command understands what they say."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastrecv.cli.main import run

UNITS = Path(__file__).parents[2] / "examples" / "systemd"
SERVICE = (UNITS / "fastrecv-collector.service").read_text()
COMMAND, CONFIG = "/opt/collector/bin/fastrecv", "/etc/fastrecv/collector.toml"


def test_the_command_of_the_unit_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = re.findall(r"^ExecStart=(.*)$", SERVICE, re.MULTILINE)
    name, *words = shlex.split(command)
    assert name == COMMAND
    words = [str(UNITS / "collector.toml") if word == CONFIG else word for word in words]
    assert run([*words, "--check"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^handler +collector:handle +.*collector.toml$", said, re.MULTILINE)


def test_systemd_understands_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here")
    units = []
    for path in sorted(UNITS.glob("fastrecv-collector.s*")):
        units.append(tmp_path / path.name)
        units[-1].write_text(path.read_text().replace(COMMAND, f"{sys.executable} -m fastrecv"))
    assert len(units) == 2
    said = subprocess.run([analyze, "verify", "--man=no", *units], check=False, capture_output=True, text=True)
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")
