"""What a run leaves behind: one JSON document with every raw window. All tables, plots and comparisons only read it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

__all__ = [
    "Configuration",
    "Flood",
    "Gate",
    "Interval",
    "Kind",
    "ProgramRun",
    "Result",
    "ResultError",
    "Share",
    "Verdict",
    "encode",
    "load",
]

Kind = Literal["flood", "scale", "steer"]
Mode = Literal["inject", "wire"]
Verdict = Literal["reference", "noise floor", "slower", "faster", "not resolved", "source alone"]


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    pass


class Interval(_Record, kw_only=True):
    """An estimate and its bootstrap interval at `level`, all three in percent of the baseline's rx pps."""

    estimate: float
    low: float
    high: float
    level: float = 0.95

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high


class Share(_Record, kw_only=True):
    """How many of the profiler's samples had `symbol` on the stack (an inclusive share)."""

    event: str  # "cycles", or "cpu-clock" where there is no PMU
    symbol: str
    samples: int
    hits: int

    @property
    def percent(self) -> float:
        return 100 * self.hits / self.samples

    @property
    def standard_error(self) -> float:
        """Binomial, in percentage points."""
        share = self.hits / self.samples
        return float(100 * (share * (1 - share) / self.samples) ** 0.5)


class ProgramRun(_Record, kw_only=True):
    """BPF run-time statistics of the attached program."""

    program: str
    runs: int
    ns_per_run: float


class Configuration(_Record, kw_only=True):
    """One row: a configuration with one window a block.

    ns : mean nanoseconds a packet took, window by window (in inject mode whole ones, as the kernel gives them).
    sent, counted : packets of window and warm-up together, as the source sent them and as the stack's counter saw
    them. entries : size of the rule set, where it has one. against : another row, of the same block, that it is
    compared with as well.
    """

    name: str
    title: str
    ns: list[float] = []
    sent: list[int] = []
    counted: list[int] = []
    entries: int | None = None
    pps_mean: float = 0.0
    pps_sstdev: float = 0.0  # sample standard deviation in percent of the mean, as the letter has it
    outliers: int = 0  # windows outside Tukey's fences; flagged, never dropped
    delta: Interval | None = None  # of rx pps against the baseline of the same block
    verdict: Verdict = "reference"
    against: str | None = None
    change: Interval | None = None  # of rx pps against that row
    change_verdict: Verdict | None = None
    share: Share | None = None
    run: ProgramRun | None = None


class Gate(_Record, kw_only=True):
    """A condition without which the numbers mean nothing."""

    name: str
    passed: bool
    detail: str


class Flood(_Record, kw_only=True):
    """One flood: its blocks and what is made of them.

    order : per block, the indices of the rows as they ran. setups : blocks run in each set-up of the lab.
    steal_ticks : per block, ticks of 1/100 s that the hypervisor took from the pinned CPU.
    """

    name: str
    title: str
    counter: str
    window_packets: int  # 0 in wire mode, where a window is a second
    warmup_packets: int
    seconds: float = 0.0
    order: list[list[int]] = []
    setups: list[int] = []
    steal_ticks: list[int] = []
    configurations: list[Configuration] = []
    gates: list[Gate] = []

    def row(self, name: str) -> Configuration:
        return next(row for row in self.configurations if row.name == name)

    def share_change(self, row: Configuration) -> float | None:
        """By how many percentage points a row's CPU share differs from the baseline's."""
        base = self.row("baseline").share
        if base is None or row.share is None or row.name == "baseline":
            return None
        return row.share.percent - base.percent

    @property
    def noise(self) -> Interval:
        """The A/A row's interval: what this run cannot tell from nothing."""
        delta = self.row("again").delta
        assert delta is not None
        return delta


class Result(_Record, kw_only=True):
    """One run of the bench."""

    schema: Literal[1] = 1
    kind: Kind
    mode: Mode
    version: str  # of fastrecv
    started: str  # ISO 8601, UTC
    argv: list[str]
    seed: int
    cpu: int
    sources: int
    prefixes: str  # the distribution that the rule sets were drawn from, in words
    environment: dict[str, str]
    floods: list[Flood] = []
    warnings: list[str] = []

    @property
    def failed_gates(self) -> list[tuple[Flood, Gate]]:
        return [(flood, gate) for flood in self.floods for gate in flood.gates if not gate.passed]


class ResultError(ValueError):
    """A file that is no result of this bench."""


def encode(result: Result) -> bytes:
    return msgspec.json.encode(result) + b"\n"


def load(path: Path) -> Result:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Result)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{path} is not a result of fastrecv.bench: {error}") from None
