"""Which contenders are compared on which traffic: a group is what runs in the same rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from fastrecv.bench import decoders
from fastrecv.bench.decoders import NETFLOW, SENDERS
from fastrecv.bench.lab import Lab
from fastrecv.bench.prefill import Injection, Traffic, Trains, pattern
from fastrecv.bench.receivers import BASICS, Contender, again, c_loop_with, in_sockmap, receiver_with
from fastrecv.options import Features

__all__ = ["GROUPS", "PAYLOADS", "SOURCES", "Group"]

PAYLOADS = (0, 128, 1400)
SOURCES = 1000  # source ports

_OPTIONS: dict[str, Features] = {
    "timestamps": {"timestamps": True},
    "destinations": {"destinations": True},
    "tos": {"tos": True},
    "drops": {"drops": True},
    "all four": {"timestamps": True, "destinations": True, "tos": True, "drops": True},
}


@dataclass(frozen=True)
class Group:
    """One group. comparisons : the title of a column of ratios -> row -> the row that it is measured against."""

    name: str
    title: str
    payload: int
    traffic: Callable[[Lab], Traffic]
    contenders: tuple[Contender, ...]
    comparisons: dict[str, dict[str, str]] = field(default_factory=dict)


def _injected(payload: bytes) -> Callable[[Lab], Traffic]:
    return partial(Injection, payload=payload, sources=SOURCES)


def _against(reference: str, contenders: tuple[Contender, ...]) -> dict[str, str]:
    return {contender.name: reference for contender in contenders if contender.name != reference}


def _payload(size: int) -> Group:
    contenders = (BASICS[0], again("c-loop"), *BASICS[1:])
    return Group(
        name=f"payload-{size}", title=f"{size:,} bytes", payload=size, traffic=_injected(pattern(size)),
        contenders=contenders,
        comparisons={
            "of the C loop": _against("c-loop", contenders),
            "of recvfrom": _against("recvfrom", contenders),
        },
    )  # fmt: skip


def _options() -> Group:
    receivers = [receiver_with(label, **features) for label, features in _OPTIONS.items()]
    limits = [c_loop_with(label, **features) for label, features in _OPTIONS.items()]
    plain = {contender.name: contender for contender in BASICS}
    pairs = (one for pair in zip(limits, receivers, strict=True) for one in pair)
    contenders = (plain["c-loop"], again("c-loop"), plain["receiver"], *pairs)
    return Group(
        name="options", title="128 bytes, with control messages", payload=128, traffic=_injected(pattern(128)),
        contenders=contenders,
        comparisons={
            "of the C loop with the same messages": {
                "c-loop-again": "c-loop",
                "receiver": "c-loop",
                **{receiver.name: limit.name for receiver, limit in zip(receivers, limits, strict=True)},
            },
            "of the same without": {
                **{limit.name: "c-loop" for limit in limits},
                **{receiver.name: "receiver" for receiver in receivers},
            },
        },
    )  # fmt: skip


def _gro(size: int) -> Group:
    plain = {contender.name: contender for contender in BASICS}
    contenders = (plain["c-loop"], again("c-loop"), plain["recvfrom"], plain["receiver"],
                  receiver_with("gro", gro=True))  # fmt: skip
    return Group(
        name=f"gro-{size}", title=f"one flow in trains over loopback, {size:,} bytes", payload=size,
        traffic=partial(Trains, payload=pattern(size)), contenders=contenders,
        comparisons={
            "of the C loop, no GRO": _against("c-loop", contenders),
            "of Receiver.recv, no GRO": {"receiver-gro": "receiver"},
            "of recvfrom": _against("recvfrom", contenders),
        },
    )  # fmt: skip


def _sockmap() -> Group:
    plain = {contender.name: contender for contender in BASICS}
    contenders = (plain["c-loop"], again("c-loop"), in_sockmap("c-loop"), plain["receiver"], in_sockmap("receiver"))
    return Group(
        name="sockmap", title="128 bytes, the socket in a SOCKMAP or not", payload=128,
        traffic=_injected(pattern(128)), contenders=contenders,
        comparisons={
            "of the same outside": {
                "c-loop-again": "c-loop",
                "c-loop-sockmap": "c-loop",
                "receiver-sockmap": "receiver",
            },
            "of the C loop outside": _against("c-loop", contenders),
        },
    )  # fmt: skip


def _task(task: decoders.Task, title: str) -> Group:
    made = decoders.contenders(task)
    whole, alone = ([one.name for one in made if one.name.endswith("-alone") is flag] for flag in (False, True))
    contenders = (BASICS[0], *made)  # the C loop: what receiving alone takes
    return Group(
        name=task.name, title=title, payload=len(task.payload), traffic=_injected(task.payload),
        contenders=contenders,
        comparisons={
            f"of {made[0].title}": {
                **dict.fromkeys(whole[1:], whole[0]),
                **dict.fromkeys(alone[1:], alone[0]),
            }
        },
    )  # fmt: skip


GROUPS = {
    group.name: group
    for group in (
        *map(_payload, PAYLOADS),
        _options(),
        *map(_gro, (128, 1400)),
        _sockmap(),
        _task(NETFLOW, "NetFlow v5, 30 records: parsed, packets and octets summed up"),
        _task(SENDERS, f"128 bytes: datagrams of each of {SOURCES:,} senders counted"),
    )
}
