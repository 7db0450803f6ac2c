"""Union: the one schema of all that leaves, which grows as exporters bring new elements.

A file has one schema, and exporters send several templates by turns: rows get nulls for what their template has not, so
that a new file is begun only where there is a column that was not seen for long. Anybody can forge templates: columns
that no row has had for an hour go again, as exporters do.
"""

from __future__ import annotations

import logging
import time

import pyarrow as pa

from fastrecv.collector.elements import META_COLUMNS, named

__all__ = ["FORGOTTEN", "MOST_UNNAMED", "Union"]

_LOG = logging.getLogger("fastrecv.collector")
MOST_UNNAMED = 256
"""Columns whose names are not IANA's, at most: anybody can make them up. Further ones are left out."""
FORGOTTEN = 3600.0
"""Seconds without a row that has it, until a column goes."""


class Union:
    """schema : as it has grown. left_out : columns that there was no room for."""

    def __init__(self) -> None:
        self.schema = pa.schema([])
        self.left_out = 0
        self._places: dict[str, int] = {}
        self._heard: dict[str, float] = {}  # when somebody had the column
        self._unnamed = 0

    def joined(self, *records: pa.RecordBatch) -> pa.RecordBatch:
        """The rows of all of them as one, in the schema of all."""
        now = time.monotonic()
        for record in records:
            self._heard.update((name, now) for name in record.schema.names if name in self._places)
        self._forget(now - FORGOTTEN)
        for record in records:
            self._grow(record.schema, now)
        fitted = [self._fitted(record) for record in records]
        return fitted[0] if len(fitted) == 1 else pa.Table.from_batches(fitted).combine_chunks().to_batches()[0]

    def _fitted(self, record: pa.RecordBatch) -> pa.RecordBatch:
        if record.schema == self.schema:
            return record
        columns: list[pa.Array | None] = [None] * len(self.schema)
        for field, column in zip(record.schema, record.columns, strict=True):
            place = self._places.get(field.name)
            if place is not None:
                columns[place] = column.cast(self.schema.field(place).type)
        return pa.RecordBatch.from_arrays(
            [
                pa.nulls(len(record), field.type) if column is None else column
                for field, column in zip(self.schema, columns, strict=True)
            ],
            schema=self.schema,
        )

    def _grow(self, schema: pa.Schema, now: float) -> None:
        if schema == self.schema:
            return
        fields = list(self.schema)
        for field in schema:
            place = self._places.get(field.name)
            if place is not None:
                if field.type != fields[place].type and _wider(field.type, fields[place].type):
                    fields[place] = field
                continue
            if _made_up(field.name):
                if self._unnamed >= MOST_UNNAMED:
                    if not self.left_out:
                        _LOG.warning(
                            "%d columns have names that are not IANA's: further ones are left out", MOST_UNNAMED
                        )
                    self.left_out += 1
                    continue
                self._unnamed += 1
            self._places[field.name], self._heard[field.name] = len(fields), now
            fields.append(field)
        self.schema = pa.schema(fields)

    def _forget(self, since: float) -> None:
        """Leave out what no row has had since then."""
        stay = [field for field in self.schema if self._heard[field.name] >= since]
        if len(stay) == len(self.schema):
            return
        self.schema = pa.schema(stay)
        self._places = {field.name: place for place, field in enumerate(stay)}
        self._heard = {name: self._heard[name] for name in self._places}
        self._unnamed = sum(map(_made_up, self._places))


def _made_up(name: str) -> bool:
    return name not in named() and name not in META_COLUMNS


def _wider(one: pa.DataType, other: pa.DataType) -> bool:
    """Of two types of the same element, which differ in the width of numbers alone."""
    return bool(one.bit_width > other.bit_width)
