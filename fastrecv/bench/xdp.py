"""AF_XDP against the socket layer, live: who receives how much of what comes across a wire, and what is lost.

Source and NAPI poll have one CPU, the reader another, as a network card's queue and its service would. So what the
stack does for a socket's datagram is done on the source's CPU, and where that is full the source falls behind: what is
offered is measured, never taken from what was asked for. Frames leave far0 on schedule, at rising rates, and every one
is found again: received, or in a counter of the kernel. In a round each contender is offered the rates once, in random
order of contenders; all open anew for every rate. What is still queued at the end of a window is received, too, so that
a window must be much longer than a queue.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from fastrecv import features
from fastrecv.bench import environment, xsk_limit
from fastrecv.bench.floods import BURST, FIRST_SOURCE_PORT, FLOODS, Source
from fastrecv.bench.lab import Lab, quick_grace_periods
from fastrecv.bench.limit import compiled
from fastrecv.bench.results import Gate
from fastrecv.bench.stage import pinned
from fastrecv.bench.xdp_contenders import CONTENDERS, PAYLOADS, RECEIVERS, ROOM, Contender, Opened, Stop
from fastrecv.bench.xdp_results import Row, Window, XdpResult, judge

__all__ = ["NEEDS", "Plan", "run"]

NEEDS = (
    "network namespaces",
    "expedited RCU grace periods",
    "veth devices",
    "AF_XDP in copy mode",
    "live frames in BPF_PROG_RUN",
)

_SOURCES = 1000  # ports
_QUEUED = ROOM - 4 * BURST  # datagrams of a drain: there is room for all
_GENTLY = 200_000.0  # frames a second, of what is not timed
_WARM = 16 * BURST
_DROPPED = 4096 * BURST
_HOPELESS = 0.2
"""Who has lost more twice running, or whose source has fallen so far behind, is not offered more in this round."""


@dataclass(frozen=True)
class Plan:
    """What a run is to measure. rates : frames a second. seconds : of every window. cpu : the reader's."""

    rates: list[float]
    rounds: int
    seconds: float
    seed: int
    cpu: int
    source_cpu: int


class Wire:
    """The lab with a source for each kind of traffic, which has its own CPU and thread."""

    def __init__(self, lab: Lab, cpu: int, stack: contextlib.ExitStack) -> None:
        self.lab, self._cpu = lab, cpu
        self.sources = {
            kind: stack.enter_context(Source(replace(FLOODS["udp4"], payload=payload), lab, _SOURCES, paced=True))
            for kind, payload in PAYLOADS.items()
        }
        self._thread = stack.enter_context(ThreadPoolExecutor(1, "fastrecv-source"))  # its end is waited for first

    def offer(self, source: Source, packets: int, rate: float, reader: Callable[[Stop], int]) -> tuple[int, float, int]:
        """Send while `reader` reads in this thread; frames sent, ns from one to the next, and what the reader gave."""
        stop = Stop(0)

        def send() -> tuple[int, float]:
            try:
                with pinned(self._cpu), self.lab.far:
                    return source.offer(packets, rate)
            finally:
                stop.value = 1

        sending = self._thread.submit(send)
        received = reader(stop)
        sent, ns = sending.result()
        return sent, ns, received

    def fill(self, source: Source, packets: int, rate: float = _GENTLY) -> tuple[int, float]:
        """Send so many to whom does not read meanwhile: how many, and ns from one to the next."""
        sent, ns, _ = self.offer(source, packets, rate, lambda _: 0)
        return sent, ns


def run(plan: Plan, on_step: Callable[[str], None]) -> XdpResult:
    """Measure what the plan says. on_step : called with its title when a contender has had all rates of a round.

    NotSupported where the kernel, the privileges, the compiler or libxdp's headers lack something.
    """
    for name in NEEDS:
        features.check(name)
    compiled()
    xsk_limit.compiled()
    known = environment.record()
    result = XdpResult(
        version=version("fastrecv"), started=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), argv=sys.argv[1:],
        seed=plan.seed, cpu=plan.cpu, source_cpu=plan.source_cpu, rounds=plan.rounds, seconds=plan.seconds,
        rates=sorted(plan.rates), room=ROOM, environment=known, warnings=environment.warn_about_host(known),
        rows=[
            Row(name=one.name, title=one.title, of=one.of, payload=len(PAYLOADS[one.traffic]), drained=_QUEUED)
            for one in CONTENDERS
        ],
    )  # fmt: skip
    rng = np.random.default_rng(plan.seed)
    gc.freeze()  # what was imported is no garbage
    try:
        with quick_grace_periods(), Lab(wire=True) as lab, contextlib.ExitStack() as stack, pinned(plan.cpu):
            wire = Wire(lab, plan.source_cpu, stack)
            result.gates.append(_same_bytes(wire))
            for number in range(1, plan.rounds + 1):
                result.dropping_ns.append(_dropping(wire))
                for index in rng.permutation(len(CONTENDERS)):
                    _measure(CONTENDERS[index], result.rows[index], wire, result, number)
                    on_step(CONTENDERS[index].title)
    finally:
        gc.unfreeze()
    judge(result)
    return result


def _measure(contender: Contender, row: Row, wire: Wire, result: XdpResult, number: int) -> None:
    """One drain, and all rates that are of use, from the lowest."""
    row.drained_ns.append(_drain(contender, wire))
    hopeless = 0
    for rate in result.rates:
        window = _window(contender, wire, rate, result.seconds, number)
        row.windows.append(window)
        hopeless = hopeless + 1 if max(window.loss, 1 - window.offered / rate) > _HOPELESS else 0
        if hopeless == 2:
            break


def _window(contender: Contender, wire: Wire, rate: float, seconds: float, number: int) -> Window:
    source = wire.sources[contender.traffic]
    packets = max(round(rate * seconds / BURST), 2) * BURST
    with _opened(contender, wire) as opened, _steady():
        before, arrived = opened.lost(), wire.lab.received()
        waited = _waited()
        sent, ns, received = wire.offer(source, packets, rate, opened.run)
        waited = _waited() - waited
        lost = {name: count - before[name] for name, count in opened.lost().items()}
        arrived = wire.lab.received() - arrived
    return Window(
        round=number, asked=rate, ns=ns, sent=sent, arrived=arrived, received=received, lost=lost, waited_ns=waited
    )


def _waited() -> int:
    """Nanoseconds that this thread has waited for a CPU; 0 without CONFIG_SCHED_INFO."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    except FileNotFoundError:
        return 0


def _drain(contender: Contender, wire: Wire) -> int:
    """Nanoseconds that it takes to receive what is queued."""
    with _opened(contender, wire) as opened:
        sent, _ = wire.fill(wire.sources[contender.traffic], _QUEUED)
        with _steady():
            began = time.perf_counter_ns()
            received = opened.run(Stop(1))
            ns = time.perf_counter_ns() - began
    if received != sent:
        raise OSError(
            f"{contender.title}: {sent:,} datagrams queued, {received:,} received: is net.ipv4.udp_mem small?"
        )
    return ns


@contextlib.contextmanager
def _opened(contender: Contender, wire: Wire) -> Iterator[Opened]:
    """With memory that has been touched, and nothing queued."""
    with contender.open(wire.lab, wire.sources[contender.traffic].flood) as opened:
        wire.fill(wire.sources[contender.traffic], _WARM)
        opened.run(Stop(1))
        yield opened


@contextlib.contextmanager
def _steady() -> Iterator[None]:
    """Without collections of garbage, as timeit does it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _dropping(wire: Wire) -> float:
    """Nanoseconds that source and wire take for a frame which XDP_DROP ends on host0."""
    with wire.lab.swallowing():
        _, ns = wire.fill(wire.sources["plain"], _DROPPED, 1e9)
    return ns


def _same_bytes(wire: Wire) -> Gate:
    """Whether both receivers give what was sent, in its order and from whom: a pass of its own, not timed."""
    source = wire.sources["plain"]
    for kind, opened in RECEIVERS.items():
        with opened(wire.lab, source.flood) as (receiver, _):
            first = source.frames
            sent, _ = wire.fill(source, _QUEUED)
            found = []
            while batch := receiver.recv(0):
                found += list(batch.datagrams())
        due = [
            (source.flood.payload, (source.flood.source, FIRST_SOURCE_PORT + (first + number) % _SOURCES))
            for number in range(sent)
        ]
        if found != due:
            detail = f"{kind}: {sent:,} datagrams sent, {len(found):,} received that are not the same"
            return Gate(name="same bytes", passed=False, detail=detail)
    return Gate(name="same bytes", passed=True, detail=f"{sent:,} datagrams by either receiver")
