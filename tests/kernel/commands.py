"""The command line under test: run in this process for its speed, or as a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastrecv.cli.main import run

COMMAND = (sys.executable, "-m", "fastrecv")
WEB = ("web", "tcp", "198.51.100.0/24", "80")
MANY = [
    ("web", "tcp", "198.51.100.0/24", "80"),
    ("web", "any", "198.51.100.128/25", "8000-8999"),
    ("dns", "udp", "198.51.100.7/32", "53"),
    ("drop", "any", "2001:db8::/32", "any"),
]


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Command:
    """`fastrecv lookup`, or another group of commands, run in this process on a bpffs of its own."""

    def __init__(self, bpffs: Path, capsys: pytest.CaptureFixture[str], group: str = "lookup") -> None:
        self.bpffs, self._capsys, self._group = bpffs, capsys, group

    def __call__(self, name: str, *arguments: object) -> Said:
        return self.bare(self._group, name, *arguments, "--bpffs", self.bpffs)

    def bare(self, *arguments: object) -> Said:
        self._capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Said(code, *self._capsys.readouterr())

    def exits(self, *arguments: object) -> Said:
        """What ends by SystemExit, as completion does."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run([str(argument) for argument in arguments])
        assert isinstance(caught.value.code, int)
        return Said(caught.value.code, *self._capsys.readouterr())

    def done(self, name: str, *arguments: object) -> str:
        """What it printed, having succeeded without a complaint."""
        said = self(name, *arguments)
        assert (said.code, said.err) == (0, "")
        return said.out

    def refused(self, name: str, *arguments: object) -> str:
        """Why it failed, in one line."""
        said = self(name, *arguments)
        assert (said.code, said.out) == (1, "")
        return one_line(said.err)

    def misused(self, name: str, *arguments: object) -> str:
        """What was wrong with the words."""
        said = self(name, *arguments)
        assert (said.code, said.out) == (2, "")
        (line,) = said.err.splitlines()
        path = f"fastrecv {self._group} {name}"
        assert line.startswith(f"{path}: ")
        assert line.endswith(f" (see {path} --help)")
        return line.removeprefix(f"{path}: ").removesuffix(f" (see {path} --help)")

    def process(self, name: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        words = [*COMMAND, self._group, name, *map(str, arguments), "--bpffs", str(self.bpffs)]
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )


def one_line(err: str) -> str:
    (line,) = err.splitlines()
    assert line.startswith("fastrecv: ")
    return line.removeprefix("fastrecv: ")


def rows(table: str) -> list[list[str]]:
    """The lines below a table's header, as columns."""
    return [re.split(r"  +", line) for line in table.splitlines()[1:]]
