"""Where every datagram of a run is, to the one: handled, dropped and counted, or lost in a queue that was destroyed.

The kernel counts a datagram as received when it is taken out of a queue (InDatagrams), and nothing counts those that a
closed socket's queue had: they are what remains of those sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LATE",
    "MOST_STRAYS",
    "Account",
    "Owners",
    "Readers",
    "Step",
    "Stray",
    "account",
    "astray",
    "moved",
    "owners",
    "readers",
    "repeated",
    "steps",
    "strays",
]

Owners = NDArray[np.int64]
"""The slot of every sender; -1 where it is not known. (senders,)"""

LATE = 1000
"""How many datagrams the kernel may keep for later (net.core.netdev_max_backlog, Documentation/admin-guide/sysctl)."""

MOST_STRAYS = 5
"""That are told apart."""


class Account(NamedTuple):
    """Datagrams. taken : out of queues. full, refused, filtered : dropped, and counted as that. handled, failed : of
    those taken. killed : counted as in the hands of workers that died. recorded : rows; repeated : those of them that
    were there before.
    """

    sent: int
    taken: int
    full: int
    refused: int
    filtered: int
    handled: int
    failed: int
    killed: int
    recorded: int
    repeated: int

    @property
    def dropped(self) -> int:
        return self.full + self.refused + self.filtered

    @property
    def destroyed(self) -> int:
        """In no counter, so lost with a queue."""
        return self.sent - self.taken - self.dropped

    @property
    def in_hands(self) -> int:
        """Taken and neither handled nor failed: in the hands of workers that died."""
        return self.taken - self.handled - self.failed


class Stray(NamedTuple):
    """A datagram, the phase that it was sent in, the slot that recorded it, and those that had its sender before and
    after the next change.
    """

    sender: int
    number: int
    phase: int
    slot: int
    owners: list[int]


class Step(NamedTuple):
    """One change. moved : senders whose slot changed by it; ideal : the fewest that could, in the mean."""

    what: str
    before: int
    after: int
    moved: int
    ideal: float


class Readers(NamedTuple):
    """What is wrong with who has read what. unexcused : datagrams that nobody has recorded, though nobody has died in
    whose hands they could have been. backward : how often a worker has recorded what was sent after its successor's.
    """

    unexcused: int
    backward: int


def account(
    sent: int, counters: dict[str, int], rows: NDArray[np.void], handled: int, failed: int, killed: int
) -> Account:
    """Of what the kernel has counted in the namespace (/proc/net/snmp), and what was handled and recorded.

    Drops for want of room and by a filter are in InErrors, the first also in RcvbufErrors or MemErrors (net/ipv4/udp.c,
    __udp_queue_rcv_skb, udp_queue_rcv_one_skb).
    """
    full = counters["RcvbufErrors"] + counters["MemErrors"]
    return Account(
        sent, counters["InDatagrams"], full, counters["NoPorts"], counters["InErrors"] - full, handled, failed, killed,
        len(rows), repeated(rows),
    )  # fmt: skip


def repeated(rows: NDArray[np.void]) -> int:
    """How many rows say what another has said."""
    identity = rows["sender"].astype(np.int64) << 32 | rows["number"]
    identity.sort()
    return int(np.count_nonzero(identity[1:] == identity[:-1]))


def owners(rows: NDArray[np.void], slots: NDArray[np.int64], senders: int, phases: int) -> list[Owners]:
    """Who had each sender in every even phase below `phases`: the slot that recorded most of its datagrams."""
    width = int(slots.max(initial=0)) + 1
    found = []
    for phase in range(0, phases, 2):
        chosen = rows["phase"] == phase
        table = np.bincount(
            rows["sender"][chosen].astype(np.int64) * width + slots[chosen], minlength=senders * width
        ).reshape(senders, width)
        found.append(np.where(table.any(1), table.argmax(1), -1))
    return found


def astray(rows: NDArray[np.void], slots: NDArray[np.int64], phases: Sequence[Owners]) -> NDArray[np.int64]:
    """Which rows were recorded by a slot that was not their sender's.

    phases : the owners in every even phase; where one is not known nobody is wrong. In an odd phase the owners before
    and after will do, and for the last datagrams of the even phase before it, too: those that the kernel may have kept
    for later.
    """
    wrong = [np.zeros(0, np.int64)]
    for phase in range(2 * len(phases) - 1):
        chosen = np.flatnonzero(rows["phase"] == phase)
        had = rows["sender"][chosen]
        right = _is(phases[phase // 2][had], slots[chosen])
        if phase // 2 + 1 < len(phases) and len(chosen):
            late = _is(phases[phase // 2 + 1][had], slots[chosen])
            if phase % 2 == 0:  # senders take turns, so this is the order in which they were sent
                order = rows["number"][chosen].astype(np.int64) << 32 | had
                late &= order >= np.partition(order, -LATE)[-LATE] if len(order) > LATE else True
            right |= late
        wrong.append(chosen[~right])
    return np.concatenate(wrong)


def strays(rows: NDArray[np.void], slots: NDArray[np.int64], phases: Sequence[Owners]) -> list[Stray]:
    """The first of those that went astray."""
    found = []
    for row in astray(rows, slots, phases)[:MOST_STRAYS].tolist():
        sender, number, phase = rows[row].item()
        around = [int(owner[sender]) for owner in phases[phase // 2 : phase // 2 + 2]]
        found.append(Stray(sender, number, phase, int(slots[row]), around))
    return found


def readers(
    rows: NDArray[np.void], by: NDArray[np.int64], slots: NDArray[np.int64], died: NDArray[np.bool_]
) -> Readers:  # fmt: skip
    """Whether the workers of each slot have read one after the other, and lost nothing but by dying.

    by : whose each row is: workers are numbered as they have begun to read. slots, died : of each worker. A queue keeps
    the order, so what is missing between two datagrams of a sender at one slot was in the hands of who recorded the
    first, or of one who came before who recorded the second: one of them has died.
    """
    before = np.zeros(len(slots), np.int64)  # how many of its slot had died when it began
    for slot in np.unique(slots):
        here = slots == slot
        before[here] = np.cumsum(died[here]) - died[here]
    order = np.lexsort((rows["number"], rows["sender"]))
    sender, number, worker = rows["sender"][order], rows["number"][order].astype(np.int64), by[order]
    at_one = (sender[1:] == sender[:-1]) & (slots[worker[1:]] == slots[worker[:-1]])
    missing = np.maximum(np.diff(number) - 1, 0)
    return Readers(
        int(missing[at_one & (before[worker[1:]] <= before[worker[:-1]])].sum()),
        int(np.count_nonzero(at_one & (worker[1:] < worker[:-1]))),
    )


def _is(owner: Owners, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
    right: NDArray[np.bool_] = (owner == slots) | (owner < 0)
    return right


def moved(before: Owners, after: Owners) -> int:
    """How many senders have another owner, of those whose owners are known."""
    return int(np.count_nonzero((before != after) & (before >= 0) & (after >= 0)))


def steps(changes: Sequence[tuple[str, int, int]], phases: Sequence[Owners]) -> list[Step]:
    """What each change has moved. changes : what, and how many slots there were before and after."""
    return [
        Step(what, before, after, moved(*phases[number : number + 2]),
             len(phases[0]) * abs(after - before) / max(after, before))
        for number, (what, before, after) in enumerate(changes)
    ]  # fmt: skip
