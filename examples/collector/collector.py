"""A flow collector: what exporters send, counted and written to Parquet files; it outlives the deaths of its workers.

    export FLOWS_FOLDER=/var/lib/flows FLOWS_EVERY=60
    fastrecv run -b 0.0.0.0:2055 -w 4 --user nobody collector:Collector

NetFlow v5, v9 and IPFIX. Every FLOWS_EVERY seconds (default 60), and when it stops, each worker writes what it has
counted since into a new file in FLOWS_FOLDER: a row for every exporter, with the columns of SCHEMA. A file is there
whole or not at all. Templates, and counts that are not written yet, go from worker to worker: after a kill the last
file may be written again, under its name, with the same counts and what has come since.

Needs pyarrow, and what `fastrecv run` needs (fastrecv[cli]).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from flows import Exporter, key

from fastrecv import Batch

__all__ = ["SCHEMA", "Collector"]

SCHEMA = pa.schema([
    ("since", pa.timestamp("us", "UTC")), ("until", pa.timestamp("us", "UTC")),
    ("exporter", pa.string()), ("version", pa.uint16()), ("source", pa.uint32()),
    *((name, pa.uint64())
      for name in ("datagrams", "flows", "octets", "packets", "lost", "unknown", "malformed")),
])  # fmt: skip
"""Columns. source : engine type and id of v5, source id of v9, observation domain of IPFIX. Counts: flows.Exporter."""

MOST = 10_000  # exporters of a worker, since senders are easily forged; all further ones are counted as one, "::"
FORGOTTEN = 3600.0  # seconds of silence until an exporter's templates go
Key = tuple[bytes, int, int]
OTHERS: Key = (bytes(16), 0, 0)


class State(msgspec.Struct):
    """What the next worker is to know. exporters : each an encoded Exporter."""

    series: str
    number: int
    since: float
    exporters: list[msgspec.Raw]


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) <= 86400:
            return seconds
    raise ValueError(f"FLOWS_EVERY is {text!r}: give seconds, more than 0, at most 86400")


class Collector:
    """Of one worker, and of those who come after it."""

    def __init__(self) -> None:
        folder = os.environ.get("FLOWS_FOLDER", "")
        if not (folder and Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise ValueError(f"FLOWS_FOLDER is {folder!r}: set it to a folder that user {os.geteuid()} may write to")
        self._folder, self._every = Path(folder), _seconds(os.environ.get("FLOWS_EVERY", "60"))
        self._series, self._number = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}", 0
        self._since = time.time()
        self._exporters: dict[Key, Exporter] = {}
        self._encoded: dict[Key, msgspec.Raw] = {}
        self._changed = False

    async def start(self) -> None:
        self._writing = asyncio.create_task(self._write_again_and_again())

    def handle(self, batch: Batch) -> None:
        assert batch.sources is not None  # a UDP socket has them
        addresses, now = batch.sources["address"].tobytes(), time.time()
        heard: dict[Key, Exporter] = {}
        for row in range(len(batch)):
            datagram = batch[row]
            one: Key = (addresses[16 * row : 16 * row + 16], *key(datagram))
            exporter = heard.get(one) or heard.setdefault(*self._exporter(one))
            exporter.take(datagram)
        for one, exporter in heard.items():
            exporter.heard = now
            self._encode(one, exporter)

    def _exporter(self, one: Key) -> tuple[Key, Exporter]:
        if one not in self._exporters and len(self._exporters) >= MOST:
            one = OTHERS
        return one, self._exporters.setdefault(one, Exporter(*one))

    def _encode(self, one: Key, exporter: Exporter) -> None:
        """A snapshot is taken after every batch, so only those are encoded of whom something has come."""
        self._encoded[one] = msgspec.Raw(msgspec.msgpack.encode(exporter))
        self._changed = True

    def snapshot(self) -> bytes | None:
        if not self._changed:
            return None
        self._changed = False
        return msgspec.msgpack.encode(State(self._series, self._number, self._since, list(self._encoded.values())))

    def restore(self, data: bytes) -> None:
        state = msgspec.msgpack.decode(data, type=State)
        exporters = [msgspec.msgpack.decode(raw, type=Exporter) for raw in state.exporters]
        self._series, self._number, self._since = state.series, state.number, state.since
        for exporter in exporters:
            one: Key = (exporter.address, exporter.version, exporter.source)
            self._exporters[one] = exporter
            self._encode(one, exporter)

    async def stop(self) -> None:
        self._writing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._writing
        self._write()

    # What is written

    async def _write_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            try:
                self._write()
            except OSError as error:  # a full disk will have room again: what was counted stays until then
                logging.getLogger("collector").error("nothing can be written to %s: %s", self._folder, error)

    def _write(self) -> None:
        """Write what was counted since the last time, and begin anew."""
        now = time.time()
        rows = [self._row(exporter, now) for exporter in self._exporters.values() if exporter.datagrams]
        if rows:
            path = self._folder / f"{self._series}-{self._number:06}.parquet"
            beside = path.with_suffix(".part")
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA), beside)
            beside.replace(path)
            self._number += 1
        self._since = now
        for one, exporter in list(self._exporters.items()):
            if exporter.heard < now - FORGOTTEN:
                del self._exporters[one], self._encoded[one]
            elif exporter.datagrams:
                exporter.clear()
                self._encode(one, exporter)

    def _row(self, exporter: Exporter, now: float) -> dict[str, Any]:
        address = IPv6Address(exporter.address)
        return msgspec.structs.asdict(exporter) | {
            "exporter": str(address.ipv4_mapped or address),
            "since": int(1e6 * self._since), "until": int(1e6 * now),
        }  # fmt: skip
