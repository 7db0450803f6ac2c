"""What the dispatcher of a namespace has been told: its bindings, and the numbers of its destinations."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

import msgspec

from fastrecv.errors import StateError
from fastrecv.rules import PROTOCOLS, Binding, Destination, RuleSetError, bound_twice, destinations_of

__all__ = [
    "ANEW",
    "DROP",
    "FORMAT",
    "MAX_BINDINGS",
    "MAX_DESTINATIONS",
    "Change",
    "Key",
    "State",
    "check_label",
    "key_of",
]

FORMAT = 1  # of the document and of the maps beside it; another number is another fastrecv's
MAX_BINDINGS = 1_000_000
MAX_DESTINATIONS = 4096  # (label, family, protocol) with bindings or sockets
_REST = 60.0  # seconds until a number is given out again: no packet is under way in a program for so long

ANEW = "`fastrecv lookup unload`, then load, bind and register anew"

Key = tuple[str, bytes, int, int, int, bytes, int, int]
"""What makes a binding this one and no other: everything but its label and what becomes of misses."""


DROP = "drop"
"""Said for the label of a binding, it is the verdict; so nothing can be registered as that."""


def check_label(label: str | None) -> None:
    """RuleSetError for what cannot be a label: 1 to 255 bytes, printable and without spaces, other than "drop"."""
    if not label or not label.isprintable() or " " in label or len(label.encode()) > 255:
        shown = repr(label) if len(label or "") <= 40 else f"{label[:40]!r}..."  # type: ignore[index]
        raise RuleSetError(f"label {shown}: give 1 to 255 bytes, printable and without spaces")
    if label.lower() == DROP:
        raise RuleSetError("'drop' is a verdict, not a label: choose another name")


class Change(NamedTuple):
    """What a change of bindings did. A binding whose label changed is in both."""

    added: list[Binding]
    removed: list[Binding]


class _Row(msgspec.Struct, array_like=True, frozen=True):
    """A binding as it is kept: a tenth of the time that text would take to read."""

    protocol: str
    address: bytes
    length: int
    first: int
    last: int
    source: bytes  # b"": any
    source_length: int
    interface: int
    label: str | None
    on_miss: str

    @classmethod
    def of(cls, binding: Binding) -> _Row:
        source = binding.source
        return cls(
            binding.protocol, binding.prefix.network_address.packed, binding.prefix.prefixlen, *binding.ports,
            b"" if source is None else source.network_address.packed, 0 if source is None else source.prefixlen,
            binding.interface, binding.label, binding.on_miss,
        )  # fmt: skip

    @property
    def binding(self) -> Binding:
        return Binding(
            self.protocol,  # type: ignore[arg-type] # was a binding's when it was written
            _network(self.address, self.length), (self.first, self.last), self.label,
            _network(self.source, self.source_length) if self.source else None, self.interface,
            self.on_miss,  # type: ignore[arg-type] # the same
        )  # fmt: skip

    @property
    def key(self) -> Key:
        return (self.protocol, self.address, self.length, self.first, self.last, self.source, self.source_length,
                self.interface)  # fmt: skip


def _network(packed: bytes, length: int) -> IPv4Network | IPv6Network:
    return IPv4Network((packed, length)) if len(packed) == 4 else IPv6Network((packed, length))


def key_of(binding: Binding) -> Key:
    return _Row.of(binding).key


class State(msgspec.Struct, forbid_unknown_fields=True):
    """The document that lies beside the maps of a dispatcher.

    program : what the program was compiled from, as a digest of the object. tag : what the kernel calls it.
    destinations : their numbers. retired : when numbers were last in use, in seconds of CLOCK_BOOTTIME.
    """

    format: int
    version: str
    program: str
    tag: str
    loaded: float
    rows: list[_Row]
    destinations: list[tuple[str | None, int, int, int]]
    retired: dict[int, float]

    @classmethod
    def decode(cls, data: bytes) -> State:
        """StateError where another version of fastrecv, with another format, has written it."""
        try:
            head = msgspec.msgpack.decode(data, type=_Head)
        except msgspec.DecodeError as error:
            raise StateError(f"the document of this dispatcher cannot be read ({error}): {ANEW}") from None
        if head.format != FORMAT:
            raise StateError(
                f"this dispatcher was loaded by fastrecv {head.version} (state format {head.format}, here "
                f"{FORMAT}): use that version, or `fastrecv lookup unload`, then load and bind anew"
            )
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except msgspec.DecodeError as error:
            raise StateError(f"the document of this dispatcher cannot be read ({error}): {ANEW}") from None

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def empty(cls) -> State:
        return cls(FORMAT, "", "", "", time.time(), [], [], {})

    @property
    def bindings(self) -> list[Binding]:
        return [row.binding for row in self.rows]

    @property
    def numbers(self) -> dict[Destination, int]:
        return {Destination(label, family, protocol): number for label, family, protocol, number in self.destinations}

    def bound(self) -> Counter[Destination]:
        """How many bindings lead to each destination."""
        alike = Counter((row.label, len(row.address), row.protocol) for row in self.rows)
        found: Counter[Destination] = Counter()
        for (label, width, protocol), count in alike.items():
            family = socket.AF_INET if width == 4 else socket.AF_INET6
            for name, number in PROTOCOLS.items():
                if protocol in (name, "any"):
                    found[Destination(label, family, number)] += count
        return found

    def replace(self, bindings: Sequence[Binding]) -> Change:
        """Take these bindings for the present ones. RuleSetError where one is there twice or there are too many."""
        if len(bindings) > MAX_BINDINGS:
            raise RuleSetError(f"{len(bindings):,} bindings, {MAX_BINDINGS:,} at most: bind shorter prefixes")
        for label in {binding.label for binding in bindings} - {None}:
            check_label(label)
        rows = [_Row.of(binding) for binding in bindings]
        seen: dict[Key, _Row] = {}
        for row in rows:
            if seen.setdefault(row.key, row) is not row:
                raise bound_twice(seen[row.key].binding, row.binding)
        before, after = set(self.rows), set(rows)
        change = Change(
            [binding for row, binding in zip(rows, bindings, strict=True) if row not in before],
            [row.binding for row in self.rows if row not in after],
        )
        self.rows = rows
        return change

    def number(self, bindings: Iterable[Binding], registered: set[int]) -> dict[Destination, int]:
        """Number what bindings lead to, and keep what has sockets: the numbers in `registered`. Gives the new ones."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        needed = destinations_of(bindings)
        known = self.numbers
        kept = {name: number for name, number in known.items() if number in registered}
        kept |= {name: known[name] for name in needed if name in known}
        used = set(kept.values())
        self.retired = self.retired | {number: now for number in known.values() if number not in used}
        new = self._give([destination for destination in needed if destination not in known], used, now)
        self._keep(kept | new)
        return new

    def add(self, destinations: Iterable[Destination]) -> dict[Destination, int]:
        """Number destinations that nothing is bound to yet. Gives the new ones."""
        known = self.numbers
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        new = self._give([name for name in destinations if name not in known], set(known.values()), now)
        self._keep(known | new)
        return new

    def _give(self, names: list[Destination], used: set[int], now: float) -> dict[Destination, int]:
        self.retired = {number: since for number, since in self.retired.items() if now - since < _REST}
        free = (number for number in range(MAX_DESTINATIONS) if number not in used and number not in self.retired)
        given = dict(zip(names, free, strict=False))
        if len(given) < len(names):
            raise RuleSetError(
                f"{len(used) + len(names):,} destinations (a label counts once for each family and protocol) and "
                f"{len(self.retired):,} whose numbers rest for a minute, {MAX_DESTINATIONS:,} at most: use fewer labels"
            )
        return given

    def _keep(self, numbers: dict[Destination, int]) -> None:
        self.destinations = [(*name, number) for name, number in numbers.items()]


class _Head(msgspec.Struct):
    """What every format has."""

    format: int
    version: str
