"""The sk_lookup programs that can be measured, each ready to be attached to the lab's host.

An entry opens everything a program needs (maps filled, the sink in its place) and gives the loaded program: attaching
is all that is left for the measured block to do. Every one must assign the sink to the flood's packets, and is asked
before it is measured whether it does.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Literal

import numpy as np

from fastrecv.bench.floods import FIRST_SOURCE_PORT, PORT, Flood
from fastrecv.bench.prefixes import draw
from fastrecv.bpf import Program, packaged, run_sk_lookup
from fastrecv.rules import Binding, compile_rules, destinations_of
from fastrecv.steerable import cookie_of

__all__ = ["PROGRAMS", "Method", "selects"]

_Open = Callable[[Flood, socket.socket, int, int], AbstractContextManager[Program]]


@dataclass(frozen=True)
class Method:
    """One program. title : may hold {entries}. open(flood, sink, entries, seed) : a context manager."""

    name: str
    title: str
    has_entries: bool
    open: _Open


@contextlib.contextmanager
def _letter(flood: Flood, sink: socket.socket, entries: int, seed: int) -> Iterator[Program]:
    with packaged("letter") as letter:
        table = letter.maps["prefixes4" if flood.family == socket.AF_INET else "prefixes6"]
        table.max_entries = entries
        letter.load()
        keys = np.zeros(entries, table.key_dtype)
        keys["length"], keys["address"] = draw(flood.family, flood.destination, entries, seed)
        table.update(keys, np.zeros(entries, np.uint32))  # every prefix leads to the one socket
        letter.maps["sockets"].update([0], [sink.fileno()])
        yield letter.programs["letter"]


@contextlib.contextmanager
def _assign_only(flood: Flood, sink: socket.socket, entries: int, seed: int) -> Iterator[Program]:  # noqa: ARG001 - it has no rules
    with packaged("assign") as assign:
        assign.load()
        assign.maps["sockets"].update([0], [sink.fileno()])
        yield assign.programs["assign"]


@contextlib.contextmanager
def _dispatcher(flood: Flood, sink: socket.socket, entries: int, seed: int) -> Iterator[Program]:
    lengths, addresses = draw(flood.family, flood.destination, entries, seed)
    protocol: Literal["tcp", "udp"] = "udp" if flood.protocol == socket.IPPROTO_UDP else "tcp"
    bindings = [
        Binding(protocol, ip_network((address.tobytes(), int(length))), (PORT, PORT), "sink")
        for length, address in zip(lengths, addresses, strict=True)
    ]
    with packaged("lookup") as lookup:
        compile_rules(bindings, dict.fromkeys(destinations_of(bindings), 0)).load(lookup)
        lookup.maps["sockets"].update([0], [sink.fileno()])
        yield lookup.programs["lookup"]


PROGRAMS = {
    method.name: method
    for method in (
        Method("letter", "letter: LPM_TRIE of {entries:,}, assign", True, _letter),
        Method("dispatcher", "dispatcher: {entries:,} bindings compiled, counted, assign", True, _dispatcher),
        Method("assign-only", "assign-only: one fixed socket", False, _assign_only),
    )
}


def selects(program: Program, flood: Flood, sink: socket.socket) -> bool:
    """Whether the program, asked by BPF_PROG_TEST_RUN about a packet of the flood, assigns the sink."""
    source, destination = ip_address(flood.source), ip_address(flood.destination)
    _, cookie = run_sk_lookup(program, flood.protocol, (source, FIRST_SOURCE_PORT), (destination, PORT))
    return cookie == cookie_of(sink)
