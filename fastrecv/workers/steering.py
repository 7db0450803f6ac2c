"""Who gets a sender: the balancer, classic BPF or the kernel's hash, by the policy and the privileges at hand."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from errno import EPERM
from typing import Literal

import msgspec

from fastrecv import reuseport
from fastrecv.balance import Balancer, Empty
from fastrecv.balance_maps import Maps
from fastrecv.classic import Filter
from fastrecv.errors import BpfError, SocketRefusedError
from fastrecv.policies import Policy

__all__ = ["Chooser", "Record", "Steering"]

Chooser = Literal["balancer", "classic", "hash"]
"""Who decides: the balancer's program, classic BPF, or the kernel's hash of both ends."""

_EMPTY: Empty = "drop"  # as Balancer.best has it
_FREED = 5.0  # seconds
_GRACE = 0.1  # seconds: a grace period of RCU takes some 10 ms


class Record(msgspec.Struct, frozen=True):
    """What the next supervisor of the same process id must know: either maps (descriptors), of a Balancer, or size, of
    a Filter, or neither.
    """

    kept: bool
    seed: int | None
    maps: dict[str, int] | None
    size: int | None


class Steering:
    """Who decides in a group: a Balancer, classic BPF, or the kernel's hash.

    With a Balancer, senders move as few as can and any slot may be without. Classic BPF divides them among all members,
    by their order; the kernel's hash too.
    """

    def __init__(self, by: Balancer | Filter | None, kept: socket.socket | None) -> None:
        self._by, self._kept = by, kept

    @classmethod
    def begin(cls, policy: Policy, members: Sequence[socket.socket], log: logging.Logger, *, passed: bool) -> Steering:
        """Attach the best that the privileges at hand allow.

        passed : the first sockets are another's, who keeps them: a program that a killed supervisor has left there
        goes, and so does this one in the end, so that every datagram finds a queue meanwhile.
        """
        kept = members[0] if passed else None
        if not are_group(members):
            return cls(None, kept)
        try:
            by = _best(policy, members, passed and reuseport.detach(members[0]))
        except BpfError as error:
            if error.errno != EPERM:
                raise
            log.warning("policy %s takes CAP_BPF: the kernel's hash of both ends decides who gets a sender", policy)
            return cls(None, kept)
        if isinstance(by, Filter):
            log.warning("without CAP_BPF: classic BPF by %s, so a worker more or less moves nearly all senders", policy)
        else:
            log.info("senders are balanced by %s", policy)
        return cls(by, kept)

    @classmethod
    def resume(cls, record: Record, policy: Policy, first: socket.socket) -> Steering:
        """As it was before this program was executed. first : of the members."""
        by: Balancer | Filter | None = None
        policy = replace(policy, seed=record.seed)
        if record.maps is not None:
            by = Balancer.of(Maps.inherit(record.maps), policy, _EMPTY, 0)
        elif record.size is not None:
            by = Filter(policy, record.size)
        return cls(by, first if record.kept else None)

    def record(self) -> Record:
        by = self._by
        return Record(
            self._kept is not None,
            None if by is None else by.policy.seed,
            by.maps.descriptors() if isinstance(by, Balancer) else None,
            by.size if isinstance(by, Filter) else None,
        )

    @property
    def chooser(self) -> Chooser:
        if self._by is None:
            return "hash"
        return "balancer" if isinstance(self._by, Balancer) else "classic"

    def join(self, slot: int, member: socket.socket) -> None:
        """A new member, the last of all, gets a slot; senders only with `share`."""
        if isinstance(self._by, Balancer):
            self._by.register(slot, member)

    def share(self, slots: set[int], member: socket.socket) -> bool:
        """Let just these slots have senders; False where that cannot be, and nothing has changed. member : any."""
        if isinstance(self._by, Balancer):
            self._by.weigh(dict.fromkeys(sorted(slots), 1))
        elif slots != set(range(len(slots))):
            return False
        elif isinstance(self._by, Filter):
            self._by = Filter(self._by.policy, len(slots))
            self._by.attach(member)
        return True

    def leave(self, slot: int, member: socket.socket) -> None:
        """Before the queue of a member of ours is read to its end: no packet comes to it when this returns."""
        if isinstance(self._by, Balancer):
            self._by.retire(slot, member)
        else:
            reuseport.retire(member)
            time.sleep(_GRACE)

    def close(self) -> None:
        if self._kept is not None and self._by is not None:
            reuseport.detach(self._kept)
        if isinstance(self._by, Balancer):
            self._by.close()


def _best(policy: Policy, members: Sequence[socket.socket], replaced: bool) -> Balancer | Filter:
    """Balancer.best. replaced : a program has just gone, whose slots the kernel frees only after a while."""
    deadline = time.monotonic() + _FREED
    while True:
        try:
            return Balancer.best(policy, members)
        except SocketRefusedError:
            if not replaced or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def are_group(members: Sequence[socket.socket]) -> bool:
    """Whether the sockets share a port: one that systemd has passed alone may not."""
    return all(member.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) for member in members)
