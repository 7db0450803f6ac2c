"""NetFlow v5, NetFlow v9 (RFC 3954) and IPFIX (RFC 7011): what the datagrams of an exporter tell, counted.

A template is kept as the fields it names. From them comes a numpy dtype, and the records of a data set are an array of
it; only records of variable length are walked through one by one.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["Exporter", "MalformedError", "key"]

NETFLOW5, NETFLOW9, IPFIX = 5, 9, 10
OCTETS, PACKETS, OTHER = (
    1,
    2,
    0,
)  # IN_BYTES, IN_PKTS (RFC 3954, 8); octetDeltaCount, packetDeltaCount of IANA's registry
VARIABLE = 65535  # RFC 7011, 3.2
ENTERPRISE = 0x8000
TEMPLATES, OPTIONS_TEMPLATES = {NETFLOW9: 0, IPFIX: 2}, {NETFLOW9: 1, IPFIX: 3}  # set numbers
FURTHEST = 1 << 20  # a larger gap between two sequence numbers is an exporter that begins anew
MOST_TEMPLATES, MOST_FIELDS = 256, 512  # of an exporter, of a template: a forger's are held, too

HEADER5, HEADER9, HEADER10 = struct.Struct("!HHIIIIHH"), struct.Struct("!HHIIII"), struct.Struct("!HHIII")
PAIR, TRIPLE, WORD = struct.Struct("!HH"), struct.Struct("!HHH"), struct.Struct("!H")
RECORD5 = np.dtype({
    "names": ["packets", "octets"], "formats": [">u4", ">u4"], "offsets": [16, 20], "itemsize": 48,
})  # fmt: skip

Field = tuple[int, int]
"""Element (OTHER: neither octets nor packets), and length in bytes."""


class MalformedError(ValueError):
    """A datagram, or the rest of it, cannot be understood."""


class Template(msgspec.Struct, frozen=True, array_like=True):
    """What a record consists of. options : it tells of the exporter, not of a flow."""

    fields: tuple[Field, ...]
    options: bool


class Sums(NamedTuple):
    """What the records of a data set say."""

    records: int
    octets: int
    packets: int


def key(datagram: memoryview) -> tuple[int, int]:
    """Version and source of a datagram: engine, source id or observation domain; (0, 0) where there is none."""
    version = WORD.unpack_from(datagram)[0] if len(datagram) >= WORD.size else 0
    if version == NETFLOW5 and len(datagram) >= HEADER5.size:
        return version, HEADER5.unpack_from(datagram)[6]
    if version == NETFLOW9 and len(datagram) >= HEADER9.size:
        return version, HEADER9.unpack_from(datagram)[5]
    if version == IPFIX and len(datagram) >= HEADER10.size:
        return version, HEADER10.unpack_from(datagram)[4]
    return 0, 0


class Exporter(msgspec.Struct):
    """Who sends flows, by address (16 bytes), version and source: its templates, and what is counted since `clear`.

    lost : by gaps in sequence numbers: flows of v5, records of IPFIX, datagrams of v9; disorder counts as loss.
    unknown : data sets without a template. malformed : datagrams that were not understood to their end. heard : seconds
    since the epoch. sequence, due : of the last datagram, and of the next; None where it cannot be told.
    """

    address: bytes
    version: int
    source: int
    heard: float = 0.0
    sequence: int | None = None
    due: int | None = None
    templates: dict[int, Template] = {}
    datagrams: int = 0
    flows: int = 0
    octets: int = 0
    packets: int = 0
    lost: int = 0
    unknown: int = 0
    malformed: int = 0

    def clear(self) -> None:
        """Begin to count anew."""
        self.datagrams = self.flows = self.octets = self.packets = self.lost = self.unknown = self.malformed = 0

    def take(self, datagram: memoryview) -> None:
        """Count a datagram of this exporter's."""
        self.datagrams += 1
        try:
            if self.version == NETFLOW5:
                self._take5(datagram)
            elif self.version == NETFLOW9:
                self._take9(datagram)
            elif self.version == IPFIX:
                self._take10(datagram)
            else:
                raise MalformedError("a version that nobody knows")
        except (MalformedError, struct.error):  # struct.error: it ends in the middle of a number
            self.malformed += 1

    def _take5(self, datagram: memoryview) -> None:
        _, count, _, _, _, sequence, _, _ = HEADER5.unpack_from(datagram)
        if count == 0 or len(datagram) != HEADER5.size + count * RECORD5.itemsize:
            raise MalformedError("another length than its count says")
        self._count(_summed(np.frombuffer(datagram, RECORD5, offset=HEADER5.size)))
        self._follow(sequence, count)

    def _take9(self, datagram: memoryview) -> None:
        self._follow(HEADER9.unpack_from(datagram)[4], 1)
        self._take_sets(datagram[HEADER9.size :])

    def _take10(self, datagram: memoryview) -> None:
        _, length, _, sequence, _ = HEADER10.unpack_from(datagram)
        last, due, flows = self.sequence, self.due, self.flows
        self.sequence = self.due = None  # unless all is understood
        if length != len(datagram):
            raise MalformedError("another length than its header says")
        records = self._take_sets(datagram[HEADER10.size :])
        if records is None:
            return
        if last is not None and (sequence - last) % 2**32 == self.flows - flows:
            due = sequence  # softflowd 1.1.0 counts the flows of the datagram itself in, and records of options never
        self.due = due
        self._follow(sequence, records)

    def _follow(self, sequence: int, units: int) -> None:
        """Compare a sequence number with the one that was due. units : by how much the next one is higher."""
        gap = 0 if self.due is None else (sequence - self.due) % 2**32
        if gap <= FURTHEST:
            self.lost += gap
        self.sequence, self.due = sequence, (sequence + units) % 2**32

    def _take_sets(self, data: memoryview) -> int | None:
        """Take the sets of a datagram; how many data records they have, None where that cannot be told."""
        records: int | None = 0
        for number, content in _sets(data):
            if number in (TEMPLATES[self.version], OPTIONS_TEMPLATES[self.version]):
                self._learn(content, number)
                continue
            if number < 256:
                raise MalformedError("a set that is reserved")
            template = self.templates.get(number)
            if template is None:
                self.unknown += 1
                records = None
                continue
            sums = layout(template.fields).sums(content)
            if not template.options:
                self._count(sums)
            if records is not None:
                records += sums.records
        return records

    def _count(self, sums: Sums) -> None:
        """Counters have 64 bits and begin again at 0, whatever a sender makes up."""
        self.flows += sums.records
        self.octets = (self.octets + sums.octets) % 2**64
        self.packets = (self.packets + sums.packets) % 2**64

    def _learn(self, data: memoryview, number: int) -> None:
        """Take the templates of a set, and what is withdrawn (RFC 7011, 8.1). What is shorter is padding."""
        options = number == OPTIONS_TEMPLATES[self.version]
        while len(data) >= PAIR.size:
            name, count = PAIR.unpack_from(data)
            if self.version == IPFIX and count == 0:
                self._withdraw(name, number, options)
                data = data[PAIR.size :]
                continue
            if name < 256:
                raise MalformedError("a template that no set can have")
            if options:
                _, count, more = TRIPLE.unpack_from(data)
                if self.version == NETFLOW9:  # which gives bytes, of the scope and of what follows it
                    count = (count + more) // PAIR.size
            fields, data = _fields(data[TRIPLE.size if options else PAIR.size :], count, self.version == IPFIX)
            if layout(fields).shortest == 0:
                raise MalformedError("a template of nothing")
            if options:  # their octets are no flow's, and types of scopes are no elements
                fields = tuple((OTHER, length) for _, length in fields)
            if name not in self.templates and len(self.templates) >= MOST_TEMPLATES:
                raise MalformedError("more templates than anybody needs")
            self.templates[name] = Template(fields, options)

    def _withdraw(self, name: int, number: int, options: bool) -> None:
        """Forget a template; all of the kind, where it has the set's own number."""
        for held in list(self.templates) if name == number else [name]:
            template = self.templates.get(held)
            if template is not None and template.options == options:
                del self.templates[held]


class Layout:
    """Where octets and packets are in records of these fields. shortest : bytes of a record, at least."""

    def __init__(self, fields: tuple[Field, ...]) -> None:
        self._fields = fields
        self.shortest = sum(1 if length == VARIABLE else length for _, length in fields)
        self._dtype = None if any(length == VARIABLE for _, length in fields) else self._of_fixed()

    def _of_fixed(self) -> np.dtype[np.void]:
        names, formats, offsets, offset = [], [], [], 0
        for element, length in self._fields:
            name = {OCTETS: "octets", PACKETS: "packets"}.get(element)
            if name is not None and name not in names and 1 <= length <= 8:
                names.append(name)
                formats.append(f">u{length}" if length in (1, 2, 4, 8) else f"({length},)u1")
                offsets.append(offset)
            offset += length
        return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": offset})

    def sums(self, data: memoryview) -> Sums:
        """Of the records of a data set; less than a record at its end is padding."""
        if len(data) < self.shortest:
            raise MalformedError("a data set without a record")
        if self._dtype is not None:
            return _summed(np.frombuffer(data, self._dtype, len(data) // self.shortest))
        records = octets = packets = place = 0
        while len(data) - place >= self.shortest:
            found, place = self._walked(data, place)
            records, octets, packets = records + 1, octets + found.get(OCTETS, 0), packets + found.get(PACKETS, 0)
        return Sums(records, octets, packets)

    def _walked(self, data: memoryview, place: int) -> tuple[dict[int, int], int]:
        """Octets and packets of the record at a place, and where it ends."""
        found: dict[int, int] = {}
        for element, fixed in self._fields:
            length = fixed
            if fixed == VARIABLE:  # one byte says its length, or is 255 and two say it: RFC 7011, 7
                length = data[place] if place < len(data) else 0
                place += 1
                if length == 255:
                    (length,) = WORD.unpack_from(data, place)
                    place += 2
            if place + length > len(data):
                raise MalformedError("a record that goes beyond its set")
            if element != OTHER and length <= 8:
                found.setdefault(element, int.from_bytes(data[place : place + length]))
            place += length
        return found, place


@functools.lru_cache(1024)
def layout(fields: tuple[Field, ...]) -> Layout:
    """The same for all exporters whose templates are alike."""
    return Layout(fields)


def _summed(records: NDArray[np.void]) -> Sums:
    names = records.dtype.names or ()
    octets, packets = (_total(records[name]) if name in names else 0 for name in ("octets", "packets"))
    return Sums(len(records), octets, packets)


def _total(column: NDArray[np.integer]) -> int:
    """The sum of a column, whose numbers may be rows of bytes: those of 3, 5, 6, 7 bytes are (RFC 7011, 6.2)."""
    if column.ndim == 1:
        return int(column.sum(dtype=np.uint64))
    digits = column.sum(axis=0, dtype=np.uint64).tolist()
    return int(sum(digit << 8 * place for place, digit in enumerate(reversed(digits))))


def _sets(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each set."""
    while data:
        number, length = PAIR.unpack_from(data)
        if not PAIR.size <= length <= len(data):
            raise MalformedError("a set that goes beyond its datagram")
        yield number, data[PAIR.size : length]
        data = data[length:]


def _fields(data: memoryview, count: int, enterprises: bool) -> tuple[tuple[Field, ...], memoryview]:
    """So many fields of a template, and what follows them."""
    if count > MOST_FIELDS:
        raise MalformedError("more fields than anybody needs")
    found = []
    for _ in range(count):
        element, length = PAIR.unpack_from(data)
        others = enterprises and bool(element & ENTERPRISE)  # the number of the enterprise follows: RFC 7011, 3.2
        if others and len(data) < 2 * PAIR.size:
            raise MalformedError("a template that goes beyond its set")
        data = data[2 * PAIR.size if others else PAIR.size :]
        found.append((element if not others and element in (OCTETS, PACKETS) else OTHER, length))
    return tuple(found), data
