"""Who gets a sender: the balancer, classic BPF or the kernel's hash, by the policy and the privileges at hand."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from errno import EPERM
from typing import Literal

import msgspec

from fastrecv import reuseport
from fastrecv.balance import Balancer, Empty
from fastrecv.balance_maps import Maps
from fastrecv.classic import Filter
from fastrecv.errors import BpfError, SocketRefusedError
from fastrecv.groups import Lookout
from fastrecv.policies import Policy
from fastrecv.sockets import drop_everything
from fastrecv.steerable import protocol_of
from fastrecv.workers.guarding import Guard, Repairs

__all__ = ["Chooser", "Record", "Steering"]

Chooser = Literal["balancer", "classic", "hash"]
"""Who decides: the balancer's program, classic BPF, or the kernel's hash of both ends."""

_EMPTY: Empty = "drop"  # as Balancer.best has it
_FREED = 5.0  # seconds
_GRACE = 0.1  # seconds: a grace period of RCU takes some 10 ms


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What the next supervisor of the same process id must know.

    Either maps (descriptors), of a Balancer, or size, of a Filter, or neither; lookout : a descriptor, of a Guard's.
    """

    kept: bool
    seed: int | None
    maps: dict[str, int]
    size: int | None
    guarded: bool
    repairs: Repairs
    lookout: int | None

    def descriptors(self) -> list[int]:
        return [*self.maps.values(), *([] if self.lookout is None else [self.lookout])]


class Steering:
    """Who decides in a group: a Balancer, classic BPF, or the kernel's hash.

    With a Balancer, senders move as few as can and any slot may be without. Classic BPF divides them among all members,
    by their order; the kernel's hash too.

    guard : looks after the group; None where the socket shares its port with nobody.
    """

    def __init__(
        self, by: Balancer | Filter | None, guard: Guard | None, kept: socket.socket | None, log: logging.Logger
    ) -> None:
        self._by, self.guard, self._kept, self._log = by, guard, kept, log

    @classmethod
    def begin(cls, policy: Policy, members: Sequence[socket.socket], log: logging.Logger, *, passed: bool) -> Steering:
        """Attach the best that the privileges at hand allow.

        passed : the first sockets are another's, who keeps them: a program that a killed supervisor has left there
        goes, and so does this one in the end, so that every datagram finds a queue meanwhile.
        """
        kept = members[0] if passed else None
        if not are_group(members):
            return cls(None, None, kept, log)
        try:
            by = _best(policy, members, passed and reuseport.detach(members[0]))
        except BpfError as error:
            if error.errno != EPERM:
                raise
            log.warning("policy %s takes CAP_BPF: the kernel's hash of both ends decides who gets a sender", policy)
            return cls(None, Guard(None, log), kept, log)
        if isinstance(by, Filter) and not policy.ebpf:
            log.info("senders are divided by %s, in classic BPF", policy)
        elif isinstance(by, Filter):
            log.warning("without CAP_BPF: classic BPF by %s, so a worker more or less moves nearly all senders", policy)
        else:
            log.info("senders are balanced by %s", policy)
        return cls(by, Guard(_lookout(members[0], log), log), kept, log)

    @classmethod
    def resume(cls, record: Record, policy: Policy, first: socket.socket, log: logging.Logger) -> Steering:
        """As it was before this program was executed. first : of the members."""
        by: Balancer | Filter | None = None
        policy = replace(policy, seed=record.seed)
        if record.maps:
            by = Balancer.of(Maps.inherit(record.maps), policy, _EMPTY, 0)
        elif record.size is not None:
            by = Filter(policy, record.size)
        lookout = None if record.lookout is None else Lookout.of(record.lookout)
        return cls(
            by, Guard(lookout, log, record.repairs) if record.guarded else None, first if record.kept else None, log
        )

    def record(self) -> Record:
        by = self._by
        return Record(
            kept=self._kept is not None,
            seed=None if by is None else by.policy.seed,
            maps=by.maps.descriptors() if isinstance(by, Balancer) else {},
            size=by.size if isinstance(by, Filter) else None,
            guarded=self.guard is not None,
            repairs=self.repairs,
            lookout=None if self.guard is None or self.guard.lookout is None else self.guard.lookout.fileno(),
        )

    @property
    def chooser(self) -> Chooser:
        if self._by is None:
            return "hash"
        return "balancer" if isinstance(self._by, Balancer) else "classic"

    @property
    def repairs(self) -> Repairs:
        return Repairs() if self.guard is None else self.guard.repairs

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
            with contextlib.suppress(SocketRefusedError):  # its worker has connected it: it is in no group any more
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
