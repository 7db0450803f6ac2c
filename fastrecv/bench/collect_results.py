"""What a run of the collect bench leaves behind: one JSON document with the CPU time of every drain."""

from __future__ import annotations

from statistics import median
from typing import Literal

import msgspec

from fastrecv.bench.results import Gate

__all__ = ["CollectResult", "Collected", "encode"]


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    pass


class Collected(_Record, kw_only=True):
    """A collector on a stream. ns : CPU time a flow, by round."""

    stream: str
    contender: str
    title: str
    ns: list[float] = []

    @property
    def rate(self) -> float:
        """Flows a second of one CPU, the median over rounds."""
        return 1e9 / median(self.ns)


class CollectResult(_Record, kw_only=True):
    """One run of the collect bench. datagrams : of a drain."""

    schema: Literal[1] = 1
    kind: Literal["collect"] = "collect"
    version: str  # of fastrecv
    started: str  # ISO 8601, UTC
    argv: list[str]
    groups: list[str]
    seed: int
    cpu: int
    rounds: int
    datagrams: int
    environment: dict[str, str]
    rows: list[Collected] = []
    absent: dict[str, str] = {}  # title of a contender that did not run -> what it lacks
    gates: list[Gate] = []
    profiles: dict[str, str] = {}  # stream and title of who was slower -> what perf saw

    @property
    def failed(self) -> bool:
        return not all(gate.passed for gate in self.gates)


def encode(result: CollectResult) -> bytes:
    return msgspec.json.encode(result) + b"\n"
