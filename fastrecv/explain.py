"""Which binding and which socket a packet would get, and why: asked of the attached program, without any traffic."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from errno import EOPNOTSUPP
from ipaddress import IPv4Address, IPv6Address
from typing import Literal, NamedTuple

from fastrecv import bpf
from fastrecv.errors import BpfError
from fastrecv.lookup import Dispatcher
from fastrecv.rules import PROTOCOL_NAMES, Binding, Destination, compile_rules
from fastrecv.state import MAX_DESTINATIONS

__all__ = ["Explanation", "Packet", "explain"]

SK_DROP, SK_PASS = 0, 1  # include/uapi/linux/bpf.h
_SHOWN = 10

Address = IPv4Address | IPv6Address


class Packet(NamedTuple):
    """protocol : IPPROTO_TCP or IPPROTO_UDP. interface : index of the one it comes in by; 0 leaves it open."""

    protocol: int
    source: Address
    source_port: int
    destination: Address
    port: int
    interface: int = 0


class Explanation(NamedTuple):
    """verdict : "socket", "drop" or "pass" (to the kernel's ordinary lookup).

    binding : the one that decides, None where none applies. socket : the cookie of the one that gets the packet; a
    reuseport group's own choice among its members comes after that. reason : a sentence. others : the next bindings in
    order of precedence, and those before it that do not apply, each with the reason.
    """

    verdict: Literal["socket", "drop", "pass"]
    binding: Binding | None
    socket: int | None
    reason: str
    others: list[tuple[Binding, str]]


def explain(dispatcher: Dispatcher, packet: Packet) -> Explanation:
    """Ask the program of an opened dispatcher by BPF_PROG_TEST_RUN; no live counter moves.

    The attached program is asked, which takes no privilege beyond reading the state. Where packet.interface is given a
    second instance of it is loaded, never attached (CAP_BPF), because test runs have no interface.
    """
    with ExitStack() as stack:
        program = dispatcher.program
        if packet.interface:
            program = stack.enter_context(_second(dispatcher, packet.interface)).programs["lookup"]
        members: list[int] = []
        winner, others = _weigh(dispatcher.bindings, packet)
        if winner is not None and winner.label is not None:
            family = socket.AF_INET if packet.destination.version == 4 else socket.AF_INET6
            members = dispatcher.sockets_of(Destination(winner.label, family, packet.protocol))
        try:
            verdict, cookie = bpf.run_sk_lookup(
                program, packet.protocol, (packet.source, packet.source_port), (packet.destination, packet.port)
            )
        except BpfError as error:
            if error.errno != EOPNOTSUPP or not members:
                raise
            verdict, cookie = SK_PASS, members[0]  # of a reuseport group, of which test runs name no member
    outcome, reason = _reason(winner, members, verdict, cookie)
    return Explanation(outcome, winner, cookie or None, reason, others)


def _second(dispatcher: Dispatcher, interface: int) -> bpf.Object:
    lookup = bpf.packaged("lookup")
    try:
        lookup.maps["sockets"].reuse(dispatcher.sockets)
        lookup.maps["counts"].max_entries = MAX_DESTINATIONS
        lookup.set(as_if_from=interface)
        compile_rules(dispatcher.bindings, dispatcher.state.numbers).load(lookup)
    except BaseException:
        lookup.close()
        raise
    return lookup


def _reason(
    winner: Binding | None, members: list[int], verdict: int, cookie: int
) -> tuple[Literal["socket", "drop", "pass"], str]:
    """What the kernel's answer means; AssertionError where it is not what the bindings say."""
    if winner is None:
        assert (verdict, cookie) == (SK_PASS, 0), "the program steers a packet that no binding is for"
        return "pass", "no binding applies: the kernel's ordinary lookup decides"
    if winner.label is None:
        assert verdict == SK_DROP, "the program passes a packet that a binding drops"
        return "drop", "the binding drops it"
    if cookie:
        assert cookie in members, f"the program chose socket sk:{cookie:x}, which is not one of {winner.label}'s"
        more = f", the first of {len(members)} that are registered" if len(members) > 1 else ""
        return "socket", f"{winner.label} has socket sk:{cookie:x}{more}"
    if members:
        refused = "the kernel refuses its sockets: they are connected, or of another family"
        return "drop", f"{winner.label} is bound, but {refused}"
    if verdict == SK_PASS:
        return "pass", f"{winner.label} has no socket, and its misses pass to the kernel's ordinary lookup"
    return "drop", f"{winner.label} has no socket: register one"


def _weigh(bindings: list[Binding], packet: Packet) -> tuple[Binding | None, list[tuple[Binding, str]]]:
    """The binding that wins by the documented precedence; and the others that cover the address, with why not."""
    covering = [binding for binding in bindings if packet.destination in binding.prefix]
    covering.sort(key=lambda binding: binding.precedence)
    winner, others = None, []
    for binding in covering:
        why = _mismatch(binding, packet)
        if not why and winner is None:
            winner = binding
        else:
            others.append((binding, why or _loses(binding, winner)))
    return winner, others[:_SHOWN]


def _mismatch(binding: Binding, packet: Packet) -> str:
    """Why a binding whose prefix covers the packet does not apply to it; "" where it does."""
    if binding.protocol not in (PROTOCOL_NAMES[packet.protocol], "any"):
        return "another protocol"
    if not binding.ports[0] <= packet.port <= binding.ports[1]:
        return "another port"
    if binding.source is not None and packet.source not in binding.source:
        return "another source"
    if binding.interface not in (0, packet.interface):
        return "another interface" if packet.interface else "an interface, and none was given"
    return ""


def _loses(binding: Binding, winner: Binding | None) -> str:
    assert winner is not None  # only what applies, too, can lose
    reasons = (
        "shorter prefix",
        "wider range of ports",
        "shorter source prefix",
        "names no interface",
        "names no protocol",
    )
    for mine, its, reason in zip(binding.precedence, winner.precedence, reasons, strict=False):
        if mine != its:
            return reason
    return "begins at a higher port"
