"""Whether a collector survives its engine: away for a while at full rate, and every datagram is found again.

One namespace: a source of numbered datagrams at a steady rate, `fastrecv run` with a JetStream sink, and nats-server,
which is killed and started again on the same store. What is not as it must be is a fault, in words.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastrecv.bench.numbered import NumberedSource, udp_counters
from fastrecv.bench.outage_engine import PREFIX, STREAM, Consumed, Engine
from fastrecv.bench.outage_publishing import FOLDER, HANDLER, SHARDS, SINK, STATISTICS
from fastrecv.bench.survive_churn import Pace, calm
from fastrecv.bench.survive_service import ADDRESS, PORT, Service, namespace
from fastrecv.netns import Namespace

__all__ = ["SHARDS_OF", "Account", "Plan", "Run", "faults", "run"]

SHARDS_OF = 8
_BUFFER = 64 << 20  # bytes
_BATCH = 1024
_STEADY = 3.0  # seconds before the engine goes, and after all is drained
_LOOK = 0.002  # seconds: the source sends in bursts of what falls into them
_PATIENCE = 60.0  # seconds, and so long as the engine was away
_GRACEFUL = 30  # seconds that workers have for bringing out what waits
_SPOOL = "4G"


class Plan(NamedTuple):
    """away : seconds. rate : datagrams a second."""

    away: float
    rate: float
    senders: int
    workers: int


class Account(NamedTuple):
    """In datagrams. taken : out of queues; full : dropped by a full queue, as the kernel counts it; refused : by
    others of its reasons. consumed : found in the stream, each once. missing : sent and not found; twice : found more
    than once. disordered : found behind a later one of its sender. astray : of a sender who was in another before.
    """  # fmt: skip

    sent: int
    taken: int
    full: int
    refused: int
    consumed: int
    missing: int
    twice: int
    disordered: int
    astray: int


class Run(NamedTuple):
    """What came of it. full_bytes, full_messages : the highest fill of the spool. drained : seconds from the engine's
    return until no more waited than before it went; None: never. repeated : messages that the stream has twice.
    duplicates : those that it has removed. rate : datagrams a second, as they were sent.
    """  # fmt: skip

    plan: Plan
    seconds: float
    rate: float
    account: Account
    full_bytes: int
    full_messages: int
    drained: float | None
    messages: int
    repeated: int
    duplicates: int
    dropped: int
    reconnects: int


def run(plan: Plan, on_step: Callable[[str], None]) -> Run:
    """Root: namespaces, BPF. on_step : told what begins. RuntimeError where something does not do what it should."""
    with tempfile.TemporaryDirectory(prefix="fastrecv-outage-") as made, namespace() as space:
        folder = Path(made)
        with Engine(folder) as engine:
            engine.start()
            return _measured(plan, folder, space, engine, on_step)


def faults(found: Run) -> list[str]:
    """What is not as it must be."""
    account = found.account
    wrong = {
        "datagrams were dropped by the kernel": account.full + account.refused,
        "datagrams are missing": account.missing,
        "datagrams were found twice": account.twice,
        "datagrams were found behind a later one of their sender": account.disordered,
        "datagrams were found in a shard that was not their sender's": account.astray,
        "messages were given up": found.dropped,
    }
    said = [f"{count:,} {what}" for what, count in wrong.items() if count]
    if found.drained is None:
        said.append("the spool was not drained")
    if account.sent != account.taken:
        said.append(f"{account.sent:,} datagrams were sent and {account.taken:,} received")
    if not found.full_messages or not found.reconnects:
        said.append("nothing has waited for the engine: it was not away")
    return said


def _measured(plan: Plan, folder: Path, space: Namespace, engine: Engine, on_step: Callable[[str], None]) -> Run:
    sink = f"{engine.url}/{PREFIX}?stream={STREAM}&spool={folder}/spool&spool-size={_SPOOL}"
    settings = {FOLDER: str(folder), SINK: sink, SHARDS: str(SHARDS_OF)}
    with Service(
        folder, HANDLER, "-w", plan.workers, "--batch-size", _BATCH, "--receive-buffer", _BUFFER,
        "--graceful-timeout", _GRACEFUL, environment=settings,
    ) as service:  # fmt: skip
        service.begun(plan.workers)
        with NumberedSource(space, plan.senders, ADDRESS, PORT, limit=1) as source:
            pace, began = Pace(source, space, 0, plan.rate), time.monotonic()
            on_step("the engine is there")
            _send(pace, _STEADY)
            engine.kill()
            gone = time.monotonic()
            on_step(f"the engine is away for {plan.away:g} s")
            _send(pace, plan.away)
            engine.start()
            back = time.monotonic()
            on_step("the engine is back")
            while not _drained(folder, gone, back) and time.monotonic() < back + plan.away + _PATIENCE:
                _send(pace, 0.2)
            _send(pace, _STEADY)
            seconds, sent = time.monotonic() - began, source.stop()
        calm(space, sent)
        if code := service.stop(seconds=_GRACEFUL + _PATIENCE):
            raise RuntimeError(f"the service ended with {code}\n{service.log}")
    on_step("what the stream has is looked at")
    told, consumed = _told(folder), engine.consumed()
    away = [sample for samples in told for sample in samples if sample["at"] >= gone]
    last = [samples[-1] for samples in told]
    return Run(
        plan=plan, seconds=seconds, rate=sent / seconds, account=_account(sent, udp_counters(space), consumed),
        full_bytes=max(sample["spooled_bytes"] for sample in away),
        full_messages=max(sample["waiting"] for sample in away), drained=_drained(folder, gone, back),
        messages=consumed.messages, repeated=consumed.repeated, duplicates=sum(one["duplicates"] for one in last),
        dropped=sum(one["dropped"] for one in last), reconnects=sum(one["reconnects"] for one in last),
    )  # fmt: skip


def _send(pace: Pace, seconds: float) -> None:
    """At the source's rate."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pace.look()
        time.sleep(_LOOK)


def _told(folder: Path) -> list[list[dict[str, Any]]]:
    """What each worker has said of its sink, but for half a line at the end."""
    return [
        [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for path in folder.glob(f"*{STATISTICS}")
    ]


def _drained(folder: Path, gone: float, back: float) -> float | None:
    """Seconds after the engine's return until each worker had no more waiting than before it went; None: not yet."""
    took = 0.0
    for samples in _told(folder):
        usual = max((sample["waiting"] for sample in samples if gone - 1 < sample["at"] < gone), default=0)
        at = next((one["at"] for one in samples if one["at"] > back and one["waiting"] <= usual), None)
        if at is None:
            return None
        took = max(took, at - back)
    return took


def _account(sent: int, counters: dict[str, int], consumed: Consumed) -> Account:
    rows = consumed.rows
    order = np.argsort(rows["sender"], kind="stable")  # of each sender, as they came
    sender, number, shard = (
        column[order].astype(np.int64) for column in (rows["sender"], rows["number"], consumed.shards)
    )
    same = sender[1:] == sender[:-1]
    unique = len(np.unique(sender << 32 | number))
    return Account(
        sent, counters["InDatagrams"], counters["RcvbufErrors"] + counters["MemErrors"],
        counters["InErrors"] - counters["RcvbufErrors"] - counters["MemErrors"] + counters["NoPorts"],
        len(rows), sent - unique, len(rows) - unique, int(np.count_nonzero(same & (np.diff(number) < 0))),
        int(np.count_nonzero(same & (np.diff(shard) != 0))),
    )  # fmt: skip
