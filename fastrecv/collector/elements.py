"""Information elements: what the fields of records are called, and which type they have.

Names and types are IANA's (elements.csv): NetFlow v9's fields of up to 127 are the same elements (RFC 7012, 4.1). What
is not there is ie<number>, or pen<enterprise>id<number>: bytes, as they come. Elements of the reverse direction (RFC
5103, enterprise 29305) are named after those that they reverse. Nothing here needs pyarrow: commands do without.
"""

from __future__ import annotations

import csv
import functools
from importlib.resources import files
from typing import NamedTuple

from fastrecv._flow import KINDS

__all__ = ["META_COLUMNS", "PADDING", "REVERSE", "VARIABLE", "Field", "Shape", "named", "natural", "shape"]

META_COLUMNS = ("exporterAddress", "observationDomainId", "exportProtocolVersion", "collectionTimeMilliseconds")
"""Columns that every row begins with: who exported it; source id of v9, engine of v5; 5, 9 or 10; when its datagram was
received. IANA's names but for the first: it has one for each family (exporterIPv4Address, exporterIPv6Address)."""
VARIABLE = 65535
"""A length in a template: every record says its own (RFC 7011, 7)."""
PADDING = 210
REVERSE = 29305

_END, _START = 21, 22  # flowEndSysUpTime, flowStartSysUpTime
_ABSOLUTE = {_END: "flowEndMilliseconds", _START: "flowStartMilliseconds"}


class Field(NamedTuple):
    """Of a template. enterprise : its number, 0 for IANA's elements. length : bytes, or VARIABLE."""

    enterprise: int
    number: int
    length: int


class Shape(NamedTuple):
    """How a field becomes a column.

    width : bytes of a value, 0: of any length. arrow : its type, as schemas.py has it. abstract : IANA's type, "" where
    unknown.
    """

    name: str
    kind: int
    width: int
    arrow: str
    abstract: str


class _Type(NamedTuple):
    """lengths : in which a value of it may come (RFC 7011, 6.2: numbers may be shorter)."""

    kind: str
    width: int
    arrow: str
    lengths: range


_WHOLE = {
    f"{sign}{8 * width}": _Type(sign, width, f"{'u' * (sign == 'unsigned')}int{8 * width}", range(1, 9))
    for sign in ("unsigned", "signed")
    for width in (1, 2, 4, 8)
}
_TYPES = _WHOLE | {
    "float32": _Type("float", 4, "float32", range(4, 5)),
    "float64": _Type("float", 8, "float64", range(4, 9, 4)),
    "boolean": _Type("unsigned", 1, "uint8", range(1, 2)),
    "ipv4Address": _Type("unsigned", 4, "uint32", range(4, 5)),
    "ipv6Address": _Type("octets", 16, "binary16", range(16, 17)),
    "macAddress": _Type("octets", 6, "binary6", range(6, 7)),
    "dateTimeSeconds": _Type("unsigned", 8, "seconds", range(4, 5)),
    "dateTimeMilliseconds": _Type("millis", 8, "millis", range(8, 9)),
    "dateTimeMicroseconds": _Type("micros", 8, "micros", range(8, 9)),
    "dateTimeNanoseconds": _Type("nanos", 8, "nanos", range(8, 9)),
    "string": _Type("variable", 0, "string", range(VARIABLE + 1)),
    "octetArray": _Type("variable", 0, "binary", range(VARIABLE + 1)),
}  # fmt: skip


@functools.cache
def _registry() -> dict[int, tuple[str, str]]:
    text = files("fastrecv.collector").joinpath("elements.csv").read_text(encoding="ascii")
    rows = csv.reader(line for line in text.splitlines() if not line.startswith("#"))
    return {int(number): (name, abstract) for number, name, abstract in rows}


@functools.cache
def named() -> dict[str, str]:
    """The abstract type of every element of IANA's, by name."""
    return dict(_registry().values())


def natural(abstract: str) -> str:
    """The type of the columns of an abstract type: Shape.arrow."""
    return _TYPES[abstract].arrow


def shape(field: Field, relative: bool) -> Shape:
    """What a field is. relative : its exporter gives times since it began, and its header says when that was."""
    if relative and field.enterprise == 0 and field.number in _ABSOLUTE and field.length == 4:
        millis = _TYPES["dateTimeMilliseconds"]
        return Shape(_ABSOLUTE[field.number], KINDS["uptime"], 8, millis.arrow, "dateTimeMilliseconds")
    name, abstract = _named(field)
    found = _TYPES.get(abstract)
    if found is None or field.length not in found.lengths:  # a number whose length every record says, too
        return Shape(_unnamed(field), KINDS["variable"], 0, "binary", "")
    if abstract in _WHOLE and field.length > found.width:  # wider than IANA has it
        found = _TYPES[f"{found.kind}64"]
    return Shape(name, KINDS[found.kind], found.width, found.arrow, abstract)


def _named(field: Field) -> tuple[str, str]:
    if field.enterprise in (0, REVERSE) and field.number in _registry():
        name, abstract = _registry()[field.number]
        return (name if field.enterprise == 0 else f"reverse{name[0].upper()}{name[1:]}"), abstract
    return "", ""


def _unnamed(field: Field) -> str:
    return f"pen{field.enterprise}id{field.number}" if field.enterprise else f"ie{field.number}"
