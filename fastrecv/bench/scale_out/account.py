"""Where every record is: at a consumer, or counted as lost, and with what.

    sent = lost on the way + arrived at a host                        by the counter of its link
    arrived = refused + full + destroyed with a queue + taken         by UDP's; what is destroyed remains
    taken = in hands + acknowledged                                   by the hosts' own records
    at a consumer = acknowledged - nowhere + saved                    by the consumers' records

`nowhere` must be 0. What is refused came while nobody had the port; what is destroyed waited in the queues of a host
all of whose processes were killed at once; what was in hands, a batch a worker that was killed, may have been published
all the same, and then is saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrecv.bench import survive_account
from fastrecv.bench.scale_out.exporters import RECORDS, sent_by_each
from fastrecv.bench.survive_account import Owners, Step

__all__ = [
    "Account",
    "AtHost",
    "Deliveries",
    "Moves",
    "at_host",
    "deliveries",
    "faults",
    "identities",
    "judged",
    "moves",
]

Rows = NDArray[np.void]


class AtHost(NamedTuple):
    """Records at one host. killed : whether all its processes were killed at once, ever. deaths : of its workers.

    full : dropped because a queue had no room.
    """

    number: int
    killed: bool
    deaths: int
    arrived: int
    refused: int
    full: int
    taken: int
    acknowledged: int

    @property
    def destroyed(self) -> int:
        return self.arrived - self.refused - self.full - self.taken

    @property
    def in_hands(self) -> int:
        return self.taken - self.acknowledged


class Deliveries(NamedTuple):
    """What was delivered to consumers. messages : all that were stored and delivered. again : deliveries of a message
    after its first; records : of all deliveries; stored_twice : records that a second message had. removed : messages
    that were published again, and that the engine removed by their ids. astray : records in another shard than their
    exporter's.
    """

    messages: int
    again: int
    records: int
    stored_twice: int
    removed: int
    astray: int


class Account(NamedTuple):
    """Records. acknowledged : by hosts; twice : those of them that were before. kept : different ones at consumers;
    after : duplicates among what they have, though they have removed those. nowhere : acknowledged and not kept.
    saved : kept and not acknowledged. strangers : kept and never sent.
    """

    sent: int
    hosts: Sequence[AtHost]
    acknowledged: int
    twice: int
    kept: int
    after: int
    nowhere: int
    saved: int
    strangers: int
    deliveries: Deliveries

    @property
    def arrived(self) -> int:
        return sum(host.arrived for host in self.hosts)

    @property
    def queued(self) -> int:
        """That have reached a host's queue."""
        return sum(host.arrived - host.refused - host.full for host in self.hosts)

    @property
    def destroyed(self) -> int:
        return sum(host.destroyed for host in self.hosts)

    @property
    def in_hands(self) -> int:
        return sum(host.in_hands for host in self.hosts)

    @property
    def before(self) -> int:
        """Duplicates before their removal: records delivered that had been delivered already."""
        return self.deliveries.records - self.kept


class Moves(NamedTuple):
    """How exporters moved. unseen : how often one was at no host between two changes. spread : the most that were at
    more than one though no route was changed.
    """

    steps: Sequence[Step]
    unseen: int
    spread: int


def identities(rows: Rows) -> NDArray[np.int64]:
    """Of each record one number, (n,)."""
    identity: NDArray[np.int64] = rows["sender"].astype(np.int64) << 32 | rows["number"]
    return identity


def at_host(
    number: int, arrived: int, counters: Mapping[str, int], acknowledged: int, *, killed: bool, deaths: int
) -> AtHost:  # fmt: skip
    """Of what its link and UDP have counted, in datagrams, and the records that it has acknowledged.

    Drops for want of room are in InErrors, and there is no other error here: no filter, no checksum (net/ipv4/udp.c,
    __udp_queue_rcv_skb).
    """
    return AtHost(
        number, killed, deaths, RECORDS * arrived, RECORDS * counters["NoPorts"], RECORDS * counters["InErrors"],
        RECORDS * counters["InDatagrams"], acknowledged,
    )  # fmt: skip


def deliveries(rows: Rows, removed: int) -> Deliveries:
    """Of rows of DELIVERED, as both consumers have written them."""
    first = rows["times"] == 1
    messages = len(np.unique(rows["sequence"]))
    return Deliveries(
        messages,
        len(rows) - messages,
        int(rows["records"].sum()),
        int(rows["known"][first].sum()),
        removed,
        int(rows["astray"].sum()),
    )


def judged(
    exporters: int, datagrams: int, hosts: Sequence[AtHost], acknowledged: Sequence[Rows], kept: Rows,
    delivered: Deliveries,
) -> Account:  # fmt: skip
    """The account of so many datagrams of so many exporters. acknowledged : by each host; kept : by all consumers."""
    ours, theirs = identities(np.concatenate(acknowledged)), identities(kept)
    promised, there = np.unique(ours), np.unique(theirs)
    most = sent_by_each(exporters, datagrams)
    known = kept["sender"] < exporters
    strangers = len(kept) - int(np.count_nonzero(kept["number"][known] < most[kept["sender"][known]]))
    both = len(np.intersect1d(promised, there, assume_unique=True))
    return Account(
        RECORDS * datagrams, hosts, len(ours), len(ours) - len(promised), len(there), len(theirs) - len(there),
        len(promised) - both, len(there) - both, strangers, delivered,
    )  # fmt: skip


def faults(account: Account, batch: int) -> list[str]:
    """What is not as it must be, in words. batch : datagrams that a worker has in its hands at most."""
    found = {
        f"{account.nowhere:,} records were acknowledged and are at no consumer": account.nowhere,
        f"{account.after:,} duplicates are left after their removal": account.after,
        f"{account.twice:,} records were acknowledged twice": account.twice,
        f"{account.strangers:,} records are at a consumer that nobody has sent": account.strangers,
        f"{account.saved:,} records were saved of {account.in_hands:,} in hands": account.saved > account.in_hands,
        f"{account.arrived:,} records arrived of {account.sent:,} sent": account.arrived > account.sent,
        f"{account.deliveries.astray:,} records came in another shard than their exporter's": account.deliveries.astray,
        "nothing is at a consumer": not account.kept,
    }
    for host in account.hosts:
        name, most = f"host {host.number}", batch * RECORDS * host.deaths
        found |= {
            f"{name}: {host.destroyed:,} records were lost with a queue, though it was never killed":
                host.destroyed != 0 and not host.killed,
            f"{name}: {host.taken:,} records were taken out of queues, more than came": host.destroyed < 0,
            f"{name}: {host.in_hands:,} records in the hands of {host.deaths} dead workers, {most:,} at most":
                not 0 <= host.in_hands <= most,
        }  # fmt: skip
    return [words for words, wrong in found.items() if wrong]


def moves(
    acknowledged: Sequence[Rows], exporters: int, phases: int, changes: Sequence[tuple[str, int, int]]
) -> Moves:  # fmt: skip
    """By what each host has acknowledged, and when. changes : what, and how many hosts there were before and after."""
    rows = np.concatenate(acknowledged)
    by = np.concatenate([np.full(len(found), number) for number, found in enumerate(acknowledged)]).astype(np.int64)
    owners = survive_account.owners(rows, by, exporters, phases)
    unseen = sum(int(np.count_nonzero(owner < 0)) for owner in owners)
    return Moves(survive_account.steps(changes, owners), unseen, max(_spread(rows, by, owners), default=0))


def _spread(rows: Rows, by: NDArray[np.int64], owners: Sequence[Owners]) -> list[int]:
    """In each even phase: how many exporters were at more than one host."""
    found = []
    for half, owner in enumerate(owners):
        chosen = rows["phase"] == 2 * half
        sender = rows["sender"][chosen]
        found.append(len(np.unique(sender[by[chosen] != owner[sender]])))
    return found
