"""Balancer: every sender of a reuseport group has a member of it, and keeps it while others come and go."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Mapping
from dataclasses import replace
from errno import EBUSY, EINVAL, ENOENT
from types import TracebackType
from typing import Literal, Self

import numpy as np

from fastrecv import bpf, buckets
from fastrecv.bpf import Map
from fastrecv.errors import BpfError, SocketRefusedError
from fastrecv.listeners import described
from fastrecv.policies import BUCKETS, Policy, Sender

__all__ = ["COUNTERS", "SLOTS", "Balancer"]

SLOTS = 128  # of bpf/balance.bpf.c
COUNTERS = ("selected", "empty", "fallback", "unreadable", "wrong")
"""Of a slot: struct counters of bpf/balance.bpf.c."""
_EMPTY = {"drop": 0, "kernel": 1, "next": 2}
_SO_ATTACH_REUSEPORT_EBPF = 52  # include/uapi/asm-generic/socket.h

Empty = Literal["drop", "kernel", "next"]


class Balancer:
    """Balances one reuseport group, TCP or UDP, by a policy; a context manager.

    empty : what becomes of a sender whose slot has no socket: "drop" (refused, counted), "kernel" (the kernel's hash
    takes him elsewhere), "next" (the next slot that has one).

    The program stays attached to the group, and the tables in force, as long as a member is open. CAP_BPF to make one;
    nothing to register and to change weights. Linux 5.14 (migrating_sk).
    """

    def __init__(self, policy: Policy, *, empty: Empty = "drop") -> None:
        if empty not in _EMPTY:
            raise ValueError(f"empty={empty!r}: give {', '.join(_EMPTY)}")
        if not policy.ebpf:
            raise ValueError(f"key {policy.key!r} is for classic BPF only")
        if policy.seed is None:
            policy = replace(policy, seed=secrets.randbits(64))
        self.policy = policy
        self._object = bpf.packaged("balance")
        try:
            self._object.set(empty=_EMPTY[empty], **policy.settings())
            self._object.load()
            self._table = np.full(BUCKETS, buckets.EMPTY, np.uint16)
            self._tables = [Map.array("table", np.uint32, BUCKETS) for _ in range(2)]  # one in force, one to be made
        except BaseException:
            self._object.close()
            raise
        self._weights: dict[int, int] = {}
        self._put_in_force()

    def close(self) -> None:
        """Let go of the program and its maps; a group that it is attached to keeps them."""
        for table in self._tables:
            table.close()
        self._object.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def weights(self) -> dict[int, int]:
        return dict(self._weights)

    def attach(self, sock: socket.socket) -> None:
        """Attach the program to the group of a bound socket, in the place of any other. SocketRefusedError."""
        if sock.getsockname()[1] == 0:
            raise SocketRefusedError(f"{described(sock)} is not bound: attach after bind(), or the next member's fails")
        program = self._object.programs["balance"].fileno()
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_EBPF, program)
        except OSError as error:
            if error.errno != EINVAL:
                raise
            raise SocketRefusedError(f"{described(sock)} is in no group: set SO_REUSEPORT before bind()") from None

    def register(self, slot: int, sock: socket.socket) -> None:
        """Give a slot to a member of the group, in the place of one that is there. SocketRefusedError."""
        if not 0 <= slot < SLOTS:
            raise ValueError(f"slot {slot}: give 0 to {SLOTS - 1}")
        try:
            self._object.maps["slots"].update([slot], [sock.fileno()])
        except BpfError as error:
            reasons = {
                EBUSY: "it has a slot, or is in a SOCKMAP, already: it can be in one place only",
                EINVAL: "it needs SO_REUSEPORT before bind(), and TCP to listen",
            }
            if error.errno not in reasons:
                raise
            raise SocketRefusedError(f"{described(sock)}: {reasons[error.errno]}") from None

    def unregister(self, slot: int) -> None:
        """Empty a slot; nothing where it is empty."""
        with contextlib.suppress(KeyError):
            try:
                self._object.maps["slots"].delete([slot])
            except BpfError as error:
                if error.errno not in (EINVAL, ENOENT):
                    raise

    def balance(self, weights: Mapping[int, int]) -> int:
        """Divide the senders among slots by weight; gives how many of the BUCKETS move, the fewest that can.

        In force for every packet at once, and nobody uses the old table any more when it returns.
        """
        following = buckets.rebalance(self._table, weights)
        moved = int(np.count_nonzero(following != self._table))
        self._table, self._weights = following, dict(weights)
        self._put_in_force()
        return moved

    def _put_in_force(self) -> None:
        self._tables.reverse()
        table = self._tables[0]
        table.update(np.arange(BUCKETS, dtype=np.uint32), self._table.astype(np.uint32))
        outer = self._object.maps["tables"]
        # Atomic, and it returns after a grace period of RCU: who still ran with the other table has ended.
        outer.update([0], np.array([table.fileno()], np.uint32).view(outer.value_dtype))

    def slot(self, sender: Sender) -> int | None:
        """Whose a sender is; None where no slot has any weight."""
        bucket = self.policy.bucket(sender)
        found = buckets.EMPTY if bucket is None else int(self._table[bucket])
        return None if found == buckets.EMPTY else found

    def counters(self) -> dict[int | None, dict[str, int]]:
        """By slot; None for senders that no slot has, and for packets without a readable header."""
        _, rows = self._object.maps["counts"].items()
        return {
            slot if slot < SLOTS else None: {name: int(row[name].sum()) for name in COUNTERS}
            for slot, row in enumerate(rows)
        }
