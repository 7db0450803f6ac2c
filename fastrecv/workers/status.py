"""How a service stands: one tree of records, which the control socket, the metrics and the commands all show."""

from __future__ import annotations

import os
import time
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fastrecv.sockets import memory
from fastrecv.workers.counters import Counters
from fastrecv.workers.fleet import Fleet
from fastrecv.workers.slots import Slot
from fastrecv.workers.steering import Chooser, Steering
from fastrecv.workers.taking import Taking

__all__ = ["Counts", "Service", "State", "Worker", "WorkerState", "in_rings", "taken"]

State = Literal["starting", "running", "restarting", "stopping"]
WorkerState = Literal["starting", "joining", "reading", "waiting", "leaving", "given up"]

_SUMMED = ("datagrams", "bytes", "batches", "truncated", "handled", "failed", "errors", "killed", "deaths")


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """What was counted since the service began, over all that have read.

    datagrams, bytes, batches, truncated : received. fill : batches by how many datagrams they had: 1, 2 or 3, 4 to 7,
    ... handled : datagrams whose handler has returned; handler_seconds : what that took. failed : datagrams of batches
    whose handler raised an exception; errors : such batches. killed : datagrams in the hands of workers that died.
    kernel_drops : datagrams that found no room in a queue or ring, or met the filter of a service that stops; 32 bits a
    socket (SO_MEMINFO). restarts : how often another worker than the first has begun to read. deaths : workers that
    have ended otherwise than told.
    """

    datagrams: int
    bytes: int
    batches: int
    fill: list[int]
    truncated: int
    handled: int
    failed: int
    errors: int
    killed: int
    handler_seconds: float
    kernel_drops: int
    restarts: int
    deaths: int


class Worker(Counts, frozen=True):
    """A slot: its socket, who reads it, and what was counted there, before the slot was last added as well.

    pid : of who reads, or else of who is to read next; None where there is nobody. state : joining has no senders until
    somebody reads; waiting is for the next try; leaving has its queue read to its end.
    reading_seconds : since the process began to read; None where nobody does. cause : how the last process that died
    has ended. queue_bytes : what waits, of queue_limit, in the kernel's own account.
    """

    slot: int
    pid: int | None
    state: WorkerState
    reading_seconds: float | None
    given_up: bool
    cause: str | None
    queue_bytes: int
    queue_limit: int


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """A service and its workers.

    pid : the supervisor's. uptime : seconds. chooser : who decides which worker gets a sender: the balancer's program,
    classic BPF, or the kernel's hash. wanted : how many workers there shall be. restarting : how many are still to be
    restarted. failure : why the last restart or change of their number came to no good end. put_back : how often the
    group's program was put back in the place of another. renewed : sockets that had left the group. total : the counts
    of all slots, also of those that are no more. interface : what AF_XDP takes datagrams off, and in which mode; None
    where they come by sockets alone. in_rings : datagrams that it has taken and no worker has received: they wait, or
    were lost with a worker that was killed.
    """

    pid: int
    uptime: float
    address: str
    policy: str
    chooser: Chooser
    handler: str
    state: State
    wanted: int
    restarting: int
    failure: str | None
    put_back: int
    renewed: int
    total: Counts
    workers: list[Worker]
    interface: str | None = None
    in_rings: int = 0

    @property
    def unready(self) -> str | None:
        """Why the service cannot do its work now; None where every slot has a reader and it does not stop."""
        if self.state == "stopping":
            return "the service is stopping"
        for worker in self.workers:
            if worker.reading_seconds is None and worker.state not in ("joining", "leaving"):
                return f"worker {worker.slot} does not read: it is {worker.state}"
        return None


def taken(
    fleet: Fleet,
    counters: Counters,
    steering: Steering,
    taking: Taking | None,
    *,
    began: float,
    address: str,
    policy: str,
    handler: str,
) -> Service:
    """As it is now. began : time.monotonic() when the service did."""
    now, rows = time.monotonic(), counters.read()
    workers = [_worker(slot, rows[slot.number : slot.number + 1], now) for slot in fleet.slots]
    gone = np.delete(rows, [slot.number for slot in fleet.slots])
    drops = int(gone["closed_drops"].sum() + gone["ring_drops"].sum()) + sum(worker.kernel_drops for worker in workers)
    return Service(
        pid=os.getpid(), uptime=round(now - began, 3), address=address, policy=policy, chooser=steering.chooser,
        handler=handler, state=_state(fleet), wanted=fleet.wanted, restarting=fleet.restarting, failure=fleet.failure,
        put_back=steering.repairs.put_back, renewed=steering.repairs.renewed,
        total=Counts(**_counts(rows), kernel_drops=drops), workers=workers,
        interface=None if taking is None else str(taking), in_rings=in_rings(counters, taking),
    )  # fmt: skip


def in_rings(counters: Counters, taking: Taking | None) -> int:
    """Datagrams that were taken off the interface, and neither received nor dropped by who counts it."""
    if taking is None:
        return 0
    rows = counters.read()  # first: workers go on meanwhile
    return max(0, taking.taken - int(rows["by_ring"].sum() + rows["ring_drops"].sum()))


def _state(fleet: Fleet) -> State:
    if fleet.stopping:
        return "stopping"
    if not fleet.begun:
        return "starting"
    return "restarting" if fleet.restarting else "running"


def _worker(slot: Slot, rows: NDArray[np.void], now: float) -> Worker:
    held, reader = memory(slot.sock), slot.reader
    process = reader or slot.successor
    since = reader.read_since if reader is not None else None
    return Worker(
        slot=slot.number, pid=process.pid if process is not None else None, state=_worker_state(slot),
        reading_seconds=None if since is None else round(now - since, 3), given_up=slot.abandoned, cause=slot.cause,
        queue_bytes=held.queued, queue_limit=held.limit, **_counts(rows),
        kernel_drops=int(rows["closed_drops"].sum() + rows["ring_drops"].sum()) + held.drops,
    )  # fmt: skip


def _worker_state(slot: Slot) -> WorkerState:
    if slot.leaving:
        return "leaving"
    if slot.reader is not None:
        return "reading"
    if slot.abandoned:
        return "given up"
    if slot.new:
        return "joining"
    return "waiting" if slot.successor is None else "starting"


def _counts(rows: NDArray[np.void]) -> dict[str, Any]:
    """The sums of some rows."""
    counts: dict[str, Any] = {name: int(rows[name].sum()) for name in _SUMMED}
    counts["fill"] = rows["fill"].sum(axis=0).tolist()
    counts["handler_seconds"] = int(rows["handler_ns"].sum()) / 1e9
    counts["restarts"] = int(np.maximum(rows["starts"], 1).sum()) - len(rows)
    return counts
