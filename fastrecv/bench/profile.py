"""Where the CPU time goes: two passes of their own, since both slow the path that they look at.

`shares` samples the pinned CPU with perf while the flood goes on and counts the samples with the flood's lookup
function on the stack: the cover letter's inclusive share. `runs` lets the kernel time the attached program (BPF
run-time statistics).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from fastrecv.bench.floods import XDP_PASS
from fastrecv.bench.results import Gate, ProgramRun, Share
from fastrecv.bench.stage import Row, Stage, flowing, pinned
from fastrecv.bpf import Statistics

__all__ = ["PROFILED", "ProfileError", "choose_event", "runs", "shares"]

_HERTZ = 3999  # odd, so that it does not beat with the timer tick
_BURST = 1 << 13  # frames a call while perf samples: a few ms
# The kernel's symbols, BPF's among them, are in kallsyms: BPF events and build ids cost up to a second and say no more.
_BARE = ("--no-bpf-event", "--no-buildid", "--no-buildid-cache")
_RUNS = 1 << 14  # program runs to time
_RUNS_WARMUP = 1 << 11

PROFILED = ("baseline", "no-program")  # the rows sampled beside the attached programs, as in the letter


class ProfileError(RuntimeError):
    """perf is missing or refuses; the run goes on without CPU shares."""


def choose_event() -> str:
    """The event: "cycles" where the machine has a PMU, else "cpu-clock", an hrtimer. ProfileError: perf cannot run."""
    if shutil.which("perf") is None:
        raise ProfileError("perf is not installed: no CPU shares (Debian: apt install linux-perf)")
    for event in ("cycles", "cpu-clock"):
        with tempfile.TemporaryDirectory() as folder:
            data = f"{folder}/perf.data"
            done = _perf("record", "-q", *_BARE, "-e", event, "-o", data, "--", "true")
            if done.returncode == 0:
                # Without a PMU some versions of perf take cpu-clock for cycles without a word: ask what was recorded.
                recorded = _perf("evlist", "-i", data).stdout
                return "cycles" if "cycles" in recorded else "cpu-clock"
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise ProfileError(f"perf cannot sample here: no CPU shares ({reason})")


def shares(stage: Stage, event: str, seconds: float) -> None:
    """Sample each row for `seconds` while the flood goes on, and note its share; perf itself stays off that CPU."""
    if not re.search(rf"\b{re.escape(stage.flood.symbol)}$", Path("/proc/kallsyms").read_text(), re.MULTILINE):
        raise ProfileError(f"this kernel has no function {stage.flood.symbol}: no CPU shares")
    others = os.sched_getaffinity(0) - {stage.cpu}
    for row in _profiled(stage):
        with tempfile.TemporaryDirectory() as folder:
            data = f"{folder}/perf.data"
            with row.attach(), flowing(stage, row, XDP_PASS, _BURST), pinned(*(others or {stage.cpu})):
                recorded = _perf(
                    "record", "-q", *_BARE, "-e", event, "-F", str(_HERTZ), "-C", str(stage.cpu), "-g",
                    "-o", data, "--", "sleep", str(seconds),
                )  # fmt: skip
            if recorded.returncode:
                raise ProfileError(f"perf record failed: {recorded.stderr.strip()}")
            listed = _perf("script", "-i", data, "--no-inline", "-F", "ip,sym")
        if listed.returncode:
            raise ProfileError(f"perf script failed: {listed.stderr.strip()}")
        row.configuration.share = count(listed.stdout, event, stage.flood.symbol)


def count(listing: str, event: str, symbol: str) -> Share:
    """Read `perf script -F ip,sym`: one paragraph a sample, one "address symbol" line a frame of its stack."""
    stacks = [stack for stack in listing.split("\n\n") if stack.strip()]
    if not stacks:
        raise ProfileError("perf took no sample: no CPU shares")
    hits = sum(any(line.split()[1:2] == [symbol] for line in stack.splitlines()) for stack in stacks)
    return Share(event=event, symbol=symbol, samples=len(stacks), hits=hits)


def runs(stage: Stage) -> Gate:
    """Time the attached programs; the gate says whether each ran once a packet."""
    wrong = []
    for row in stage.rows:
        if row.program is None:
            continue
        with pinned(stage.cpu), stage.lab.host, row.attach():
            row.source.send(XDP_PASS, _RUNS_WARMUP)
            with Statistics():
                before = row.program.info
                row.source.send(XDP_PASS, _RUNS)
                after = row.program.info
        ran = after.run_count - before.run_count
        if ran != _RUNS:
            wrong.append(f"{row.configuration.name} ran {ran:,} times for {_RUNS:,} packets")
        row.configuration.run = ProgramRun(
            program=row.program.name, runs=ran, ns_per_run=(after.run_time_ns - before.run_time_ns) / max(ran, 1)
        )
    return Gate(
        name="one run a packet",
        passed=not wrong,
        detail="; ".join(wrong) or f"every attached program ran {_RUNS:,} times for {_RUNS:,} packets",
    )


def _profiled(stage: Stage) -> list[Row]:
    return [row for row in stage.rows if row.program is not None or row.configuration.name in PROFILED]


def _perf(*arguments: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as home:  # perf's symbol cache would stay behind in ~/.debug
        return subprocess.run(  # noqa: S603 - our own arguments
            ["perf", *arguments],  # noqa: S607 - perf is wherever the system keeps it
            capture_output=True, text=True, check=False,
            env={**os.environ, "HOME": home, "PERF_BUILDID_DIR": str(Path(home))},
        )  # fmt: skip
