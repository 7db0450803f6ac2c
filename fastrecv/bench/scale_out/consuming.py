"""A consumer, as a process: it takes the messages of its shards, keeps each record once, then acknowledges.

    python -m fastrecv.bench.scale_out.consuming FOLDER SHARD...

What it keeps is a file of rows, and what it has kept it knows again when it is started again: a message that comes once
more, because nobody had acknowledged it, or because it was published twice, adds no record that is there. A second file
says what was delivered.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Sequence
from ipaddress import IPv4Address
from pathlib import Path

import nats
import nats.errors
import numpy as np
import pyarrow as pa
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from numpy.typing import NDArray

from fastrecv.bench.numbered import NUMBERED
from fastrecv.bench.scale_out.addresses import EXPORTERS, SERVERS, SHARDS, STREAM, durable
from fastrecv.collector.settings import SHARDING
from fastrecv.policies import Sender
from fastrecv.privileges import tell_parents_death

__all__ = ["DELIVERED", "DELIVERIES", "KEPT", "Ledger", "records_of", "shard_of"]

KEPT, DELIVERIES = "kept.rows", "deliveries"
DELIVERED = np.dtype([("sequence", "<u8"), ("times", "<u4"), ("records", "<u4"), ("known", "<u4"), ("astray", "<u4")])
"""A message that was delivered: its number in the stream, for which time, its records, those of them that were kept
already, and those whose exporter has another shard."""
_FIRST = int(IPv4Address(EXPORTERS))
_FETCHED = 64  # messages at a time
_PATIENCE = 1.0  # seconds without a message until it asks again
_AGAIN = 0.2  # seconds after an error


class Ledger:
    """The records that are kept, in a folder; what a predecessor has kept there is known.

    Written is first that something was delivered, then what of it is new; only then may it be acknowledged.
    """

    def __init__(self, folder: Path) -> None:
        self._kept, self._deliveries = (_opened(folder / name, size) for name, size in (
            (KEPT, NUMBERED.itemsize), (DELIVERIES, DELIVERED.itemsize)))  # fmt: skip
        self._known: NDArray[np.bool_] = np.zeros((1, 1), np.bool_)  # by exporter and number
        self._learn(np.fromfile(folder / KEPT, NUMBERED))

    def take(self, rows: NDArray[np.void], shard: int, sequence: int, times: int) -> None:
        """Keep what of a message's records is new; it came as this shard's."""
        self._grow(rows)
        new = rows[~self._known[rows["sender"], rows["number"]]]
        astray = sum(shard_of(exporter) != shard for exporter in rows["sender"].tolist())
        delivered = np.array([(sequence, times, len(rows), len(rows) - len(new), astray)], DELIVERED)
        os.write(self._deliveries, delivered.tobytes())
        os.write(self._kept, new.tobytes())
        self._learn(new)

    def _learn(self, rows: NDArray[np.void]) -> None:
        self._grow(rows)
        self._known[rows["sender"], rows["number"]] = True

    def _grow(self, rows: NDArray[np.void]) -> None:
        """Make room for them: what there was, doubled, as often as it takes."""
        if not len(rows):
            return
        needed = [int(rows[name].max()) + 1 for name in ("sender", "number")]
        shape = [max(have, 1 << (need - 1).bit_length()) for have, need in zip(self._known.shape, needed, strict=True)]
        if shape != list(self._known.shape):
            known = np.zeros(shape, np.bool_)
            known[: self._known.shape[0], : self._known.shape[1]] = self._known
            self._known = known

    def close(self) -> None:
        os.close(self._kept)
        os.close(self._deliveries)


def _opened(path: Path, size: int) -> int:
    """To append to, without the piece of a row at its end that a SIGKILL may have left."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.ftruncate(fd, os.fstat(fd).st_size // size * size)
    return fd


def records_of(message: bytes) -> NDArray[np.void]:
    """The records of a message, an Arrow stream of the collector's. ValueError: one is not his who has sent it."""
    with pa.ipc.open_stream(message) as stream:
        table = stream.read_all()
    rows = np.empty(len(table), NUMBERED)
    rows["sender"], sources = (
        np.concatenate([np.zeros(0, np.int64), *map(_senders, table.column(name).chunks)])
        for name in ("exporterAddress", "sourceIPv4Address")
    )
    if (rows["sender"] != sources).any():
        raise ValueError("a record is of another exporter than it says")
    rows["number"], rows["phase"] = (table.column(name).to_numpy() for name in ("octetDeltaCount", "ingressInterface"))
    return rows


def _senders(column: pa.DictionaryArray) -> NDArray[np.int64]:
    """The exporters with these addresses."""
    known = [int(IPv4Address(address)) - _FIRST for address in column.dictionary.to_pylist()]
    found: NDArray[np.int64] = np.array(known, np.int64)[column.indices.to_numpy()]
    return found


@functools.cache
def shard_of(exporter: int) -> int:
    """By the hash of the balancer's program, as it stands in Python: hosts find it with numpy."""
    nobody = IPv4Address(0)
    bucket = SHARDING.bucket(Sender(IPv4Address(_FIRST + exporter), 0, nobody, 0))
    assert bucket is not None
    return bucket % SHARDS


async def _consume(stream: JetStreamContext, shard: int, ledger: Ledger) -> None:
    """Take a shard's messages for ever, whatever becomes of the engine's nodes."""
    while True:
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            subscription = await stream.pull_subscribe_bind(durable(shard), STREAM)
            while True:
                for message in await _fetched(subscription):
                    _keep(message, ledger)
                    await message.ack()
        await asyncio.sleep(_AGAIN)


async def _fetched(subscription: JetStreamContext.PullSubscription) -> list[Msg]:
    try:
        return await subscription.fetch(_FETCHED, _PATIENCE)
    except nats.errors.TimeoutError:
        return []


def _keep(message: Msg, ledger: Ledger) -> None:
    about, shard = message.metadata, int(message.subject.rpartition(".")[2])
    ledger.take(records_of(message.data), shard, about.sequence.stream, about.num_delivered)


async def _run(folder: Path, shards: Sequence[int]) -> None:
    async def quiet(_error: Exception) -> None:
        """The client connects again, and fetching begins again."""

    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    with contextlib.closing(Ledger(folder)) as ledger:
        client = await nats.connect(
            SERVERS, max_reconnect_attempts=-1, reconnect_time_wait=_AGAIN, connect_timeout=1, error_cb=quiet,
        )  # fmt: skip
        tasks = [asyncio.create_task(_consume(client.jetstream(), shard, ledger)) for shard in shards]
        stopping = asyncio.create_task(ended.wait())
        done, _ = await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
        await _end(client, tasks)
        for task in done - {stopping}:
            task.result()  # what has gone wrong


async def _end(client: Client, tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()


if __name__ == "__main__":
    tell_parents_death(signal.SIGKILL)
    asyncio.run(_run(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]]))
