"""Batches and rows as Arrow record batches, and as lines of JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any

from fastrecv._recv import Batch
from fastrecv.sinks.interface import Data

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["json_lines", "pyarrow", "record_batch"]

_ADDRESS = "_address"


def pyarrow() -> Any:
    """The module. ModuleNotFoundError that names the extra."""
    try:
        import pyarrow as found  # noqa: PLC0415 - the receive core works without
    except ModuleNotFoundError:
        raise ModuleNotFoundError("pyarrow is not installed: pip install 'fastrecv[sinks]'", name="pyarrow") from None
    return found


def record_batch(data: Data) -> pa.RecordBatch:
    """An Arrow record batch of a batch or rows; one that is given is returned.

    A batch's columns are those of its Arrow export: payload (binary), length, and as far as the receiver was asked for
    them source_address (16 bytes, IPv4 mapped), source_port, destination_address, destination_port, interface,
    timestamp and hardware_timestamp (ns, UTC), tos. They are copies: the batch may be released.
    Rows have the columns that any of them names, in the order in which they appear; Arrow finds the types. TypeError,
    ValueError: values that have no common Arrow type, or data that is none of these.
    """
    pa = pyarrow()
    if isinstance(data, Batch):
        return pa.record_batch(data.arrow(packed=True))
    if isinstance(data, pa.RecordBatch):
        return data
    try:
        names = list(dict.fromkeys(name for row in data for name in row))
        return pa.RecordBatch.from_pydict({name: [row.get(name) for row in data] for name in names})
    except AttributeError:
        raise TypeError(f"{type(data).__name__} is none of Batch, pyarrow.RecordBatch, sequence of mappings") from None
    except pa.ArrowException as error:
        raise ValueError(f"the rows make no Arrow columns: {error}") from None


def json_lines(data: Data) -> bytes:
    """An object a row, each on a line of its own; none for no rows.

    Bytes are base64 (RFC 4648), addresses their text, moments RFC 3339 with all the digits that they have. TypeError,
    ValueError: values that JSON has no form for, NaN among them.
    """
    rows = _rows(data) if isinstance(data, Batch) or hasattr(data, "schema") else map(_row, data)
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain) + "\n" for row in rows).encode()


def _row(row: object) -> Mapping[object, object]:
    if not isinstance(row, Mapping):
        raise TypeError(f"a row is {type(row).__name__}: give a mapping of names to values")
    return dict(row)


def _rows(data: Data) -> Iterator[dict[str, object]]:
    record = record_batch(data)
    columns = [_values(name, record.column(name)) for name in record.schema.names]
    return (dict(zip(record.schema.names, row, strict=True)) for row in zip(*columns, strict=True))


def _values(name: str, column: Any) -> list[object]:
    """A column's values for JSON: nanoseconds are more than datetime has, and would be refused."""
    pa = pyarrow()
    if pa.types.is_timestamp(column.type):
        return [None if text is None else text.replace(" ", "T") for text in column.cast(pa.string()).to_pylist()]
    values: list[object] = column.to_pylist()
    if name.endswith(_ADDRESS) and column.type == pa.binary(16):
        return [value if value is None else _address(value) for value in values]
    return values


def _address(packed: Any) -> str:
    address = IPv6Address(packed)
    return str(address.ipv4_mapped or address)


def _plain(value: object) -> object:
    match value:
        case bytes() | bytearray() | memoryview():
            return base64.b64encode(value).decode()
        case datetime() | date() | time():
            return value.isoformat()
        case IPv4Address() | IPv6Address():
            return str(value)
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        return value.tolist()
    raise TypeError(f"JSON has no form for {type(value).__name__}")
