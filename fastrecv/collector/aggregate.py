"""Aggregation: flows with the same keys become one row of each window of time.

Windows are of the time when flows were received, so that what is held is bounded by what comes, whatever exporters say
of their clocks. They begin at multiples of their length since the epoch, and are the same for all workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
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
        self.keys, self._length = checked(keys), max(round(1000 * window), 1)
        self._schema = pa.schema([
            *(key_field(key) for key in self.keys), *(pa.field(name, pa.uint64()) for name in (*SUMS, COUNT))
        ])  # fmt: skip
        self._windows: dict[int, list[pa.Table]] = {}  # by their beginning, ms since the epoch: one, around its end two

    def add(self, raw: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """Take rows as they were gathered (Decoder.flush); what leaves early, raw, for want of room."""
        times = raw.column(raw.schema.get_field_index("collectionTimeMilliseconds")).cast(pa.int64()).to_numpy()
        starts = times - times % self._length
        found = np.unique(starts).tolist()
        for start in found:
            part = raw if len(found) == 1 else raw.filter(pa.array(starts == start))
            yield from self._add(start, part)

    def close(self, now: float | None = None) -> Iterator[pa.RecordBatch]:
        """The rows, raw, of each window that is over. now : seconds since the epoch; None: all are."""
        for start in sorted(self._windows):
            if now is None or start + self._length <= 1000 * now:
                yield self._leaving(start)

    def _add(self, start: int, raw: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        parts = self._windows.setdefault(start, [])
        parts.append(self._grouped(pa.Table.from_batches([self._columns(raw)])))
        if sum(len(part) for part in parts[1:]) > max(len(parts[0]), _MERGE):
            parts[:] = [self._grouped(pa.concat_tables(parts))]
            if len(parts[0]) > MOST_GROUPS:
                yield self._leaving(start)

    def _leaving(self, start: int) -> pa.RecordBatch:
        bounds = [pa.scalar(moment, pa.timestamp("ms", "UTC")) for moment in (start, start + self._length)]
        rows = self._grouped(pa.concat_tables(self._windows.pop(start))).combine_chunks()
        columns = [pa.repeat(bound, len(rows)) for bound in bounds] + [column.chunk(0) for column in rows.columns]
        fields = [pa.field(name, bounds[0].type) for name in BOUNDS]
        return pa.RecordBatch.from_arrays(columns, schema=pa.schema([*fields, *self._schema]))

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
