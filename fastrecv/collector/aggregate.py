"""Aggregation: flows with the same keys become one row of each window of time.

Windows are of the time when flows were received, so that what is held is bounded by what comes, whatever exporters say
of their clocks. They begin at multiples of their length since the epoch, and are the same for all workers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

import pyarrow as pa

from fastrecv.collector.elements import named
from fastrecv.collector.schemas import META_COLUMNS

__all__ = ["MOST_GROUPS", "SUMS", "Aggregation", "checked"]

SUMS = ("octetDeltaCount", "packetDeltaCount")
"""What is summed up, beside the flows, which are counted: deltaFlowCount."""
MOST_GROUPS = 1 << 20
"""Rows of a window at most: when they are more, they leave early, and the window has more than one row of some keys."""
_COUNT = "deltaFlowCount"
_BOUNDS = ("flowStartMilliseconds", "flowEndMilliseconds")  # of the window, as RFC 7015, 5.1 has it
_TAKEN = {*SUMS, _COUNT, *_BOUNDS, "collectionTimeMilliseconds"}
_MERGE = 1 << 16  # partial rows that are worth merging


def checked(keys: Sequence[str]) -> tuple[str, ...]:
    """The keys, where one may aggregate by them. ValueError."""
    known = (META_COLUMNS.keys() | named().keys()) - _TAKEN
    for key in keys:
        if key not in known:
            if key in _TAKEN:
                raise ValueError(f"{key!r} is no key: it is what the rows of a window are given")
            near = difflib.get_close_matches(key, sorted(known), 1)
            raise ValueError(
                f"{key!r} is no information element{f', did you mean {near[0]!r}?' if near else ''}: give names like "
                "sourceIPv4Address,destinationTransportPort"
            )
    if len(set(keys)) < len(keys):
        raise ValueError("a key is named twice")
    return tuple(keys)


class Aggregation:
    """keys : of a row, as checked() has them; null where a flow has no such element. window : seconds."""

    def __init__(self, keys: Sequence[str], window: float) -> None:
        self.keys, self.window = checked(keys), window
        self._start: float | None = None
        self._partial: dict[pa.Schema, list[pa.Table]] = {}  # by the types of the keys

    def add(self, raw: pa.RecordBatch, now: float) -> Iterator[pa.RecordBatch]:
        """Take rows as they were gathered (Decoder.flush); what has to leave, raw, of windows that are over.

        now : seconds since the epoch, when the rows were received: up to now.
        """
        yield from self.close(now)
        if self._start is None:
            self._start = now - now % self.window
        table = self._grouped(pa.Table.from_batches([self._columns(raw)]))
        parts = self._partial.setdefault(table.schema, [])
        parts.append(table)
        if sum(len(part) for part in parts[1:]) > max(len(parts[0]), _MERGE):
            parts[:] = [self._merged(parts)]
            if len(parts[0]) > MOST_GROUPS:
                yield from self._leaving()

    def close(self, now: float | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of a window that is over; None: of the present one."""
        if self._start is not None and (now is None or now >= self._start + self.window):
            yield from self._leaving()
            self._start = None

    def _leaving(self) -> Iterator[pa.RecordBatch]:
        assert self._start is not None
        bounds = [
            pa.scalar(int(1000 * moment), pa.timestamp("ms", "UTC"))
            for moment in (self._start, self._start + self.window)
        ]
        partial, self._partial = self._partial, {}
        for parts in partial.values():
            rows = self._merged(parts).combine_chunks()
            columns = [pa.repeat(bound, len(rows)) for bound in bounds] + [column.chunk(0) for column in rows.columns]
            fields = [pa.field(name, bounds[0].type) for name in _BOUNDS]
            yield pa.RecordBatch.from_arrays(columns, schema=pa.schema([*fields, *rows.schema]))

    def _columns(self, raw: pa.RecordBatch) -> pa.RecordBatch:
        """Of these rows the keys, and what is summed up; null where they have no such column."""
        fields, columns = [], []
        for name in (*self.keys, *SUMS):
            place = raw.schema.get_field_index(name)
            if place >= 0:
                fields.append(raw.schema.field(place))
                columns.append(raw.column(place))
            else:
                kind = pa.uint64() if name in SUMS else pa.null()
                fields.append(pa.field(name, kind))
                columns.append(pa.nulls(len(raw), kind))
        fields.append(pa.field(_COUNT, pa.uint64()))
        columns.append(pa.repeat(pa.scalar(1, pa.uint64()), len(raw)))
        return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))

    def _grouped(self, table: pa.Table) -> pa.Table:
        sums = (*SUMS, _COUNT)
        grouped = table.group_by(list(self.keys), use_threads=False).aggregate([(name, "sum") for name in sums])
        columns = [grouped.column(name) for name in self.keys] + [grouped.column(f"{name}_sum") for name in sums]
        return pa.Table.from_arrays(columns, schema=table.schema)

    def _merged(self, parts: list[pa.Table]) -> pa.Table:
        return parts[0] if len(parts) == 1 else self._grouped(pa.concat_tables(parts))
