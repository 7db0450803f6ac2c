"""Who gets a sender: the balancer, classic BPF or the kernel's hash, by the policy and the privileges at hand."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from errno import EPERM
from typing import Literal

from fastrecv import reuseport
from fastrecv.balance import Balancer
from fastrecv.classic import Filter
from fastrecv.errors import BpfError, SocketRefusedError
from fastrecv.policies import Policy

__all__ = ["Chooser", "Steering"]

Chooser = Literal["balancer", "classic", "hash"]
"""Who decides: the balancer's program, classic BPF, or the kernel's hash of both ends."""

_FREED = 5.0  # seconds
_GRACE = 0.1  # seconds: a grace period of RCU takes some 10 ms


class Steering:
    """The group's program and its slots; attached when this returns.

    passed : the first sockets are another's, who keeps them: a program that a killed supervisor has left there goes,
    and so does this one in the end, so that every datagram finds a queue meanwhile.

    With a Balancer, senders move as few as can and any slot may be without. Classic BPF divides them among all members,
    by their order; the kernel's hash too.
    """

    def __init__(self, policy: Policy, members: Sequence[socket.socket], log: logging.Logger, *, passed: bool) -> None:
        self._log = log
        self._by: Balancer | Filter | None = None
        self._kept = members[0] if passed else None
        if not are_group(members):
            return
        try:
            self._by = _best(policy, members, passed and reuseport.detach(members[0]))
        except BpfError as error:
            if error.errno != EPERM:
                raise
            log.warning("policy %s takes CAP_BPF: the kernel's hash of both ends decides who gets a sender", policy)
            return
        if isinstance(self._by, Filter):
            log.warning("without CAP_BPF: classic BPF by %s, so a worker more or less moves nearly all senders", policy)
        else:
            log.info("senders are balanced by %s", policy)

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
