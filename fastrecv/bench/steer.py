"""What choosing a member of a reuseport group costs: a run's plan, its set-up, and the proof that all is as it says.

All rows stand side by side for the life of a set-up, each on a port of its own, drawn anew for every set-up: a window
attaches nothing. Sockets are bound to any address, and packets go to many, so that an address can choose.
"""

from __future__ import annotations

import contextlib
import socket
from collections import Counter as Tally
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import numpy as np

from fastrecv.bench import floods
from fastrecv.bench.floods import FLOODS, Counter, Source
from fastrecv.bench.lab import Lab
from fastrecv.bench.results import Configuration, Flood, Gate, Kind
from fastrecv.bench.stage import Plan, Row, Stage, pinned
from fastrecv.bench.ways import Group, Way, open_members, ways_of
from fastrecv.sockets import drop_everything, drops

__all__ = ["MIN_SOURCES", "STEERED", "SteerPlan"]

STEERED = ("udp4", "udp6", "syn4")
MIN_SOURCES = 100  # of fewer, a member might get none by chance
_PAYLOAD = bytes(8)
_FIRST_PORT = 9000
_TITLES = {"udp4": "UDP, IPv4, 8 bytes", "udp6": "UDP, IPv6, 8 bytes", "syn4": "TCP SYN, IPv4"}


@dataclass(frozen=True, kw_only=True)
class SteerPlan(Plan):
    """A run of `steer`. floods : of STEERED. sources : from MIN_SOURCES on."""

    kind: Kind = "steer"
    programs: list[tuple[str, int]] = field(default_factory=list)

    def flood(self, name: str) -> floods.Flood:
        flood = FLOODS[name]
        payload = _PAYLOAD if flood.protocol == socket.IPPROTO_UDP else b""
        return replace(flood, title=_TITLES[name], spread=True, payload=payload)

    def ways(self, flood: str) -> list[Way]:
        return ways_of(FLOODS[flood].protocol, self.seed)

    def configurations(self, flood: str) -> list[Configuration]:
        rows = [Configuration(name=way.name, title=way.title, against=way.against) for way in self.ways(flood)]
        return [*rows, Configuration(name="harness", title="harness: XDP_DROP at the source")]

    def open(self, record: Flood) -> AbstractContextManager[Stage]:
        return _open(record, self)

    def prove(self, stage: Stage) -> list[Gate]:
        wrong = [words for row in stage.rows if row.members and (words := self._astray(stage, row))]
        told = sum(row.chosen is not None and len(row.members) > 1 for row in stage.rows)
        detail = (
            f"each of {self.sources:,} sources came to the member that user space computes for it, in {told} ways; the "
            "kernel's hash left none out"
        )
        return [Gate(name="right members", passed=not wrong, detail="; ".join(wrong) or detail)]

    def _astray(self, stage: Stage, row: Row) -> str:
        """What is wrong with where a row's packets come to; "" where nothing is. Its listeners answer no more."""
        for member in row.members:
            drop_everything(member)  # listeners, too, then count what they get
        before = [drops(member) for member in row.members]
        with pinned(stage.cpu), stage.lab.host:
            row.source.deliver(self.sources)  # one of every source, or all of the one
        found = [drops(member) - count for member, count in zip(row.members, before, strict=True)]
        if row.chosen is None:
            right = sum(found) == self.sources and all(found)
            due = f"all of {self.sources:,}, with some at each"
        else:
            tally = Tally(row.chosen(row.source.flood.sender(number)) for number in range(self.sources))
            expected = [tally[index] for index in range(len(found))]
            right, due = found == expected, f"{expected}"
        return "" if right else f"{row.configuration.name}: members got {found} packets where {due} were due"


@contextlib.contextmanager
def _open(record: Flood, plan: SteerPlan) -> Iterator[Stage]:
    flood, ways = plan.flood(record.name), plan.ways(record.name)
    places = np.random.default_rng([plan.seed, len(record.setups)]).permutation(len(ways)).tolist()
    *configurations, harness = record.configurations
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab())
        lab.open_to_many()
        many = stack.enter_context(Source(flood, lab, plan.sources))
        one = stack.enter_context(Source(flood, lab, 1))
        counter = stack.enter_context(Counter(lab, flood.counter))
        rows: dict[int, Row] = {}
        for port, index in enumerate(places, _FIRST_PORT):  # neither port nor age may tell rows apart
            way = ways[index]
            source = (one if way.one_sender else many).aimed(port)
            members = open_members(way, source.flood, lab, stack)
            choice = stack.enter_context(way.open(Group(source.flood, members, plan.sources, plan.seed)))
            rows[index] = Row(configurations[index], source, members, program=choice.program, chosen=choice.member)
            if way.known:
                with pinned(plan.cpu), lab.host:
                    source.deliver(plan.sources)
        ordered = [*(rows[index] for index in sorted(rows)), Row(harness, many, ())]
        yield Stage(flood, record, lab, counter, plan.cpu, ordered)
