"""Templates as exporters send them: RFC 7011, 3.4 and 8.1; RFC 3954, 5.2 and 6.1."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from fastrecv._flow import MOST_FIELDS
from fastrecv.collector.elements import Field

__all__ = ["FIELDS5", "MalformedError", "Template", "Withdrawal", "read"]

_NETFLOW9, _IPFIX = 9, 10
_ENTERPRISE = 0x8000
_PAIR, _TRIPLE, _NUMBER = struct.Struct("!HH"), struct.Struct("!HHH"), struct.Struct("!I")

FIELDS5 = tuple(
    Field(0, number, length)
    for number, length in (
        (8, 4), (12, 4), (15, 4), (10, 2), (14, 2), (2, 4), (1, 4), (22, 4), (21, 4), (7, 2), (11, 2), (210, 1), (6, 1),
        (4, 1), (5, 1), (16, 2), (17, 2), (9, 1), (13, 1), (210, 2),
    )
)  # fmt: skip
"""A record of NetFlow v5 (Cisco, NetFlow Collection Engine User Guide, appendix B) as if a template had said it."""


class MalformedError(ValueError):
    """A set of templates that cannot be understood to its end."""


class Template(NamedTuple):
    """name : the number of the sets that have it. options : its records tell of the exporter, not of flows."""

    name: int
    fields: tuple[Field, ...]
    options: bool


class Withdrawal(NamedTuple):
    """From now on there is no such template; None: none of this kind."""

    name: int | None
    options: bool


def read(version: int, number: int, data: bytes) -> Iterator[Template | Withdrawal]:
    """What a set of that number says, version 9 or 10. What is shorter than a template at its end is padding.

    MalformedError where it makes no sense; what came before holds.
    """
    options = number in (1, 3)
    at = 0
    while len(data) - at >= _PAIR.size:
        name, count = _PAIR.unpack_from(data, at)
        if version == _IPFIX and count == 0:
            at += _PAIR.size
            yield Withdrawal(None if name == number else name, options)
            continue
        if name < 256:
            if not any(data[at:]):  # padding of four bytes and more
                return
            raise MalformedError(f"a template has number {name}")
        at += _PAIR.size
        if options:
            if len(data) - at < 2:
                raise MalformedError("a template ends in the midst of a number")
            (more,) = struct.unpack_from("!H", data, at)
            at += 2
            if version == _NETFLOW9:  # which says bytes, of the scope and of what follows
                count = (count + more) // _PAIR.size
        fields, at = _fields(data, at, count, version == _IPFIX)
        yield Template(name, fields, options)


def _fields(data: bytes, at: int, count: int, enterprises: bool) -> tuple[tuple[Field, ...], int]:
    """So many fields, and where they end."""
    if not 0 < count <= MOST_FIELDS:
        raise MalformedError(f"a template has {count} fields")
    found = []
    for _ in range(count):
        if len(data) - at < _PAIR.size:
            raise MalformedError("a template goes beyond its set")
        number, length = _PAIR.unpack_from(data, at)
        at += _PAIR.size
        enterprise = 0
        if enterprises and number & _ENTERPRISE:
            if len(data) - at < _NUMBER.size:
                raise MalformedError("a template goes beyond its set")
            (enterprise,) = _NUMBER.unpack_from(data, at)
            at += _NUMBER.size
            number &= ~_ENTERPRISE
        found.append(Field(enterprise, number, length))
    if not any(field.length for field in found):
        raise MalformedError("the records of a template have no bytes")
    return tuple(found), at
