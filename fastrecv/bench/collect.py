"""The collect bench: how many flows a second of one CPU a collector takes in, as the program that people run.

Every collector is a black box with a UDP port. It is started on one CPU, told the templates, and stopped (SIGSTOP);
its socket is filled with a known number of datagrams, which is proved; then it goes on, until its queue is empty and it
is idle again. What counts is the CPU time of all its processes and threads in between (/proc/PID/task/TID/schedstat),
files and sums included: on few CPUs a live sender would be the bottleneck, and wall-clock time would tell of the
other load. A collector that gives work to a second process, as nfacctd does, could use a second CPU for it, and so
could the thread that writes our Parquet: a rate for one CPU is what it costs, not what it can reach.

Gates: each has to have collected every flow, packet and octet, by its own account; of those that write files ours must
not be slower than nfcapd, of those that sum up not slower than nfacctd. Where it is, perf says what stands between.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from ipaddress import IPv4Address
from pathlib import Path
from statistics import median

import numpy as np

from fastrecv import Receiver, listeners, sockets
from fastrecv.bench import environment, receive
from fastrecv.bench.collect_contenders import CONTENDERS, Contender, missing
from fastrecv.bench.collect_results import Collected, CollectResult
from fastrecv.bench.collect_traffic import EXPORTERS, STREAMS, Export, exported
from fastrecv.bench.results import Gate
from fastrecv.bench.stage import pinned
from fastrecv.bench.survive_service import ADDRESS, PORT, namespace, until
from fastrecv.errors import SocketRefusedError
from fastrecv.privileges import ALONE

__all__ = ["Plan", "drained", "run", "send"]

_ROOM_EACH = 4096  # bytes of buffer for a datagram: a page, and what the kernel charges beside
_WARM = 0.05  # of the datagrams, sent before
_QUIET, _IDLE = 0.7, 6_000_000  # so many seconds with less than so many ns of CPU time: it is idle
_PAIRS = (("arrow", "nfcapd"), ("arrow-lz4", "nfcapd-lz4"), ("sums", "nfacctd"))


@dataclass(frozen=True)
class Plan(receive.Plan):
    """What a run is to measure. groups : names in STREAMS. datagrams : of a drain."""

    @property
    def steps(self) -> int:
        return self.rounds * len(self.groups) * len(CONTENDERS)


def run(plan: Plan, on_step: Callable[[str], None]) -> CollectResult:
    """Measure what the plan says. on_step : called after every drain, with the collector's title."""
    result = CollectResult(
        version=version("fastrecv"), started=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), argv=sys.argv[1:],
        groups=plan.groups, seed=plan.seed, cpu=plan.cpu, rounds=plan.rounds, datagrams=plan.datagrams,
        environment=environment.record(),
    )  # fmt: skip
    here = {}
    for name, contender in CONTENDERS.items():
        if lacks := missing(contender):
            result.absent[contender.title] = lacks
        else:
            here[name] = contender
    rng = np.random.default_rng(plan.seed)
    with namespace():
        for stream in plan.groups:
            _measure(stream, here, plan, rng, result, on_step)
    return result


def _measure(
    stream: str, here: dict[str, Contender], plan: Plan, rng: np.random.Generator, result: CollectResult,
    on_step: Callable[[str], None],
) -> None:  # fmt: skip
    exports = {share: _traffic(stream, plan, share) for share in {one.share for one in here.values()}}
    rows = {name: Collected(stream=stream, contender=name, title=one.title) for name, one in here.items()}
    wrong = []
    for _ in range(plan.rounds):
        for name in rng.permutation(list(here)).tolist():
            warm, export = exports[here[name].share]
            ns, said = drained(here[name], plan.cpu, warm, export)
            if said:
                wrong.append(f"{here[name].title}: {said}")
            rows[name].ns.append(ns / export.flows)
            on_step(here[name].title)
    result.rows += rows.values()
    flows = sum(plan.rounds * exports[one.share][1].flows for one in here.values())
    result.gates.append(Gate(
        name=f"{STREAMS[stream].title}: every flow", passed=not wrong,
        detail="; ".join(wrong) or f"{flows:,} flows collected, with their packets and octets",
    ))  # fmt: skip
    for ours, theirs in _PAIRS:
        if {ours, theirs} <= rows.keys():
            _compare(stream, rows[ours], rows[theirs], result)
            if not result.gates[-1].passed:
                warm, export = exports[1.0]
                with _profiling(result.profiles, f"{STREAMS[stream].title}, {rows[ours].title}") as begin:
                    drained(here[ours], plan.cpu, warm, export, begin)


def _traffic(stream: str, plan: Plan, share: float) -> tuple[Export, Export]:
    datagrams = max(int(plan.datagrams * share), 10 * EXPORTERS)
    warm = max(int(_WARM * datagrams), EXPORTERS)
    return exported(stream, warm), exported(stream, datagrams, first=warm // EXPORTERS)


def _compare(stream: str, ours: Collected, theirs: Collected, result: CollectResult) -> None:
    ratios = sorted(other / own for own, other in zip(ours.ns, theirs.ns, strict=True))
    detail = f"{ours.title}: {median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] x {theirs.title}"
    result.gates.append(Gate(name=f"{STREAMS[stream].title}: not slower", passed=median(ratios) >= 1, detail=detail))


def drained(
    contender: Contender, cpu: int, warm: Export, export: Export, begin: Callable[[list[int]], None] | None = None
) -> tuple[int, str]:
    """CPU time in ns that a fresh collector takes for what fills its socket; what is wrong with its account, or "".

    begin : called with its processes just before it goes on, and with none when it has done.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        program = stack.enter_context(_Program(contender, folder, cpu))
        copies = stack.enter_context(program.sockets())
        for copy in copies:
            sockets.grow_receive_buffer(copy, _ROOM_EACH * sum(map(len, export.datagrams)))
        send([[one] for one in warm.templates] or [[] for _ in range(EXPORTERS)])
        send(warm.datagrams)
        program.settle(copies)
        program.signal(signal.SIGSTOP)
        before = program.cpu_ns()
        send(export.datagrams)
        lost = sum(sockets.drops(copy) for copy in copies)
        if begin is not None:
            begin(program.pids())
        program.signal(signal.SIGCONT)
        took = program.settle(copies) - before
        if begin is not None:
            begin([])
        copies.clear()
        if contender.ended:
            program.end()
        found = contender.found(folder)
    sent = (warm.flows + export.flows, warm.packets + export.packets, warm.octets + export.octets)
    if lost:
        return took, f"its socket had no room for {lost:,} datagrams"
    got = (sent[0] if found.flows is None else found.flows, found.packets, found.octets)
    whole = all(contender.least * one <= other <= one for one, other in zip(sent, got, strict=True))
    return took, "" if whole else f"{got} flows, packets and octets of {sent}"


class _Program:
    """A collector that runs: a context manager, all of whose processes end with it."""

    def __init__(self, contender: Contender, folder: Path, cpu: int) -> None:
        self._log = (folder / "log").open("wb")
        with pinned(cpu):
            self._process = subprocess.Popen(  # noqa: S603 - our own contenders
                contender.command(folder, PORT), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                env={**os.environ, **ALONE, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
            )  # fmt: skip
        self._folder = folder

    @contextlib.contextmanager
    def sockets(self) -> Iterator[list[socket.socket]]:
        """Copies of its sockets, once it has them; who clears the list has closed them."""
        with contextlib.ExitStack() as stack:
            found: list[socket.socket] = []

            def bound() -> bool:
                with contextlib.suppress(SocketRefusedError):
                    opened = listeners.of_process(self._process.pid, socket.IPPROTO_UDP, IPv4Address(ADDRESS), PORT)
                    found.extend(stack.enter_context(opened))
                return bool(found)

            until(bound, lambda: f"it has no socket: {(self._folder / 'log').read_text()}")
            yield found

    def pids(self) -> list[int]:
        """It and all that it has started: proc_pid_children(5)."""
        found = [self._process.pid]
        for pid in found:
            for path in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    found += map(int, path.read_text().split())
        return found

    def cpu_ns(self) -> int:
        """The CPU time of all its threads: Documentation/scheduler/sched-stats.rst, schedstat."""
        total = 0
        for pid in self.pids():
            for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                with contextlib.suppress(OSError):
                    total += int(path.read_text().split()[0])
        return total

    def settle(self, copies: list[socket.socket]) -> int:
        """Wait until its queues are empty and it is idle; its CPU time then."""
        mark, since = self.cpu_ns(), time.monotonic()

        def idle() -> bool:
            nonlocal mark, since
            if self._process.poll() is not None:
                raise RuntimeError(f"a collector has ended: {(self._folder / 'log').read_text()[-2000:]}")
            now = self.cpu_ns()
            if now - mark > _IDLE or any(sockets.memory(copy).queued for copy in copies):
                mark, since = now, time.monotonic()
            return time.monotonic() - since > _QUIET

        until(idle, lambda: "it does not come to rest", 600)
        return mark

    def signal(self, number: signal.Signals) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self) -> None:
        """Let it end in its own way."""
        self._process.terminate()
        self._process.wait(30)

    def __enter__(self) -> _Program:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process.poll() is None:
            self.signal(signal.SIGKILL)
        self._process.wait(30)
        self._log.close()


def send(datagrams: list[list[bytes]]) -> None:
    """Send what each exporter has to send, from an address of its own; by turns."""
    with contextlib.ExitStack() as stack:
        senders = [stack.enter_context(Receiver.bind((f"127.1.0.{1 + one}", 0))) for one in range(len(datagrams))]
        for at in range(0, max(map(len, datagrams), default=0), 16):
            for sender, mine in zip(senders, datagrams, strict=True):
                sender.send(mine[at : at + 16], (ADDRESS, PORT))


@contextlib.contextmanager
def _profiling(profiles: dict[str, str], title: str) -> Iterator[Callable[[list[int]], None]]:
    """What perf sees of a drain: the functions that take most."""
    with tempfile.TemporaryDirectory() as folder:
        running: list[subprocess.Popen[bytes]] = []

        def begin(pids: list[int]) -> None:
            if not pids:
                running[-1].send_signal(signal.SIGINT)
                return
            words = ["perf", "record", "-q", "-g", "-o", f"{folder}/data", "-p", ",".join(map(str, pids))]
            running.append(subprocess.Popen(words, stderr=subprocess.DEVNULL))  # noqa: S603 - our own arguments
            time.sleep(0.5)  # until it samples

        yield begin
        for process in running:
            process.wait(30)
        said = subprocess.run(  # noqa: S603 - our own arguments
            ["perf", "report", "-i", f"{folder}/data", "--stdio", "-q", "--no-children", "-g", "none",  # noqa: S607
             "--percent-limit", "2", "-F", "overhead,dso,symbol"], capture_output=True, text=True, check=False,
        )  # fmt: skip
        profiles[title] = "\n".join(line.rstrip() for line in said.stdout.splitlines() if line.strip())
