"""Shards: whose each row is, by the hash that the balancer goes by, so that every host gives a sender the same one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastrecv._recv import Batch
from fastrecv.policies import BUCKETS, Policy
from fastrecv.sinks.records import record_batch

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Shards", "parted"]

_KEYS = ("source", "source+port", "flow", "destination")
_WORD = np.dtype(">u8")
_MAPPED = 0xFFFF  # bits 32 to 47 of an IPv4 address as IPv6 (RFC 4291, 2.5.5.2)


class Shards:
    """The shard of each row: the balancer's bucket of its sender, modulo `count`.

    policy : one by addresses and ports (source, source+port, flow, destination, source/24/64), with a seed: hosts that
    have the same policy, seed and count agree, however routers spread the senders. count : a power of two up to 4096;
    with 4096 a shard is a bucket. A batch of few datagrams makes up to as many messages as it has shards, so
    take a small multiple of the consumers that there will ever be.

    ValueError for a policy that has no seed or goes by something else, or a count that is none of these.
    """

    def __init__(self, policy: Policy, count: int = BUCKETS) -> None:
        if policy.key not in _KEYS:
            raise ValueError(f"policy {policy}: shards go by {', '.join(_KEYS)}")
        if policy.seed is None:
            raise ValueError("the policy has no seed: give the same one on every host")
        if not 1 <= count <= BUCKETS or count & count - 1:
            raise ValueError(f"{count} shards: give a power of two up to {BUCKETS}")
        self.policy, self.count = policy, count

    def of(self, data: Batch | pa.RecordBatch) -> NDArray[np.int64]:
        """The shard of each row, shape (rows,).

        data : a batch, or a record batch with the columns of one (record_batch), that has what the policy goes by.
        ValueError where it has not.
        """
        assert self.policy.seed is not None
        words: list[NDArray[np.uint64]] = []
        ports = np.zeros(len(data), np.uint64)
        if self.policy.key != "destination":
            words += self._masked(*_addresses(data, "source"))
        if self.policy.key in ("destination", "flow"):
            words += _addresses(data, "destination")
        if self.policy.key in ("source+port", "flow"):
            ports |= _ports(data, "source") << np.uint64(32)
        if self.policy.key == "flow":
            ports |= _ports(data, "destination")
        if self.policy.key in ("source+port", "flow"):
            words.append(ports)
        hashes = np.full(len(data), self.policy.seed, np.uint64)
        for word in words:
            hashes = (hashes ^ word) * np.uint64(0x9E3779B97F4A7C15)
            hashes ^= hashes >> np.uint64(32)
        hashes *= np.uint64(0xBF58476D1CE4E5B9)
        hashes ^= hashes >> np.uint64(32)
        return (hashes % np.uint64(self.count)).astype(np.int64)

    def split(self, data: Batch | pa.RecordBatch) -> list[tuple[int, pa.RecordBatch]]:
        """A record batch for each shard that has rows, in their order; shards ascending."""
        return parted(record_batch(data), self.of(data))

    def _masked(self, high: NDArray[np.uint64], low: NDArray[np.uint64]) -> list[NDArray[np.uint64]]:
        """What counts of source addresses, as Policy.masked."""
        four = (high == 0) & (low >> np.uint64(32) == _MAPPED)
        mask4, mask6 = _MAPPED << 32 | self.policy.mask4, self.policy.mask6
        return [
            high & np.uint64(mask6 >> 64),
            low & np.where(four, np.uint64(mask4), np.uint64(mask6 & (1 << 64) - 1)),
        ]


def parted(record: pa.RecordBatch, shards: NDArray[np.int64]) -> list[tuple[int, pa.RecordBatch]]:
    """A record batch for each shard, as Shards.split gives them. shards : of each row, shape (rows,)."""
    order = np.argsort(shards, kind="stable")
    found, starts = np.unique(shards[order], return_index=True)
    if len(found) == 1:
        return [(int(found[0]), record)]
    in_order, lengths = record.take(order), np.diff(starts, append=len(order))
    return [
        (shard, in_order.slice(start, length))
        for shard, start, length in zip(found.tolist(), starts.tolist(), lengths.tolist(), strict=True)
    ]


def _addresses(data: Batch | pa.RecordBatch, end: str) -> list[NDArray[np.uint64]]:
    """Upper and lower halves of the addresses of one end."""
    if isinstance(data, Batch):
        packed = _endpoints(data, end)["address"]
    else:
        column = _column(data, f"{end}_address")
        packed = np.frombuffer(column.buffers()[1], np.uint8)[16 * column.offset : 16 * (column.offset + len(column))]
    halves = np.ascontiguousarray(packed).reshape(-1, 16).view(_WORD).astype(np.uint64)
    return [halves[:, 0], halves[:, 1]]


def _ports(data: Batch | pa.RecordBatch, end: str) -> NDArray[np.uint64]:
    ports = _endpoints(data, end)["port"] if isinstance(data, Batch) else _column(data, f"{end}_port").to_numpy()
    return np.asarray(ports).astype(np.uint64)


def _endpoints(batch: Batch, end: str) -> NDArray[Any]:
    found = batch.sources if end == "source" else batch.destinations
    if found is None:
        raise ValueError(f"the batch has no {end}s: ask its Receiver for them")
    return found


def _column(record: pa.RecordBatch, name: str) -> Any:
    if name not in record.schema.names:
        raise ValueError(f"the record batch has no column {name}: split it before that is left out")
    return record.column(name)
