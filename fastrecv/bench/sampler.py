"""The measuring loop: blocks of windows, each configuration once a block, in random order, every packet counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fastrecv.bench import floods
from fastrecv.bench.floods import XDP_DROP, XDP_PASS, XDP_TX
from fastrecv.bench.results import Flood, Gate
from fastrecv.bench.stage import (
    ForeignProgramError,
    Plan,
    Row,
    Stage,
    flowing,
    pinned,
    refuse_foreign_programs,
)

__all__ = ["OnBlock", "measure"]

# Packets of a window and of the warm-up before it: some milliseconds, so that neither the patching of the static key
# nor the fixed cost of a call is felt; longer windows would give fewer blocks.
_WINDOW = {"udp4": (4096, 2048), "udp6": (4096, 2048), "syn4": (2048, 1024), "syn6": (2048, 1024)}

_WIRE_WINDOW = 1.0  # seconds, the cover letter's sampling interval
_WIRE_WARMUP = 0.1
_WIRE_SETTLE = 1.0
_WIRE_BURST = 1 << 14  # frames a call: some 20 ms, so that a window's end is not far from a call's end

_SETUP_SECONDS = 0.5  # the least that a set-up serves for, in whole blocks

OnBlock = Callable[[Stage], None]


def measure(flood: floods.Flood, plan: Plan, on_block: OnBlock) -> Flood:
    """Measure one flood for the plan's time and leave the gates of exact counts and of foreign programs.

    ForeignProgramError when there is one before the first block.

    The lab is set up afresh every half second or every block: something that is fixed for the life of a set-up (where
    its memory lies?) has been seen to move one side of a comparison by 9 %. No set-up's luck may decide a run.
    """
    window, warmup = (0, 0) if plan.wire else _WINDOW[flood.name]
    record = Flood(
        name=flood.name,
        title=flood.title,
        counter=" ".join(filter(None, flood.counter)),
        window_packets=window,
        warmup_packets=warmup,
        configurations=plan.configurations(flood.name),
    )
    rng = np.random.default_rng(plan.seed)
    began, wrong, foreign = time.monotonic(), "", ""
    try:
        while record.seconds < plan.flood_seconds and not wrong:
            before = time.monotonic()
            with plan.open(record) as stage:
                serve = max(_SETUP_SECONDS, 3 * (time.monotonic() - before))  # large rule sets take long to load
                (_wire if plan.wire else _inject)(stage, _blocks(stage, serve, rng, on_block))
            wrong = _miscount(record)
            record.seconds = time.monotonic() - began
    except ForeignProgramError as error:
        if not record.order:
            raise
        foreign = str(error)
    found = sum(sum(row.counted) for row in record.configurations)
    record.gates += [
        Gate(
            name="no foreign program",
            passed=not foreign,
            detail=foreign or "no other sk_lookup program on the host at the start of any block",
        ),
        Gate(
            name="exact counts",
            passed=not wrong,
            detail=wrong or f"{found:,} packets sent to the sink and found in {record.counter}, window by window",
        ),
    ]
    return record


def _blocks(stage: Stage, serve: float, rng: np.random.Generator, on_block: OnBlock) -> Iterator[Row]:
    """Give the rows in the order in which they are to run, block after block, until the set-up has served its time.

    Ends at once when a window's packets do not add up.
    """
    record = stage.record
    began = time.monotonic()
    first = len(record.order)
    while len(record.order) == first or time.monotonic() - began < serve:
        refuse_foreign_programs()
        order = rng.permutation(len(stage.rows)).tolist()
        steal = _steal_ticks(stage.cpu)
        for index in order:
            yield stage.rows[index]
        if len(record.order) == first:
            record.setups.append(0)
        record.order.append(order)
        record.setups[-1] += 1
        record.steal_ticks.append(_steal_ticks(stage.cpu) - steal)
        if _miscount(record):
            break
        on_block(stage)


def _miscount(record: Flood) -> str:
    """What does not add up in the last window of a row; "" where all does."""
    for row in record.configurations:
        due = 0 if row.name == "harness" else row.sent[-1]
        if row.counted[-1] != due:
            return (
                f"block {len(record.order)}, {row.name}: {row.sent[-1]:,} packets sent, {row.counted[-1]:,} in "
                f"{record.counter} where {due:,} were due"
            )
    return ""


def _inject(stage: Stage, blocks: Iterator[Row]) -> None:
    """Frames straight into the host's stack, everything on one CPU; a window's time is the kernel's own mean.

    The wall clock of a call would be mostly its set-up. The count of a window includes its warm-up.
    """
    counter, record = stage.counter, stage.record
    with pinned(stage.cpu), stage.lab.host:
        counted = counter.read()
        for row in blocks:
            source, frames = row.source, row.source.frames
            verdict = XDP_DROP if row.harness else XDP_PASS
            with row.attach():
                source.send(verdict, record.warmup_packets)
                row.configuration.ns.append(source.send(verdict, record.window_packets))
            now = counter.read()
            row.configuration.counted.append(now - counted)
            row.configuration.sent.append(source.frames - frames)
            counted = now


def _wire(stage: Stage, blocks: Iterator[Row]) -> None:
    """Frames across the veth into NAPI, the rate read from the host's interface counters once a second.

    Frames lost on the way fail the gate like any other miscount.
    """
    counter, lab = stage.counter, stage.lab
    for row in blocks:
        counted, frames, arrived = counter.read(), row.source.frames, lab.received()
        with row.attach(), flowing(stage, row, XDP_TX, _WIRE_BURST):
            time.sleep(_WIRE_WARMUP)
            began, before = time.monotonic(), lab.received()
            time.sleep(_WIRE_WINDOW)
            passed, packets = time.monotonic() - began, lab.received() - before
        sent = row.source.frames - frames
        deadline = time.monotonic() + _WIRE_SETTLE
        while lab.received() - arrived < sent and time.monotonic() < deadline:
            time.sleep(0.001)  # ksoftirqd may still have some in the ring
        row.configuration.ns.append(1e9 * passed / max(packets, 1))
        row.configuration.counted.append(counter.read() - counted)
        row.configuration.sent.append(sent)


def _steal_ticks(cpu: int) -> int:
    """Ticks (1/100 s) that the hypervisor took from this CPU since boot; proc(5)."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith(f"cpu{cpu} "):
            return int(line.split()[8])
    return 0
