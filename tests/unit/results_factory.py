"""Results for tests of what reads them: seeded windows, everything derived by the code that derives it in a run."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fastrecv.bench import stats
from fastrecv.bench.results import Configuration, Flood, Gate, Kind, ProgramRun, Result, Share

BLOCKS = 60
_ROWS = {"baseline": 1.0, "again": 1.0, "no-program": 1.04, "letter": 1.2, "assign-only": 1.14, "harness": 0.1}
_SHARES = {"baseline": 40, "no-program": 70, "letter": 190, "assign-only": 140}


_STEERED = {"baseline": 1.0, "again": 1.0, "hash": 1.1, "classic-destination": 1.15, "source": 1.3, "leaving": 1.6,
            "one-sender": 0.9, "connected": 0.85, "harness": 0.1}  # fmt: skip


def flood(
    name: str = "udp4",
    *,
    rows: dict[str, float] | None = None,
    shares: bool = True,
    ns: float = 700.0,
    against: dict[str, str] | None = None,
) -> Flood:
    """One flood; `rows` : name of a configuration -> its ns a packet as a multiple of the baseline's."""
    rng = np.random.default_rng(3)
    drift = 1 + 0.1 * np.sin(np.linspace(0, 9, BLOCKS))
    made = Flood(
        name=name, title=f"flood {name}", counter="Udp InErrors", window_packets=100, warmup_packets=10, seconds=2.0,
        order=[list(range(6))] * BLOCKS, setups=[BLOCKS // 2] * 2, steal_ticks=[0] * BLOCKS,
        gates=[Gate(name="exact counts", passed=True, detail="all found")],
    )  # fmt: skip
    for row, factor in (rows or _ROWS).items():
        size = row.rpartition("-")[2]
        configuration = Configuration(
            name=row,
            title=f"{row}: as it is",
            ns=(ns * factor * drift * rng.lognormal(0, 0.02, BLOCKS)).tolist(),
            sent=[110] * BLOCKS,
            counted=[0 if row == "harness" else 110] * BLOCKS,
            entries=int(size) if size.isdigit() else None,
            against=(against or {}).get(row),
        )
        if shares and row in _SHARES:
            configuration.share = Share(event="cpu-clock", symbol="__udp4_lib_lookup", samples=1000, hits=_SHARES[row])
        if shares and row in ("letter", "assign-only"):
            configuration.run = ProgramRun(program=row, runs=1000, ns_per_run=150.4)
        made.configurations.append(configuration)
    stats.summarise(made)
    return made


def result(*floods: Flood, kind: Kind = "flood", mode: Literal["inject", "wire"] = "inject") -> Result:
    return Result(
        kind=kind, mode=mode, version="0.1.0", started="2026-11-22T12:00:00Z", argv=["--flood", "udp"], seed=1, cpu=1,
        sources=10_000, prefixes="200 prefixes", environment={"kernel": "Linux 6.18", "CPU": "AMD EPYC", "CPUs": "2"},
        floods=list(floods) or [flood("udp4"), flood("udp6", ns=760)], warnings=["the moon is full"],
    )  # fmt: skip


def scale() -> Result:
    rows = {"baseline": 1.0, "again": 1.0, "no-program": 1.04, "letter-1": 1.15, "letter-1000": 1.2, "harness": 0.1}
    return result(flood(rows=rows, shares=False), kind="scale")


def steered(name: str = "udp4", rows: dict[str, float] | None = None, ns: float = 700.0) -> Flood:
    """A flood of `steer`; `rows` : other multiples than usual, 0 to leave a row out."""
    wanted = {row: factor for row, factor in (_STEERED | (rows or {})).items() if factor}
    against = {row: "hash" for row in wanted if row in ("classic-destination", "source", "leaving", "border")}
    return flood(name, rows=wanted, shares=False, ns=ns, against=against | {"connected": "one-sender"})


def steer(*floods: Flood) -> Result:
    made = floods or (steered(), steered("syn4", {"one-sender": 0, "connected": 0}, 3000.0))
    return result(*made, kind="steer")
