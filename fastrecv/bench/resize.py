"""Resizing a balanced group while thousands of senders send: who moves, what is lost, what goes astray.

Every datagram is accounted for: received just once by the member that had its sender, or counted as dropped by the
kernel. A datagram is misdirected where it comes to a member that had its sender neither before nor after the change in
flight when it was sent.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import click
import numpy as np
from numpy.typing import NDArray
from pyroute2 import IPRoute

from fastrecv import features
from fastrecv.balance import Balancer
from fastrecv.bench import environment
from fastrecv.bench.lab import private_bpffs
from fastrecv.bench.numbered import MAX_SENDERS, NUMBERED, NumberedSource, sender, udp_counters
from fastrecv.bench.survive_account import Owners, astray, repeated
from fastrecv.modulo import Modulo
from fastrecv.netns import Namespace
from fastrecv.policies import Policy
from fastrecv.receiver import Receiver
from fastrecv.reuseport import retire
from fastrecv.sockets import grow_receive_buffer, open_datagram

__all__ = ["METHODS", "SIZES", "Account", "Member", "Step", "command", "described", "measure", "settle"]

SIZES = (4, 5, 3)
_ADDRESS, _PORT = "127.0.0.1", 2055
_PATIENCE = 2.0  # seconds
_GRACE = 0.1  # seconds; one of RCU takes some 10 ms
_BUFFER = 64 << 20  # bytes: nothing is to be lost for want of room

Method = Literal["buckets", "modulo"]
METHODS: tuple[Method, ...] = ("buckets", "modulo")


class Step(NamedTuple):
    """One change. moved : senders whose slot changed; ideal : the fewest that could, in the mean."""

    before: int
    after: int
    moved: int
    ideal: float
    seconds: float


class Account(NamedTuple):
    """Where all datagrams of a run are. destroyed : the remainder: in no counter, so lost with a queue."""

    method: Method
    senders: int
    seconds: float
    sent: int
    received: int
    repeated: int
    misdirected: int
    full: int
    refused: int
    destroyed: int
    steps: list[Step]

    @property
    def sound(self) -> bool:
        """Whether nothing was lost with a queue, came twice, or to a wrong member."""
        return not (self.repeated or self.misdirected or self.destroyed)


class _Group(Protocol):
    """What is resized."""

    def attach(self, sock: socket.socket) -> None: ...
    def register(self, slot: int, sock: socket.socket) -> None: ...
    def retire(self, slot: int, sock: socket.socket) -> None: ...
    def resize(self, size: int) -> object: ...


class Member:
    """A socket of the group, its reader, and all it has received."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.sock = open_datagram((_ADDRESS, _PORT), reuse_port=True)
        grow_receive_buffer(self.sock, _BUFFER)
        self._rows: list[NDArray[np.void]] = []
        self._ending = threading.Event()
        self._deadline = math.inf
        self._thread = threading.Thread(target=self._read, name=f"fastrecv-member-{slot}")
        self._thread.start()

    def _read(self) -> None:
        with Receiver(self.sock, batch_size=1024, slot_size=64) as receiver:
            while True:
                batch = receiver.recv(0.02)
                if len(batch):
                    self._rows.append(batch.records(NUMBERED).copy())
                if self._ending.is_set() and (not len(batch) or time.monotonic() > self._deadline):
                    return

    def end(self) -> None:
        """Read the queue to its end, and close; where it has none, because senders still come, not for ever."""
        self._deadline = time.monotonic() + _PATIENCE
        self._ending.set()
        self._thread.join()
        self.sock.close()

    def rows(self) -> NDArray[np.void]:
        return np.concatenate([np.zeros(0, NUMBERED), *self._rows])


def _end(members: dict[int, Member]) -> None:
    for member in members.values():
        member.end()


def measure(method: Method, senders: int, seconds: float, on_step: Callable[[str], None]) -> Account:
    """Resize a group of UDP sockets through SIZES, `seconds` after each change. Root: namespaces, BPF.

    on_step : told what begins.
    """
    with contextlib.ExitStack() as stack:
        namespace = stack.enter_context(contextlib.closing(Namespace()))
        stack.enter_context(namespace)
        with IPRoute() as net:
            net.link("set", index=1, state="up")
        group, owners = stack.enter_context(_balanced(method, senders))
        members = {slot: Member(slot) for slot in range(SIZES[0])}
        ended: list[Member] = []
        stack.callback(_end, members)
        group.attach(members[0].sock)
        for slot, member in members.items():
            group.register(slot, member.sock)
        group.resize(SIZES[0])
        phases, steps = [owners()], []
        began = time.monotonic()
        source = stack.enter_context(NumberedSource(namespace, senders, _ADDRESS, _PORT))
        time.sleep(seconds)
        for before, after in pairwise(SIZES):
            on_step(f"{method}: {before} to {after}")
            changed = time.monotonic()
            for slot in range(before, after):  # they have a socket before they have senders
                members[slot] = Member(slot)
                group.register(slot, members[slot].sock)
            with source.change():
                group.resize(after)
            for slot in range(after, before):
                ended.append(members.pop(slot))
                group.retire(slot, ended[-1].sock)
                ended[-1].end()
            lasted = time.monotonic() - changed
            phases.append(owners())
            moved = int(np.count_nonzero(phases[-1] != phases[-2]))
            ideal = senders * abs(after - before) / max(after, before)
            steps.append(Step(before, after, moved, ideal, lasted))
            time.sleep(seconds)
        sent = source.stop()
        lasted = time.monotonic() - began
        settle(namespace, sent)
        for member in list(members.values()):
            ended.append(members.pop(member.slot))
            member.end()
        return _account(method, senders, lasted, sent, ended, phases, steps, udp_counters(namespace))


def settle(namespace: Namespace, sent: int) -> None:
    """Wait until the kernel has counted every datagram as received or dropped: it may have kept some for later."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        counters = udp_counters(namespace)
        if sum(counters[name] for name in ("InDatagrams", "RcvbufErrors", "MemErrors", "NoPorts")) >= sent:
            return
        time.sleep(0.01)


@contextlib.contextmanager
def _balanced(method: Method, senders: int) -> Iterator[tuple[_Group, Callable[[], Owners]]]:
    everybody = [sender(number, _ADDRESS, _PORT) for number in range(senders)]
    if method == "buckets":
        with Balancer(Policy("source")) as balancer:
            of = np.array([balancer.policy.bucket(one) for one in everybody], int)
            yield balancer, lambda: balancer.maps.table()[of].astype(np.int64)
        return
    with private_bpffs() as root, Modulo(root / "modulo", SIZES[0]) as modulo:
        yield _Udp(modulo), lambda: np.array([modulo.index(one.source) for one in everybody])


class _Udp:
    """The UDP half of a Modulo."""

    def __init__(self, modulo: Modulo) -> None:
        self._modulo = modulo
        self.attach, self.register, self.resize = modulo.attach, modulo.register, modulo.resize

    def retire(self, slot: int, sock: socket.socket) -> None:
        """As Balancer.retire does; without a map of maps a grace period is waited for by its length."""
        retire(sock)
        self._modulo.unregister(slot, "udp")
        time.sleep(_GRACE)


def _account(
    method: Method, senders: int, seconds: float, sent: int, members: list[Member], phases: list[Owners],
    steps: list[Step], counters: dict[str, int],
) -> Account:  # fmt: skip
    rows = np.concatenate([member.rows() for member in members])
    slots = np.concatenate([np.full(len(member.rows()), member.slot) for member in members])
    full, refused = counters["RcvbufErrors"] + counters["MemErrors"], counters["NoPorts"]
    unique = len(rows) - repeated(rows)
    return Account(
        method, senders, seconds, sent, len(rows), len(rows) - unique, len(astray(rows, slots, phases)), full, refused,
        sent - unique - full - refused, steps,
    )  # fmt: skip


def described(account: Account) -> str:
    """A run in words, a line each."""
    lines = [
        f"{account.method}: {account.senders:,} senders, {account.sent:,} datagrams in {account.seconds:.1f} s "
        f"({account.sent / account.seconds:,.0f} a second)"
    ]
    lines += [
        f"  {step.before} to {step.after} members: {step.moved:,} senders moved, {step.ideal:,.0f} ideally "
        f"(x {step.moved / step.ideal:.2f}), {1000 * step.seconds:.0f} ms"
        for step in account.steps
    ]
    lines.append(
        f"  {account.received:,} received, {account.repeated} of them twice, {account.misdirected} by a wrong member; "
        f"dropped: {account.full} full queue, {account.refused} refused; {account.destroyed} lost with a queue"
    )
    return "\n".join(lines)


@click.command("resize")
@click.option("--senders", type=click.IntRange(100, MAX_SENDERS), default=10_000, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1, 3600), default=5.0, show_default=True,
              help="Of sending before, between and after the changes.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(context: click.Context, senders: int, seconds: float, as_json: bool) -> None:
    """Resize a group of UDP sockets from 4 to 5 to 3 members while senders send: by buckets, and by modulo.

    Exit code 1 where a datagram was lost with a queue, came twice, or to a wrong member. All of it in a private network
    namespace.
    """
    for name in ("network namespaces", "the balancer's program"):
        features.check(name)
    accounts = []
    for method in METHODS:
        accounts.append(measure(method, senders, seconds, lambda text: click.echo(text, err=True)))
        if not as_json:
            click.echo(described(accounts[-1]))
    if as_json:
        found = [account._asdict() | {"steps": [step._asdict() for step in account.steps]} for account in accounts]
        click.echo(json.dumps({"environment": environment.record(), "accounts": found}, indent=2))
    context.exit(0 if all(account.sound for account in accounts) else 1)
