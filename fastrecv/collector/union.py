"""Union: the one schema of all that leaves, which grows as exporters bring new elements.

A file has one schema, and exporters send several templates by turns: rows get nulls for what their template has not, so
that a new file is begun only where there is a column that was never seen before.
"""

from __future__ import annotations

import logging

import pyarrow as pa

from fastrecv.collector.elements import META_COLUMNS, named

__all__ = ["MOST_UNNAMED", "Union"]

_LOG = logging.getLogger("fastrecv.collector")
MOST_UNNAMED = 256
"""Columns whose names are not IANA's, at most: anybody can make them up. Further ones are left out."""


class Union:
    """schema : as it has grown. left_out : columns that there was no room for."""

    def __init__(self) -> None:
        self.schema = pa.schema([])
        self.left_out = 0
        self._places: dict[str, int] = {}
        self._unnamed = 0

    def fit(self, record: pa.RecordBatch) -> pa.RecordBatch:
        """The same rows in the schema of all."""
        if record.schema == self.schema:
            return record
        self._grow(record.schema)
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

    def joined(self, *records: pa.RecordBatch) -> pa.RecordBatch:
        """The rows of all of them as one."""
        for record in records:
            self._grow(record.schema)
        fitted = [self.fit(record) for record in records]
        return fitted[0] if len(fitted) == 1 else pa.Table.from_batches(fitted).combine_chunks().to_batches()[0]

    def _grow(self, schema: pa.Schema) -> None:
        if schema == self.schema:
            return
        fields = list(self.schema)
        for field in schema:
            place = self._places.get(field.name)
            if place is not None:
                if field.type != fields[place].type and _wider(field.type, fields[place].type):
                    fields[place] = field
                continue
            if field.name not in named() and field.name not in META_COLUMNS:
                if self._unnamed >= MOST_UNNAMED:
                    if not self.left_out:
                        _LOG.warning(
                            "%d columns have names that are not IANA's: further ones are left out", MOST_UNNAMED
                        )
                    self.left_out += 1
                    continue
                self._unnamed += 1
            self._places[field.name] = len(fields)
            fields.append(field)
        self.schema = pa.schema(fields)


def _wider(one: pa.DataType, other: pa.DataType) -> bool:
    """Of two types of the same element, which differ in the width of numbers alone."""
    return bool(one.bit_width > other.bit_width)
