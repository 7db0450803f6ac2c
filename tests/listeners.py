"""`fastrecv listen` as a process of its own, and what it says."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_SLOW = 20  # seconds that a command may take to end


@dataclass
class Listening:
    """slots : what it has said of its sockets. said : all else, when it has ended."""

    process: subprocess.Popen[str]
    slots: list[dict[str, Any]]
    said: list[dict[str, Any]] = field(default_factory=list)

    def end(self, number: signal.Signals | None = signal.SIGINT) -> None:
        """By a signal, or None by itself; it has no complaints."""
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=_SLOW)
        assert (self.process.returncode, err) == (0, "")
        self.said = [json.loads(line) for line in out.splitlines()]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [found for found in self.said if found["event"] == kind]

    @property
    def served(self) -> list[int]:
        """By slot."""
        return [found["served"] for found in self.events("summary")]


@contextlib.contextmanager
def listening(protocol: str, where: str, *arguments: object, listeners: int = 3) -> Iterator[Listening]:
    """It listens when the block begins."""
    words = [sys.executable, "-m", "fastrecv", "listen", protocol, where, "--json", "--listeners", str(listeners)]
    process = subprocess.Popen(
        [*words, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    with process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(listeners)]
            assert all(lines), process.stderr.read() if process.stderr is not None else ""
            yield Listening(process, [json.loads(line) for line in lines])
        finally:
            process.kill()
