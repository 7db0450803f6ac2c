"""The command `python -m fastrecv.bench xdp`: what it refuses, before anything needs a privilege."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from fastrecv.bench import xdp_cli

ABSENT = """
import sys
sys.modules["fastrecv._xsk"] = None
from fastrecv.bench.cli import main
sys.exit(main(["xdp"]))
"""


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(xdp_cli.command, arguments)
    assert done.exit_code == 2
    return done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "fast"], "'fast' is no list of numbers like"),
        (["--rates", "1,nan"], "give millions a second, from 0.05 to 20"),
        (["--rates", "0.01"], "give millions a second, from 0.05 to 20"),
        (["--seconds", "nan"], "nan"),
        (["--cpu", "4096"], "CPU 4096 is not one of"),
        (["--source-cpu", "4096"], "CPU 4096 is not one of"),
        (["--json", "/nowhere/xdp.json"], "/nowhere/xdp.json cannot be written"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_one_cpu_is_too_few() -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    os.sched_setaffinity(0, [one])
    try:
        assert f"source and reader need a CPU each, and there is only [{one}]" in refused()
    finally:
        os.sched_setaffinity(0, before)


def test_the_source_leaves_the_reader_its_cpu() -> None:
    cpu = min(os.sched_getaffinity(0))
    assert f"CPU {cpu} is not one of" in refused("--source-cpu", str(cpu), "--cpu", str(cpu))


def test_without_libxdp_it_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 77
    assert "install libxdp 1.2 or newer (Debian: libxdp1)" in done.stderr
    assert "Traceback" not in done.stderr
