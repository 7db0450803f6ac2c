"""The ways of choosing a member of a reuseport group that `steer` measures: all is attached before a window begins."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

from fastrecv.balance import Balancer
from fastrecv.bench.floods import Flood
from fastrecv.bench.lab import Lab
from fastrecv.bpf import Program, packaged
from fastrecv.classic import Filter
from fastrecv.modulo import slot_of
from fastrecv.policies import Policy, Sender
from fastrecv.reuseport import attach
from fastrecv.sockets import drop_everything

__all__ = ["HASH", "MEMBERS", "ONE_SENDER", "Choice", "Group", "Way", "open_members", "ways_of"]

MEMBERS = 4  # of a group
HASH, ONE_SENDER = "hash", "one-sender"
_IP_FREEBIND = 15  # ip(7); include/uapi/linux/in.h


class Choice(NamedTuple):
    """program : of eBPF, where there is one. member : the index of a sender's member, where user space can say it."""

    program: Program | None
    member: Callable[[Sender], int | None] | None


@dataclass(frozen=True)
class Group:
    """The sockets of a row, in the order in which they joined, and what comes to them."""

    flood: Flood
    sockets: list[socket.socket]
    sources: int
    seed: int


@contextlib.contextmanager
def _one(group: Group) -> Iterator[Choice]:  # noqa: ARG001 - nobody has to choose
    yield Choice(None, lambda _: 0)


@contextlib.contextmanager
def _hash(group: Group) -> Iterator[Choice]:  # noqa: ARG001 - the kernel has it built in
    yield Choice(None, None)


@dataclass(frozen=True)
class Way:
    """A row. members : sockets. against : the row whose sockets it has as well, with nothing but the way different.

    connected : its socket is connected to its one sender. known : every sender has come once before it is measured.
    open : attaches it to a group.
    """

    name: str
    title: str
    open: Callable[[Group], AbstractContextManager[Choice]]
    members: int = MEMBERS
    against: str | None = HASH
    one_sender: bool = False
    connected: bool = False
    known: bool = False


def _classic(policy: Policy) -> Callable[[Group], AbstractContextManager[Choice]]:
    @contextlib.contextmanager
    def opened(group: Group) -> Iterator[Choice]:
        chosen = Filter(policy, len(group.sockets))
        chosen.attach(group.sockets[0])
        yield Choice(None, chosen.index)

    return opened


def _balancer(
    policy: Policy, *, counting: bool = True, tracking: bool = False, leaving: bool = False
) -> Callable[[Group], AbstractContextManager[Choice]]:
    """The balancer. tracking : knows senders; leaving : every slot is being drained by sender, so all are looked up."""

    @contextlib.contextmanager
    def opened(group: Group) -> Iterator[Choice]:
        senders = group.sources if tracking else 0
        with Balancer(policy, size=len(group.sockets), senders=senders, counting=counting) as balancer:
            for slot, sock in enumerate(group.sockets):
                balancer.register(slot, sock)
                if leaving:
                    balancer.leaving.begin(slot)
            balancer.attach(group.sockets[0])
            slots = balancer.maps.table().tolist()

            def member(sender: Sender) -> int | None:
                bucket = balancer.policy.bucket(sender)
                return None if bucket is None else slots[bucket]

            yield Choice(balancer.maps.program, member)

    return opened


@contextlib.contextmanager
def _modulo(group: Group) -> Iterator[Choice]:
    """Its maps are not pinned here: a bench that is killed must leave nothing."""
    size, nonce = len(group.sockets), group.seed % (1 << 32) or 1
    with packaged("modulo") as modulo:
        modulo.load()
        modulo.maps["size"].update([0], [size])
        modulo.maps["nonce"].update([0], [nonce])
        protocol = "udp" if group.flood.protocol == socket.IPPROTO_UDP else "tcp"
        targets = modulo.maps[f"{protocol}_balancing_targets"]
        targets.update(list(range(size)), [sock.fileno() for sock in group.sockets])
        program = modulo.programs["_selector"]
        attach(group.sockets[0], program)
        yield Choice(program, lambda sender: slot_of(sender.source, size, nonce))


def ways_of(protocol: int, seed: int) -> list[Way]:
    """The rows of a flood. A SYN has no payload that could choose, and no socket is connected before it."""
    seed %= 1 << 64
    source, flow = Policy("source", seed=seed), Policy("flow", seed=seed)
    udp = protocol == socket.IPPROTO_UDP
    by_payload = _classic(Policy("payload", length=2, seed=seed))
    return [
        Way("baseline", "baseline: one socket", _one, 1, None),
        Way("again", "baseline again (A/A)", _one, 1, None),
        Way(HASH, "hash: a group, by the kernel's hash", _hash, against=None),
        Way("classic-destination", "classic-destination: classic BPF", _classic(Policy("destination", seed=seed))),
        *([Way("classic-payload", "classic-payload: classic BPF", by_payload)] if udp else []),
        Way("source", "source: eBPF balancer", _balancer(source)),
        Way("flow", "flow: eBPF balancer", _balancer(flow)),
        Way("uncounted", "uncounted: source, without counters", _balancer(source, counting=False)),
        Way("tracking", "tracking: source, senders tracked, idle", _balancer(source, tracking=True)),
        Way("leaving", "leaving: source, all senders looked up", _balancer(source, tracking=True, leaving=True),
            known=True),
        Way("modulo", "modulo: the original program's method", _modulo),
        *([
            Way(ONE_SENDER, "one-sender: one socket", _one, 1, None, one_sender=True),
            Way("connected", "connected: one socket, to its one sender", _one, 1, ONE_SENDER, one_sender=True,
                connected=True),
        ] if udp else []),
    ]  # fmt: skip


def open_members(way: Way, flood: Flood, lab: Lab, stack: contextlib.ExitStack) -> list[socket.socket]:
    """The sockets of a row: they drop every datagram, or listen and never accept. `stack` closes them."""
    udp = flood.protocol == socket.IPPROTO_UDP
    members = []
    for _ in range(way.members):
        with lab.host:
            sock = stack.enter_context(socket.socket(flood.family, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, way.members > 1)
        sock.setsockopt(
            socket.IPPROTO_IP, _IP_FREEBIND, way.connected
        )  # IPv6 addresses of a local route are no device's
        sock.bind((flood.destination if way.connected else flood.bound, flood.port))
        if way.connected:
            sender = flood.sender(0)
            sock.connect((str(sender.source), sender.source_port))
        if udp:
            drop_everything(sock)
        else:
            sock.listen(1)
        members.append(sock)
    return members
