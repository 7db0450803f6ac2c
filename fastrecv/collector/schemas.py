"""Schemas: which columns the records of a template make, and what was gathered in them as Arrow.

Templates that differ in the order of their fields, or in the lengths of their numbers, make the same schema: columns
are in the order of the elements' numbers, of IANA's first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fastrecv._flow import KINDS, META, STEP, Columns, distinct, ipv4, ipv6, mac
from fastrecv.collector.elements import META_COLUMNS, PADDING, VARIABLE, Field, Shape, named, natural, shape

__all__ = ["Layout", "Schema", "finished", "key_field", "planned", "texts"]

_TYPES: dict[str, pa.DataType] = {
    **{f"{sign}int{bits}": getattr(pa, f"{sign}int{bits}")() for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "float32": pa.float32(), "float64": pa.float64(), "binary": pa.binary(), "string": pa.binary(),
    "binary6": pa.binary(6), "binary16": pa.binary(16),
    **{name: pa.timestamp(unit, "UTC")
       for name, unit in (("seconds", "s"), ("millis", "ms"), ("micros", "us"), ("nanos", "ns"))},
}  # fmt: skip
_META_TYPES = dict(zip(META_COLUMNS, (pa.int32(), pa.uint32(), pa.uint8(), _TYPES["millis"]), strict=True))
_META_WIDTHS = (4, 4, 1, 8)
assert len(META_COLUMNS) == META
_TOTALS = {"octetDeltaCount": 1, "packetDeltaCount": 2}  # columns.pxd, Total
_ADDRESSES = {"ipv4Address": ipv4, "ipv6Address": ipv6, "macAddress": mac}
_ABSTRACT = b"abstract"


class Layout(NamedTuple):
    """What fastrecv._flow.Walk is to do with records: how (STEP), how long they are at least, and all of them or 0."""

    steps: NDArray[np.void]
    shortest: int
    length: int


class Schema:
    """arrow : its fields, with IANA's abstract type as metadata. columns : where its rows are gathered."""

    def __init__(self, shapes: Iterable[Shape]) -> None:
        shapes = list(shapes)
        self.arrow = pa.schema([
            *map(key_field, META_COLUMNS),
            *(pa.field(one.name, _TYPES[one.arrow], metadata={_ABSTRACT: one.abstract}) for one in shapes),
        ])  # fmt: skip
        self.columns = Columns([*_META_WIDTHS, *(one.width for one in shapes)])

    def take(self) -> pa.RecordBatch:
        """The rows that were gathered, at least one; nothing is copied. Addresses are numbers and bytes still."""
        rows, taken = self.columns.take()
        return pa.RecordBatch.from_arrays(
            [_array(field.type, rows, memory) for field, memory in zip(self.arrow, taken, strict=True)],
            schema=self.arrow,
        )


def key_field(name: str) -> pa.Field:
    """The raw field of a column that every schema has, or of an element of IANA's."""
    if name in META_COLUMNS:
        return pa.field(name, _META_TYPES[name], metadata={_ABSTRACT: name})
    abstract = named()[name]
    return pa.field(name, _TYPES[natural(abstract)], metadata={_ABSTRACT: abstract})


def planned(fields: tuple[Field, ...], relative: bool) -> tuple[tuple[Shape, ...], Layout]:
    """The columns that the records of these fields make, named so that no two are alike, and how they are put there."""
    wanted = [
        (field, place) for place, field in enumerate(fields)
        if field.length and (field.enterprise, field.number) != (0, PADDING)
    ]  # fmt: skip
    wanted.sort(key=lambda one: (one[0].enterprise, one[0].number, one[1]))
    names, columns = Counter(META_COLUMNS), dict[int, int]()
    shapes: list[Shape] = []
    for field, place in wanted:
        one = shape(field, relative)
        names[one.name] += 1
        columns[place] = META + len(shapes)
        shapes.append(one if names[one.name] == 1 else one._replace(name=f"{one.name}.{names[one.name]}"))
    steps, offset = np.zeros(len(fields), STEP), 0
    for place, field in enumerate(fields):
        column = columns.get(place, -1)
        kind, total = KINDS["variable"], 0
        if column >= 0:
            one = shapes[column - META]
            kind, total = one.kind, _TOTALS.get(one.name, 0)
        steps[place] = (offset, field.length, kind, total, column)
        offset += field.length
    varies = any(field.length == VARIABLE for field in fields)
    shortest = sum(1 if field.length == VARIABLE else field.length for field in fields)
    return tuple(shapes), Layout(steps, shortest, 0 if varies else shortest)


def texts(addresses: NDArray[np.uint8]) -> pa.Array:
    """Addresses of 16 bytes as text."""
    return _texts(ipv6, addresses)


def finished(raw: pa.RecordBatch, exporters: pa.Array) -> pa.RecordBatch:
    """Rows as they leave: addresses as text, dictionary-encoded; strings of UTF-8; numbers that are numbers.

    exporters : the texts of all, by number.
    """
    columns = [_finished(field, column, exporters) for field, column in zip(raw.schema, raw.columns, strict=True)]
    return pa.RecordBatch.from_arrays(columns, names=raw.schema.names)


def _array(kind: pa.DataType, rows: int, memory: Any) -> pa.Array:
    buffers = [pa.py_buffer(one) for one in (memory if isinstance(memory, tuple) else (memory,))]
    return pa.Array.from_buffers(kind, rows, [None, *buffers], null_count=0)


def _finished(field: pa.Field, column: pa.Array, exporters: pa.Array) -> pa.Array:
    abstract = (field.metadata or {}).get(_ABSTRACT, b"").decode()
    if abstract == "exporterAddress":
        if len(column) < len(exporters):  # few rows are not to take the addresses of all along
            few = column.dictionary_encode()
            column, exporters = few.indices, exporters.take(few.dictionary)
        return pa.DictionaryArray.from_arrays(column, exporters)
    if abstract in _ADDRESSES:
        return _addresses(abstract, column)
    if abstract == "boolean":  # 1 and 2: RFC 7011, 6.1.5
        return pc.if_else(pc.less_equal(pc.subtract(column, 1), 1), pc.equal(column, 1), None)
    if abstract == "string":
        return _readable(column)
    if pa.types.is_floating(field.type):
        return pc.if_else(pc.is_finite(column), column, None)
    return column


def _addresses(abstract: str, column: pa.Array) -> pa.Array:
    """Few texts for many rows: each address is written once."""
    if abstract == "ipv4Address" and not column.null_count:
        places, found = distinct(np.frombuffer(column.buffers()[1], "u4")[column.offset :][: len(column)])
        indices = pa.Array.from_buffers(pa.int32(), len(column), [None, pa.py_buffer(places)], null_count=0)
        return pa.DictionaryArray.from_arrays(indices, _texts(ipv4, found), safe=False)
    encoded = column.dictionary_encode()
    width = column.type.bit_width // 8
    packed = np.frombuffer(encoded.dictionary.buffers()[1], "u1", width * len(encoded.dictionary))
    text = (
        _texts(ipv4, packed.view("u4"))
        if abstract == "ipv4Address"
        else _texts(_ADDRESSES[abstract], packed.reshape(-1, width))
    )
    return pa.DictionaryArray.from_arrays(encoded.indices, text, safe=False)


def _texts(write: Any, addresses: NDArray[Any]) -> pa.Array:
    offsets, characters = write(addresses)
    return pa.Array.from_buffers(
        pa.string(), len(addresses), [None, pa.py_buffer(offsets), pa.py_buffer(characters)], null_count=0
    )


def _readable(column: pa.Array) -> pa.Array:
    """Text without the zeros that fill a field of fixed length up, and valid: whoever sends may send anything."""
    try:
        column = column.cast(pa.string())
    except pa.ArrowInvalid:
        column = pa.array(
            [value.decode("utf-8", "replace") if value is not None else None for value in column.to_pylist()],
            pa.string(),
        )
    return pc.utf8_rtrim(column, "\0")
