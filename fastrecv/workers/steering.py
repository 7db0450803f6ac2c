"""Who gets a sender: the balancer, classic BPF or the kernel's hash, by the policy and the privileges at hand."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from errno import EPERM

from fastrecv import reuseport
from fastrecv.balance import Balancer
from fastrecv.classic import Filter
from fastrecv.errors import BpfError, SocketRefusedError
from fastrecv.groups import Lookout
from fastrecv.policies import Policy
from fastrecv.sockets import drop_everything
from fastrecv.steerable import protocol_of
from fastrecv.workers.guarding import Guard

__all__ = ["Steering"]

_FREED = 5.0  # seconds
_GRACE = 0.1  # seconds: a grace period of RCU takes some 10 ms


class Steering:
    """The group's program and its slots; attached when this returns.

    passed : the first sockets are another's, who keeps them: a program that a killed supervisor has left there goes,
    and so does this one in the end, so that every datagram finds a queue meanwhile.

    With a Balancer, senders move as few as can and any slot may be without. Classic BPF divides them among all members,
    by their order; the kernel's hash too.

    guard : looks after the group; None where the socket shares its port with nobody.
    """

    def __init__(self, policy: Policy, members: Sequence[socket.socket], log: logging.Logger, *, passed: bool) -> None:
        self._log = log
        self._by: Balancer | Filter | None = None
        self._kept = members[0] if passed else None
        self.guard: Guard | None = None
        if not are_group(members):
            return
        self._begin(policy, members, passed)
        self.guard = Guard(None if self._by is None else _lookout(members[0], log), log)

    def _begin(self, policy: Policy, members: Sequence[socket.socket], passed: bool) -> None:
        log = self._log
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
            following = Filter(self._by.policy, len(slots))
            try:
                following.attach(member)
            except SocketRefusedError as error:  # what its worker has done to it is not worth a service's life
                self._log.error("senders stay where they are: %s", error)
                return False
            self._by = following
        return True

    def leave(self, slot: int, member: socket.socket) -> None:
        """Before the queue of a member of ours is read to its end: no packet comes to it when this returns.

        To a listener come none by a Balancer or by classic BPF, but for handshakes that have begun, once it has no
        share. With a Balancer they find another listener when it is closed, and so do connections that nobody has
        accepted; without one these are reset.
        """
        if member.type == socket.SOCK_STREAM:
            return
        if isinstance(self._by, Balancer):
            try:
                self._by.retire(slot, member)
            except PermissionError:  # its worker has bound it to an interface: it has left the group by that
                self._by.unregister(slot)
            return
        with contextlib.suppress(PermissionError):
            reuseport.retire(member)
        time.sleep(_GRACE)

    def end(self, members: Mapping[int, socket.socket], others: set[int]) -> None:
        """Let nothing come to these members any more; what waits in them stays. others : slots that go on.

        Who sends is not told; who connects is refused by a Balancer, when handshakes that have begun go on. Without one
        listeners go on: a filter on a TCP socket takes CAP_NET_ADMIN (seen on Linux 6.18, where UDP takes none).
        """
        for slot, member in members.items():
            if member.type != socket.SOCK_STREAM:
                try:
                    drop_everything(member)
                except PermissionError:
                    self._log.error("datagrams go on to come for worker %d: its filters are locked", slot)
            elif isinstance(self._by, Balancer):
                self._by.weigh(dict.fromkeys(sorted(others), 1))

    def look(self, members: Mapping[int, socket.socket]) -> list[int]:
        """Put back what workers have undone, once a second; the slots whose sockets are of no use any more."""
        return [] if self.guard is None else self.guard.look(self._by, members)

    def close(self) -> None:
        if self.guard is not None:
            self.guard.close()
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


def _lookout(member: socket.socket, log: logging.Logger) -> Lookout | None:
    """By which the group's program is seen when privileges are given up; None, said why, where that cannot be."""
    try:
        return Lookout(protocol_of(member), member.getsockname()[1])
    except OSError as error:
        log.warning("nobody sees whether a worker replaces the group's program: %s", error)
        return None


def are_group(members: Sequence[socket.socket]) -> bool:
    """Whether the sockets share a port: one that systemd has passed alone may not."""
    return all(member.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) for member in members)
