"""Balancer: every sender of a reuseport group has a member of it, and keeps it while others come and go."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from errno import EINVAL, ENOENT, EPERM
from ipaddress import IPv4Network, IPv6Network
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from fastrecv import buckets, groups, reuseport
from fastrecv.balance_maps import SLOTS, Maps
from fastrecv.classic import Filter
from fastrecv.closing import Closing
from fastrecv.errors import BpfError, StateError
from fastrecv.leaving import Leaving
from fastrecv.policies import Policy, number_of
from fastrecv.steerable import described

__all__ = ["COUNTERS", "EMPTY_POLICIES", "MAX_WEIGHT", "SLOTS", "Balancer", "Empty", "Network", "Slot", "State"]

COUNTERS = ("selected", "empty", "fallback", "unreadable", "wrong")
"""Of a slot: struct counters of bpf/balance_maps.h."""
EMPTY_POLICIES = ("drop", "kernel", "next")
MAX_WEIGHT = 1000

Empty = Literal["drop", "kernel", "next"]
State = Literal["active", "draining", "empty"]
Network = IPv4Network | IPv6Network


class Slot(NamedTuple):
    """A slot as it stands.

    state : "active", "empty" (no socket has it) or "draining" (a socket does, but no senders: its queue is to be read,
    and known senders may still come). buckets : how many of policies.BUCKETS. socket : its cookie. leaving : whether it
    is drained sender by sender. counters : by their names in COUNTERS.
    """

    number: int
    state: State
    weight: int
    buckets: int
    socket: int | None
    leaving: bool
    counters: dict[str, int]


class Balancer(Closing):
    """Balances one reuseport group, TCP or UDP, by a policy; a context manager.

    policy : where its seed is None, one is drawn. size : slots 0 to size - 1 share the senders, evenly. empty : what
    becomes of a sender whose slot has no socket: "drop" (refused, counted), "kernel" (the kernel's hash takes him
    elsewhere), "next" (the next slot that has one). senders : how many may be known at a time while slots are drained
    sender by sender; 0: by table only.

    This one is the process's own. Attached to a group its program, and the tables in force, stay as long as a member is
    open. One that several processes share, and commands know, is opened by fastrecv.balance_life.

    CAP_BPF to make one; nothing to attach, register and change weights. Linux 5.14 (migrating_sk).
    """

    def __init__(
        self, policy: Policy, *, size: int = 0, empty: Empty = "drop", senders: int = 0, counting: bool = True
    ) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy {policy!r}: give a Policy, Policy.parse('source') say")
        if not policy.ebpf:
            raise ValueError(f"key {policy.key!r} is for classic BPF only (fastrecv.classic)")
        if not 0 <= size <= SLOTS:
            raise ValueError(f"size {size}: give 0 to {SLOTS}")
        if empty not in EMPTY_POLICIES:
            raise ValueError(f"empty={empty!r}: give {', '.join(EMPTY_POLICIES)}")
        if not 0 <= senders <= 10_000_000:
            raise ValueError(f"senders={senders}: give 0 to 10,000,000")
        if senders and policy.key in ("cpu", "random"):
            raise ValueError(f"key {policy.key!r} knows no senders: leave senders out")
        if policy.seed is None:
            policy = replace(policy, seed=secrets.randbits(64))
        self._hold(Maps.make(policy, empty, senders, counting), policy, empty, senders)
        if size:
            self.resize(size)

    def _hold(self, maps: Maps, policy: Policy, empty: Empty, senders: int) -> None:
        self.maps, self.policy, self.empty, self.senders = maps, policy, empty, senders
        self.leaving = Leaving(maps, senders)

    @classmethod
    def of(cls, maps: Maps, policy: Policy, empty: Empty, senders: int) -> Self:
        """One whose maps there are already."""
        made = cls.__new__(cls)
        made._hold(maps, policy, empty, senders)
        return made

    def close(self) -> None:
        """Let go of the program and its maps; a group that it is attached to keeps them."""
        self.maps.close()

    # The group

    def attach(self, sock: socket.socket) -> None:
        """Attach the program to the group of a member, in the place of any other. SocketRefusedError."""
        reuseport.attach(sock, self.maps.program)

    def put_back(self, sock: socket.socket) -> bool:
        """Attach again where a member has replaced or detached the program; gives whether that was so.

        For who holds the group, every so often: any member may do it, without a privilege. To look takes CAP_BPF and
        CAP_PERFMON (fastrecv.groups.program_of).
        """
        if groups.program_of(sock) == self.maps.program.info.id:
            return False
        self.attach(sock)
        return True

    @staticmethod
    def best(policy: Policy, members: Sequence[socket.socket], *, replace: bool = False) -> Balancer | Filter:
        """Balance a group by the best that the policy and the privileges at hand allow, attached when this returns.

        That is a Balancer whose slots the members have, in their order; or else classic BPF, for an ordinary user, and
        for what only that can. members : all of the group, in the order in which they joined it (UDP by bind, TCP by
        listen), which is that of classic BPF.

        replace : in the place of a program that the group has. StateError, with nothing changed, where it has one, or
        could have: whom its privileges do not let look (CAP_BPF and CAP_PERFMON) cannot share a group with others.
        """
        if not members:
            raise ValueError("no members: give all sockets of the group")
        if not replace:
            _refuse_replacing(members)
        if policy.ebpf and not (policy.classic and len(members) > SLOTS):
            try:
                made = Balancer(policy, size=len(members))
            except BpfError as error:
                if error.errno != EPERM or not policy.classic:
                    raise
            else:
                try:
                    for slot, member in enumerate(members):
                        made.register(slot, member)
                    made.attach(members[0])
                except BaseException:
                    made.close()
                    raise
                return made
        found = Filter(policy, len(members))
        found.attach(members[0])
        return found

    # Its slots

    def register(self, slot: int, sock: socket.socket, *, take_over: bool = False) -> None:
        """Give a slot to a member of the group; nothing where it has it already.

        take_over : in the place of another that has it, atomically for the packets. SocketRefusedError, with nothing
        changed, where another has it, and where the socket cannot have one.
        """
        _check_slot(slot)
        reuseport.put(self.maps["slots"], slot, sock, take_over)

    def check(self, slot: int, sock: socket.socket, *, take_over: bool = False) -> None:
        """SocketRefusedError where `register` is known to refuse: to look at several before any is changed."""
        _check_slot(slot)
        reuseport.check(self.maps["slots"], slot, sock, take_over)

    def unregister(self, slot: int) -> None:
        """Empty a slot; nothing where it is empty. Its senders follow the empty-slot policy: drain it first."""
        _check_slot(slot)
        try:
            self.maps["slots"].delete([slot])
        except KeyError:
            return
        except BpfError as error:
            if error.errno not in (EINVAL, ENOENT):
                raise

    def retire(self, slot: int, sock: socket.socket) -> None:
        """Empty the slot of a UDP member that has no senders any more, and is to be closed: see reuseport.retire.

        When this returns no packet is on its way to it: read its queue to the end, then close it.
        """
        reuseport.retire(sock)
        self.unregister(slot)
        self.maps.turn_to(self.maps.table())  # the same again, for the grace period of RCU that it waits

    def sockets(self) -> dict[int, int]:
        """Cookies (SO_COOKIE) of the sockets in the slots; one that was closed is gone."""
        return reuseport.in_slots(self.maps["slots"])

    # Who gets whom

    @property
    def weights(self) -> dict[int, int]:
        values = self.maps["weights"].lookup(np.arange(SLOTS, dtype=np.uint32))
        return {slot: int(values[slot]) for slot in np.flatnonzero(values).tolist()}

    def weigh(self, weights: Mapping[int, int]) -> int:
        """Divide the senders among slots by weight; gives how many of the buckets move, the fewest that can.

        Slots that are left out get no new senders: those who have them drain. In force for every packet at once, and
        no packet is under way by the old table when it returns. ValueError, with nothing changed, for a slot or a
        weight that cannot be.
        """
        for slot, weight in weights.items():
            _check_slot(slot)
            if not 1 <= weight <= MAX_WEIGHT:
                raise ValueError(f"weight {weight} of slot {slot}: give 1 to {MAX_WEIGHT}")
        for slot in weights.keys() - self.weights.keys():
            self.leaving.end(slot)  # it has come back
        values = np.zeros(SLOTS, np.uint32)
        values[list(weights)] = list(weights.values())
        self.maps["weights"].update(np.arange(SLOTS, dtype=np.uint32), values)  # first: `settle` finishes from it
        return self.settle()

    def settle(self) -> int:
        """Put in force what the weights say, where somebody was killed before he had; gives how many buckets move."""
        table, weights = self.maps.table(), self.weights
        if self.policy.key == "cpu":
            following = buckets.interleaved(len(table), weights)
        else:
            following = buckets.rebalance(table, weights)
        moved = int(np.count_nonzero(following != table))
        if moved:
            self.maps.turn_to(following)
        return moved

    def resize(self, size: int) -> int:
        """Let slots 0 to size - 1 share the senders, by the weights they have, new ones by 1; gives what `weigh` does.

        Slots above lose theirs, and drain.
        """
        if not 0 <= size <= SLOTS:
            raise ValueError(f"size {size}: give 0 to {SLOTS}")
        for slot in range(size):
            self.leaving.end(slot)
        control = self.maps["control"].lookup([0])
        control["size"] = size
        self.maps["control"].update([0], control)
        return self.weigh(self.of_size(size))

    def of_size(self, size: int) -> dict[int, int]:
        """The weights that `resize` would set."""
        present = self.weights
        return {slot: present.get(slot, 1) for slot in range(size)}

    @property
    def size(self) -> int:
        """As it was made, or resized last; slots that drain count."""
        return int(self.maps["control"].lookup([0])["size"][0])

    def drain(self, slot: int) -> int:
        """Give the slot's senders to the others, by weight; gives how many buckets move. Its socket stays registered.

        Read its queue to the end before it is unregistered and closed; `retire` it before, where it is your own. That
        prefixes are placed in it is not looked at.
        """
        return self.weigh(self.without(slot))

    def without(self, slot: int) -> dict[int, int]:
        """The weights that `drain` would set; StateError where it has no senders, or nobody could take them."""
        _check_slot(slot)
        weights = self.weights
        if slot not in weights:
            raise StateError(f"slot {slot} has no senders")
        if len(weights) == 1:
            raise StateError(f"slot {slot} is the only one that has senders: nobody could take them")
        del weights[slot]
        return weights

    def place(self, prefix: Network, slot: int) -> None:
        """Give a prefix (of what policy.mapped names) a slot of its own, before any hash. The longest prefix wins."""
        _check_slot(slot)
        self.maps["places"].update(self._prefix(prefix), [slot])

    def unplace(self, prefix: Network) -> None:
        """StateError where the prefix has no slot of its own."""
        try:
            self.maps["places"].delete(self._prefix(prefix))
        except KeyError:
            raise StateError(f"{prefix} has no slot of its own") from None

    def places(self) -> dict[Network, int]:
        """Which prefixes have slots of their own."""
        keys, slots = self.maps["places"].items()
        return {_network(key): slot for key, slot in zip(keys, slots.tolist(), strict=True)}

    def _prefix(self, prefix: Network) -> NDArray[np.void]:
        if self.policy.mapped is None:
            raise StateError("this balancer maps no prefixes: create it with mapped source or destination")
        key = np.zeros(1, self.maps["places"].key_dtype)
        key["length"] = 32 + prefix.prefixlen + (96 if prefix.version == 4 else 0)
        key["version"] = prefix.version
        key["address"] = np.frombuffer(number_of(prefix.network_address).to_bytes(16), np.uint8)
        return key

    # What it says

    def slots(self) -> list[Slot]:
        """All that have senders or sockets, or have counted anything."""
        present, weights, shares = self.sockets(), self.weights, buckets.shares(self.maps.table())
        leaving = self.leaving.slots()
        counters = self.counters()
        found = []
        for number in range(SLOTS):
            if not (number in present or number in weights or any(counters[number].values())):
                continue
            state: State = "empty" if number not in present else "active" if number in weights else "draining"
            found.append(
                Slot(number, state, weights.get(number, 0), shares.get(number, 0), present.get(number),
                     number in leaving, counters[number])
            )  # fmt: skip
        return found

    def sample(self, one_in: int) -> None:
        """Tell one choice in so many to the ring buffer `choices`; 0: none (fastrecv.watching reads them)."""
        self.maps["sampling"].update([0], [one_in])

    @property
    def sampling(self) -> int:
        return int(self.maps["sampling"][0])

    def counters(self) -> dict[int | None, dict[str, int]]:
        """By slot; None for senders that no slot has, and for packets without a readable header."""
        _, rows = self.maps["counts"].items()
        return {
            slot if slot < SLOTS else None: {name: int(row[name].sum()) for name in COUNTERS}
            for slot, row in enumerate(rows)
        }


def _refuse_replacing(members: Sequence[socket.socket]) -> None:
    """StateError where the group has a program, or where others could have given it one that is not to be seen."""
    named = described(members[0])
    try:
        present = groups.program_of(members[0])
    except PermissionError:
        if groups.has_others(members):
            raise StateError(
                f"others have joined the group of {named}, too, and it may have a program: to look takes CAP_BPF and "
                "CAP_PERFMON; replace=True replaces whatever it has"
            ) from None
        return
    if present is not None:
        other = "a classic BPF program" if present == groups.CLASSIC else f"program {present}"
        raise StateError(f"the group of {named} has {other}: detach that, or say replace=True")


def _check_slot(slot: int) -> None:
    if not 0 <= slot < SLOTS:
        raise ValueError(f"slot {slot}: give 0 to {SLOTS - 1}")


def _network(key: np.void) -> Network:
    length, packed = int(key["length"]) - 32, key["address"].tobytes()
    return IPv4Network((packed[12:], length - 96)) if key["version"] == 4 else IPv6Network((packed, length))
