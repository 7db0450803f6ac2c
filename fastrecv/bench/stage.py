"""One flood set up in the lab: sink, source, counter, and a row for each configuration, ready to be measured."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from fastrecv.bench import floods
from fastrecv.bench.floods import FLOODS, XDP_TX, Counter, Source, open_sink
from fastrecv.bench.lab import Lab
from fastrecv.bench.prefixes import describe
from fastrecv.bench.programs import PROGRAMS, selects
from fastrecv.bench.results import Configuration, Flood, Gate, Kind
from fastrecv.bpf import Program, packaged, program_info, sk_lookup_links
from fastrecv.netns import Namespace
from fastrecv.policies import Sender

__all__ = [
    "ForeignProgramError",
    "Plan",
    "Row",
    "SelectionError",
    "Stage",
    "flowing",
    "pinned",
    "refuse_foreign_programs",
]


_Traffic = floods.Flood  # a plan has floods of its own


@dataclass
class Row:
    """A configuration as it runs.

    members : the sockets under flood. attach : holds for one window. program : is set where the kernel runs one of
    eBPF for every packet here. chosen : gives the index of the member that a source's packets must come to, where one
    is chosen by a rule that user space knows, too.
    """

    configuration: Configuration
    source: Source
    members: Sequence[socket.socket]
    attach: Callable[[], AbstractContextManager[object]] = nullcontext
    program: Program | None = None
    chosen: Callable[[Sender], int | None] | None = None

    @property
    def harness(self) -> bool:
        """Whether it measures the source alone: nothing may reach the sink."""
        return self.configuration.name == "harness"


@dataclass(frozen=True)
class Plan:
    """What a run is to measure.

    floods : names in FLOODS. programs : (name in PROGRAMS, entries of its rule set), in the order of the rows.
    seconds : for each flood; in wire mode for each configuration. profiled : with CPU shares.

    What measures asks it for the flood of a name, its configurations and its set-up, and for gates of its own.
    """

    kind: Kind
    floods: list[str]
    programs: list[tuple[str, int]]
    seconds: float
    seed: int
    sources: int
    cpu: int
    wire: bool = False
    profiled: bool = False

    @property
    def flood_seconds(self) -> float:
        """For how long the blocks of one flood are to run."""
        return self.seconds * len(self.configurations(self.floods[0])) if self.wire else self.seconds

    @property
    def rule_sets(self) -> str:
        """In words, for reports."""
        return describe([entries for _, entries in self.programs if entries], self.seed)

    def flood(self, name: str) -> _Traffic:
        return FLOODS[name]

    def configurations(self, flood: str) -> list[Configuration]:  # noqa: ARG002 - of each flood the same ones
        """The rows of a flood, empty."""
        return _configurations(self)

    def open(self, record: Flood) -> AbstractContextManager[Stage]:
        """Set the flood of `record` up; its configurations become the rows."""
        return _open(record, self)

    def prove(self, stage: Stage) -> list[Gate]:  # noqa: ARG002 - what is attached is asked at every set-up
        """Gates, in a pass of their own; the stage is not used after them."""
        return []


@dataclass
class Stage:
    """Everything of one flood that the measuring passes share."""

    flood: floods.Flood
    record: Flood
    lab: Lab
    counter: Counter
    cpu: int
    rows: list[Row]


class SelectionError(RuntimeError):
    """A program that is to be measured leaves the flood's packets to the ordinary lookup."""


class ForeignProgramError(RuntimeError):
    """An sk_lookup program of somebody else is attached on this host, so there is no baseline to be had."""


def refuse_foreign_programs() -> None:
    """Call while no program of ours is attached: the static key of the hook is one for the whole host."""
    for link in sk_lookup_links().values():
        if link.netns_inode == 0:  # detached, or its namespace is gone: it no longer holds the key
            continue
        program = program_info(link.program_id)
        name = program.name if program else "?"
        raise ForeignProgramError(
            f"a foreign sk_lookup program is attached: link {link.id}, program {link.program_id} ({name}), network "
            f"namespace {link.netns_inode}. It turns the hook on for the whole host, so every baseline would "
            "be false: detach it, then run again"
        )


@contextlib.contextmanager
def pinned(*cpus: int) -> Iterator[None]:
    """Keep the calling thread on these CPUs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _attached(program: Program, namespace: Namespace) -> Iterator[None]:
    with program.attach_netns(namespace.fd) as link:
        yield
        link.detach()  # at once; closing alone may leave it to a worker of the kernel


@contextlib.contextmanager
def flowing(stage: Stage, row: Row, verdict: int, burst: int) -> Iterator[None]:
    """The source sends without a pause, `burst` frames a call, from its own thread on the pinned CPU."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def send() -> None:
        try:
            with pinned(stage.cpu), stage.lab.far if verdict == XDP_TX else stage.lab.host:
                while not stop.is_set():
                    row.source.send(verdict, burst)
        except BaseException as error:  # handed to the thread that waits
            failures.append(error)

    thread = threading.Thread(target=send, name="fastrecv-source")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def _configurations(plan: Plan) -> list[Configuration]:
    names = [name for name, _ in plan.programs]
    attached = [
        Configuration(
            name=f"{name}-{entries}" if names.count(name) > 1 else name,
            title=PROGRAMS[name].title.format(entries=entries),
            entries=entries if PROGRAMS[name].has_entries else None,
        )
        for name, entries in plan.programs
    ]
    return [
        Configuration(name="baseline", title="baseline: no sk_lookup program"),
        Configuration(name="again", title="baseline again (A/A)"),
        Configuration(name="no-program", title="no program here, one in another namespace"),
        *attached,
        Configuration(
            name="harness", title="harness: XDP_DROP at host0" if plan.wire else "harness: XDP_DROP at the source"
        ),
    ]


@contextlib.contextmanager
def _open(record: Flood, plan: Plan) -> Iterator[Stage]:
    flood = plan.flood(record.name)
    baseline, again, no_program, *attached, harness = record.configurations
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(wire=plan.wire))
        sink = stack.enter_context(open_sink(flood, lab))
        source = stack.enter_context(Source(flood, lab, plan.sources))
        counter = stack.enter_context(Counter(lab, flood.counter))
        elsewhere = stack.enter_context(contextlib.closing(Namespace()))
        decoy = stack.enter_context(packaged("decoy")).load().programs["decoy"]
        row = partial(Row, source=source, members=[sink])
        rows = [row(baseline), row(again), row(no_program, attach=partial(_attached, decoy, elsewhere))]
        for configuration, (name, entries) in zip(attached, plan.programs, strict=True):
            program = stack.enter_context(PROGRAMS[name].open(flood, sink, entries, plan.seed))
            if not selects(program, flood, sink):
                raise SelectionError(f"{configuration.name} does not assign the sink to the packets of {flood.name}")
            rows.append(row(configuration, attach=partial(_attached, program, lab.host), program=program))
        rows.append(row(harness, attach=lab.swallowing if plan.wire else nullcontext))
        yield Stage(flood, record, lab, counter, plan.cpu, rows)
