"""A whole run: every flood through its passes, into one Result."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version

from fastrecv import features
from fastrecv.bench import environment, profile, sampler, stats
from fastrecv.bench.floods import FLOODS
from fastrecv.bench.lab import quick_grace_periods
from fastrecv.bench.results import Flood, Result
from fastrecv.bench.stage import Plan, Stage, refuse_foreign_programs

__all__ = ["NEEDS", "run"]

_FIRST = ("network namespaces", "expedited RCU grace periods")
NEEDS = (
    *_FIRST,
    "veth devices",
    "enumeration of BPF links",
    "sk_lookup programs",
    "UDP sockets in a SOCKMAP",
    "live frames in BPF_PROG_RUN",
    "BPF run-time statistics",
)

# Of sampling a row, at most: some 6,000 samples, a standard error of 0.3 pp at a share of 5 %. No row is sampled for
# longer than it was measured.
_SHARE_SECONDS = 1.5

OnProgress = Callable[[str, str, Stage | None], None]


def run(plan: Plan, on_progress: OnProgress) -> Result:
    """Measure what the plan says and return the result with everything derived.

    on_progress : called with the flood and what begins with it; after every block with the flood, "" and the Stage.
    NotSupported when the kernel or the privileges lack something, ForeignProgramError when a baseline is not to be had.
    """
    for name in _FIRST:
        features.check(name)
    with quick_grace_periods():  # first: a second bench is locked out before its probes look like foreign programs
        for name in NEEDS:
            features.check(name)
        if any(FLOODS[name].family == socket.AF_INET6 for name in plan.floods):
            features.check("IPv6")
        refuse_foreign_programs()
        return _run(plan, on_progress)


def _run(plan: Plan, on_progress: OnProgress) -> Result:
    known = environment.record()
    result = Result(
        kind=plan.kind,
        mode="wire" if plan.wire else "inject",
        version=version("fastrecv"),
        started=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        argv=sys.argv[1:],
        seed=plan.seed,
        cpu=plan.cpu,
        sources=plan.sources,
        prefixes=plan.rule_sets,
        environment=known,
    )
    event = None
    if plan.profiled:
        try:
            event = profile.choose_event()
        except profile.ProfileError as error:
            result.warnings.append(str(error))
    for name in plan.floods:
        on_progress(name, "measuring", None)
        flood = sampler.measure(plan.flood(name), plan, lambda stage: on_progress(stage.flood.name, "", stage))
        result.floods.append(flood)
        sound = all(gate.passed for gate in flood.gates)
        if sound:
            on_progress(name, "sampling the CPU with perf" if event else "counting program runs", None)
            _profile(flood, plan, event, result)
        stats.summarise(flood)
        if not sound:
            if name != plan.floods[-1]:
                result.warnings.append(f"a gate failed in {name}: the floods behind it were not measured")
            break
    result.warnings[:0] = environment.warn_about_host(known)
    result.warnings += environment.warn_about_floods(result.floods)
    return result


def _profile(flood: Flood, plan: Plan, event: str | None, result: Result) -> None:
    with plan.open(flood) as stage:
        flood.gates.append(profile.runs(stage))
        if event is not None:
            try:
                profile.shares(stage, event, min(_SHARE_SECONDS, plan.flood_seconds / len(flood.configurations)))
            except profile.ProfileError as error:
                result.warnings.append(f"{flood.name}: {error}")
        flood.gates += plan.prove(stage)
