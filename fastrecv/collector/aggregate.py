"""Aggregation: flows with the same keys become one row of each window of time.

Windows are of the time when flows were received, so that what is held is bounded by what comes, whatever exporters say
of their clocks. They begin at multiples of their length since the epoch, and are the same for all workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from fastrecv.collector.keys import BOUNDS, COUNT, SUMS, checked
from fastrecv.collector.schemas import key_field

__all__ = ["MOST_GROUPS", "Aggregation"]

MOST_GROUPS = 1 << 20
"""Rows of a window at most: when they are more, they leave early, and the window has more than one row of some keys."""
_MERGE = 1 << 16  # partial rows that are worth merging


class Aggregation:
    """keys : of a row, as checked() has them; null where a flow has no such element. window : seconds."""

    def __init__(self, keys: Sequence[str], window: float) -> None:
        self.keys, self.window = checked(keys), window
        self._start: float | None = None
        self._schema = pa.schema([
            *(key_field(key) for key in self.keys), *(pa.field(name, pa.uint64()) for name in (*SUMS, COUNT))
        ])  # fmt: skip
        self._parts: list[pa.Table] = []

    def add(self, raw: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """Take rows as they were gathered (Decoder.flush) in this window; what leaves early, raw, for want of room."""
        if self._start is None:
            first = raw.column(raw.schema.get_field_index("collectionTimeMilliseconds"))[0].value / 1000
            self._start = first - first % self.window
        self._parts.append(self._grouped(pa.Table.from_batches([self._columns(raw)])))
        if sum(len(part) for part in self._parts[1:]) > max(len(self._parts[0]), _MERGE):
            self._parts = [self._grouped(pa.concat_tables(self._parts))]
            if len(self._parts[0]) > MOST_GROUPS:
                yield from self._leaving()

    def close(self) -> Iterator[pa.RecordBatch]:
        """The window is over: its rows, raw."""
        if self._start is not None:
            yield from self._leaving()
            self._start = None

    def _leaving(self) -> Iterator[pa.RecordBatch]:
        assert self._start is not None
        bounds = [
            pa.scalar(int(1000 * moment), pa.timestamp("ms", "UTC"))
            for moment in (self._start, self._start + self.window)
        ]
        parts, self._parts = self._parts, []
        if parts:
            rows = self._grouped(pa.concat_tables(parts)).combine_chunks()
            columns = [pa.repeat(bound, len(rows)) for bound in bounds] + [column.chunk(0) for column in rows.columns]
            fields = [pa.field(name, bounds[0].type) for name in BOUNDS]
            yield pa.RecordBatch.from_arrays(columns, schema=pa.schema([*fields, *self._schema]))

    def _columns(self, raw: pa.RecordBatch) -> pa.RecordBatch:
        """Of these rows the keys, and what is summed up; null where they have no such column."""
        columns = []
        for field in self._schema:
            place = raw.schema.get_field_index(field.name)
            if field.name == COUNT:
                columns.append(pa.repeat(pa.scalar(1, pa.uint64()), len(raw)))
            elif place < 0:
                columns.append(pa.nulls(len(raw), field.type))
            else:
                columns.append(raw.column(place).cast(field.type, safe=False))
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)

    def _grouped(self, table: pa.Table) -> pa.Table:
        sums = (*SUMS, COUNT)
        grouped = table.group_by(list(self.keys), use_threads=False).aggregate([(name, "sum") for name in sums])
        columns = [grouped.column(name) for name in self.keys] + [grouped.column(f"{name}_sum") for name in sums]
        return pa.Table.from_arrays(columns, schema=self._schema)
