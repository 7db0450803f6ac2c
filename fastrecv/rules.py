"""Rule sets of the dispatcher: bindings, their precedence, and their compilation into the tables of bpf/lookup.bpf.c.

What a packet would have to search for is searched here, once: every port is told which addresses matter on it, every
address the bindings that may apply to it, in order of precedence, those of shorter covering prefixes after its own.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrecv.bpf import Object

__all__ = [
    "MAX_ALTERNATIVES",
    "MAX_EXPANDED",
    "MEMBERS",
    "Binding",
    "Destination",
    "RuleSetError",
    "Tables",
    "compile_rules",
    "destinations_of",
]

Network = IPv4Network | IPv6Network

MEMBERS = 4  # MEMBERS of lookup.bpf.c: sockets kept of a destination
MAX_ALTERNATIVES = 32  # CONDITIONS of lookup.bpf.c
MAX_EXPANDED = 4_000_000  # bindings, each counted once for every set of ports that is treated alike
MAX_TABLES = 1024  # IPv4 tables of 256 KiB: sets of ports with more than a few prefixes
# lookup.bpf.c: kinds of `ports`, the flag of a block, the fan of a node and the flags of its children.
_ANSWER, _TREE, _TABLE = 1 << 30, 2 << 30, 3 << 30
_BLOCK = 1 << 31
_FAN, _LEAF, _LOW = 8, 1 << 31, 1 << 30
_FEW = 16  # IPv4 prefixes that a tree serves as well as a table of 256 KiB
_LAST, _DROP, _PASS = 1, 2, 4  # flags of a rule
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}


class Destination(NamedTuple):
    """Where bindings lead: the sockets of a label (None: drop) for one family (AF_*) and protocol (IPPROTO_*)."""

    label: str | None
    family: int
    protocol: int


class RuleSetError(ValueError):
    """A rule set cannot be compiled; the message names the binding or the limit."""


@dataclass(frozen=True)
class Binding:
    """One binding: packets for `prefix` and `ports` go to `label`.

    ports : first and last; (0, 65535) is any. label : None drops. source : a prefix of the sender's address.
    interface : index of the interface they came in by, 0 any. on_miss : what becomes of them while the label has no
    socket; "pass" leaves them to the kernel's ordinary lookup.
    """

    protocol: Literal["tcp", "udp", "any"]
    prefix: Network
    ports: tuple[int, int]
    label: str | None
    source: Network | None = None
    interface: int = 0
    on_miss: Literal["drop", "pass"] = "drop"

    def __post_init__(self) -> None:
        first, last = self.ports
        if not 0 <= first <= last <= 65535:
            raise RuleSetError(f"ports {first}-{last}: give 0 to 65535, the first not above the last")
        if self.source is not None and self.source.version != self.prefix.version:
            raise RuleSetError(f"source {self.source} and prefix {self.prefix} are of different IP versions")

    @property
    def conditional(self) -> bool:
        return bool(self.interface) or (self.source is not None and self.source.prefixlen > 0)

    @property
    def precedence(self) -> tuple[int, ...]:
        """Smaller wins: longer prefix, then narrower ports, longer source, a named interface, a named protocol.

        Ranges of ports that are equally wide and overlap: the lower one.
        """
        first, last = self.ports
        source = self.source.prefixlen if self.source is not None else 0
        return -self.prefix.prefixlen, last - first, -source, not self.interface, self.protocol == "any", first


@dataclass
class Tables:
    """What lookup.bpf.c reads, ready to be put into its maps. Entry 0 of `rules` is never used.

    ports : uint32, shape (4 * 65536,), by family (IPv4 first), protocol (TCP first) and port. first4 : uint32, shape
    (n, 65536). blocks4 : uint32, shape (n, 256). nodes : NODE. rules : RULE, one each.
    """

    ports: NDArray[np.uint32]
    first4: NDArray[np.uint32]
    blocks4: NDArray[np.uint32]
    nodes: NDArray[np.void]
    rules: NDArray[np.void]
    conditions: bool

    def load(self, lookup: Object) -> None:
        """Size the maps of an opened `lookup` object, load it, and fill them. CAP_BPF and CAP_NET_ADMIN.

        Its maps `sockets` and `counts` are the caller's: to reuse or to size before, and to fill.
        """
        arrays = {
            "ports": self.ports.reshape(-1, 16), "first4": self.first4.reshape(-1, 16), "blocks4": self.blocks4,
            "nodes": self.nodes, "rules": self.rules,
        }  # fmt: skip
        for name, rows in arrays.items():
            lookup.maps[name].max_entries = max(len(rows), 1)
        lookup.set(conditions=int(self.conditions))
        lookup.load()
        for name, rows in arrays.items():
            if len(rows):
                kind = lookup.maps[name].value_dtype
                values = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1).view(kind)[:, 0]
                lookup.maps[name].update(np.arange(len(rows), dtype=np.uint32), values)


NODE = np.dtype([("key", "u8", (_FAN - 1,)), ("child", "u4", (_FAN,))])
RULE = np.dtype(
    [("destination", "u4"), ("flags", "u4"), ("ifindex", "u4"), ("source", "u4", (4,)), ("mask", "u4", (4,))]
)


def destinations_of(bindings: Iterable[Binding]) -> list[Destination]:
    """The destinations that bindings lead to, each once, in the order in which they first do."""
    found: dict[Destination, None] = {}
    for binding in bindings:
        family = socket.AF_INET if binding.prefix.version == 4 else socket.AF_INET6
        for name, protocol in _PROTOCOLS.items():
            if binding.protocol in (name, "any"):
                found[Destination(binding.label, family, protocol)] = None
    return list(found)


class _Compiler:
    def __init__(self, destinations: Mapping[Destination, int]) -> None:
        self.rules: list[tuple[int, int, int, bytes, bytes]] = [(0, 0, 0, bytes(16), bytes(16))]
        self.starts: dict[tuple[tuple[int, ...], int, int], int] = {}  # of lists of rules that exist already
        self.destinations = destinations
        self.expanded = 0

    def rules_for(self, bindings: Sequence[Binding], chain: tuple[int, ...], family: int, protocol: int) -> int:
        """Where the rules of a chain of bindings begin; equal chains share theirs."""
        key = chain, family, protocol
        start = self.starts.get(key)
        if start is None:
            start = self.starts[key] = len(self.rules)
            for place, number in enumerate(chain):
                binding = bindings[number]
                destination = self.destinations[Destination(binding.label, family, protocol)]
                flags = _LAST if place == len(chain) - 1 else 0
                flags |= (_DROP if binding.label is None else 0) | (_PASS if binding.on_miss == "pass" else 0)
                source = mask = bytes(16)
                if binding.source is not None:
                    source = binding.source.network_address.packed.ljust(16, b"\0")
                    mask = binding.source.netmask.packed.ljust(16, b"\0")
                self.rules.append((destination, flags, binding.interface, source, mask))
        return start


def _port_sets(bindings: Sequence[Binding], chosen: list[int]) -> Iterable[tuple[int, int, tuple[int, ...]]]:
    """(first, last, bindings) for every run of ports on which the same bindings are to be looked at."""
    begins: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for number in chosen:
        first, last = bindings[number].ports
        begins.setdefault(first, []).append(number)
        ends.setdefault(last + 1, []).append(number)
    edges = sorted(begins.keys() | ends.keys())
    active: set[int] = set()
    for edge, following in zip(edges, [*edges[1:], 65536][: len(edges)], strict=True):
        active.difference_update(ends.get(edge, ()))
        active.update(begins.get(edge, ()))
        if active and edge < 65536:
            yield edge, following - 1, tuple(sorted(active))


def _chains(bindings: Sequence[Binding], numbers: Iterable[int]) -> dict[tuple[int, int], tuple[int, ...]]:
    """For every prefix (address, length) the bindings that may apply below it, in order of precedence.

    A chain ends with the first binding that asks for no more than prefix and port: what would follow never applies.
    """
    own: dict[tuple[int, int], list[int]] = {}
    for number in numbers:
        prefix = bindings[number].prefix
        own.setdefault((int(prefix.network_address), prefix.prefixlen), []).append(number)
    chains: dict[tuple[int, int], tuple[int, ...]] = {}
    above: list[tuple[int, int]] = []  # the prefixes that cover the one at hand, outermost first
    bits = next(iter(own.values()))[0]
    width = bindings[bits].prefix.max_prefixlen
    for address, length in sorted(own):
        while above and (address ^ above[-1][0]) >> (width - above[-1][1]):
            above.pop()
        chain: list[int] = []
        inherited = chains[above[-1]] if above else ()
        for number in (*sorted(own[address, length], key=lambda n: bindings[n].precedence), *inherited):
            chain.append(number)
            if not bindings[number].conditional:
                break
        if len(chain) > MAX_ALTERNATIVES:
            raise RuleSetError(
                f"{bindings[chain[0]].prefix}: {len(chain)} bindings by source or interface apply to one port, "
                f"{MAX_ALTERNATIVES} can be told apart"
            )
        chains[address, length] = tuple(chain)
        above.append((address, length))
    return chains


def compile_rules(bindings: Sequence[Binding], destinations: Mapping[Destination, int]) -> Tables:
    """Compile a rule set. RuleSetError where it is ambiguous or past a limit.

    destinations : the number of every destination that `destinations_of` the bindings names. That of number n has the
    MEMBERS places from n * MEMBERS on in the map `sockets`.
    """
    seen: dict[tuple[object, ...], Binding] = {}
    for binding in bindings:
        other = seen.setdefault(
            (binding.prefix, binding.ports, binding.source, binding.interface, binding.protocol), binding
        )
        if other is not binding and other.label != binding.label:
            raise RuleSetError(f"{binding.prefix} ports {binding.ports[0]}-{binding.ports[1]} is bound twice, to "
                               f"{other.label} and to {binding.label}")  # fmt: skip
    compiler = _Compiler(destinations)
    tables = _Layout()
    for family, version in ((socket.AF_INET, 4), (socket.AF_INET6, 6)):
        for second, (name, protocol) in enumerate(_PROTOCOLS.items()):
            chosen = [number for number, binding in enumerate(bindings)
                      if binding.prefix.version == version and binding.protocol in (name, "any")]  # fmt: skip
            known: dict[tuple[int, ...], int] = {}
            for first, last, numbers in _port_sets(bindings, chosen):
                if numbers not in known:
                    compiler.expanded += len(numbers)
                    if compiler.expanded > MAX_EXPANDED:
                        raise RuleSetError(
                            f"more than {MAX_EXPANDED:,} bindings, those of port ranges counted anew for every set of "
                            "ports that they fall into: bind fewer ranges, or fewer ports apart"
                        )
                    begins = {
                        prefix: compiler.rules_for(bindings, chain, family, protocol)
                        for prefix, chain in _chains(bindings, numbers).items()
                    }
                    known[numbers] = tables.add(version, begins)
                start = ((version == 6) << 17) + (second << 16)
                tables.ports[start + first : start + last + 1] = known[numbers]
    return Tables(
        ports=tables.ports,
        first4=_stacked(tables.first4, 65536),
        blocks4=_stacked(tables.blocks4, 256),
        nodes=np.concatenate(tables.nodes) if tables.nodes else np.zeros(0, NODE),
        rules=_rule_rows(compiler.rules),
        conditions=any(binding.conditional for binding in bindings),
    )


def _stacked(rows: list[NDArray[np.uint32]], *shape: int) -> NDArray[np.uint32]:
    return np.stack(rows) if rows else np.zeros((0, *shape), np.uint32)


def _rule_rows(rules: list[tuple[int, int, int, bytes, bytes]]) -> NDArray[np.void]:
    rows = np.zeros(len(rules), RULE)
    for name, column in zip(("destination", "flags", "ifindex"), list(zip(*rules, strict=True))[:3], strict=True):
        rows[name] = column
    rows["source"] = np.frombuffer(b"".join(rule[3] for rule in rules), np.uint32).reshape(-1, 4)
    rows["mask"] = np.frombuffer(b"".join(rule[4] for rule in rules), np.uint32).reshape(-1, 4)
    return rows


def _intervals(values: dict[tuple[int, int], int], bits: int) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """Where the value of the longest covering prefix (address, length) changes, and to what; LEAF alone is none."""
    changes: dict[int, int] = {0: _LEAF}
    above: list[tuple[int, int]] = []  # (end, value) of the prefixes that cover the place at hand, outermost first
    for (address, length), value in sorted(values.items()):
        while above and above[-1][0] <= address:
            end, _ = above.pop()
            changes[end] = above[-1][1] if above else _LEAF
        changes[address] = value
        above.append((address + (1 << bits - length), value))
    while above:
        end, _ = above.pop()
        changes[end] = above[-1][1] if above else _LEAF
    changes.pop(1 << bits, None)
    return np.fromiter(changes, np.uint64, len(changes)), np.fromiter(changes.values(), np.uint32, len(changes))


class _Layout:
    """The tables by address, as they grow: one entry of `ports` for every set of ports that is treated alike."""

    def __init__(self) -> None:
        self.ports = np.zeros(4 * 65536, np.uint32)
        self.first4: list[NDArray[np.uint32]] = []
        self.blocks4: list[NDArray[np.uint32]] = []
        self.nodes: list[NDArray[np.void]] = []
        self.size = 0  # of all nodes

    def add(self, version: int, begins: dict[tuple[int, int], int]) -> int:
        """The entry of `ports` that leads to the rules; `begins` says where those of each (address, length) begin."""
        if list(begins) == [(0, 0)]:
            return _ANSWER | begins[0, 0]
        if version == 6:
            return _TREE | self._tree6(begins)
        if len(begins) <= _FEW:
            return _TREE | self._tree({key: _LEAF | rule for key, rule in begins.items()}, 32)
        if len(self.first4) == MAX_TABLES:
            raise RuleSetError(f"more than {MAX_TABLES:,} sets of ports have more than {_FEW} IPv4 prefixes each")
        self.first4.append(self._paint(begins))
        return _TABLE | len(self.first4) - 1

    def _tree6(self, begins: dict[tuple[int, int], int]) -> int:
        """A tree over the high halves; where prefixes are longer than that, it leads on to one over the low halves."""
        high = {(address >> 64, length): _LEAF | rule for (address, length), rule in begins.items() if length <= 64}
        longer: dict[int, dict[tuple[int, int], int]] = {}
        for (address, length), rule in begins.items():
            if length > 64:
                longer.setdefault(address >> 64, {})[address & (1 << 64) - 1, length - 64] = _LEAF | rule
        starts, values = _intervals(high, 64)
        for place, low in longer.items():
            covering = int(values[int(np.searchsorted(starts, np.uint64(place), "right")) - 1])
            high[place, 64] = _LOW | self._tree({(0, 0): covering, **low}, 64)
        return self._tree(high, 64)

    def _tree(self, values: dict[tuple[int, int], int], bits: int) -> int:
        """A tree of nodes over the intervals that prefixes (address, length) make; the number of its root."""
        starts, children = _intervals(values, bits)
        while True:
            groups = -(-len(starts) // _FAN)
            # A node that is not full repeats its last child, behind keys that only the largest number reaches.
            filled = np.pad(children, (0, groups * _FAN - len(children)), "edge").reshape(groups, _FAN)
            keys = np.pad(starts, (0, groups * _FAN - len(starts)), constant_values=~np.uint64(0)).reshape(groups, _FAN)
            level = np.zeros(groups, NODE)
            level["key"], level["child"] = keys[:, 1:], filled
            first = self.size
            self.nodes.append(level)
            self.size += groups
            if groups == 1:
                return first
            starts = keys[:, 0]
            children = np.arange(first, first + groups, dtype=np.uint32)

    def _paint(self, begins: dict[tuple[int, int], int]) -> NDArray[np.uint32]:
        """A table of 16, 8 and 8 bits: shorter prefixes first, so that longer ones cover them."""
        first = np.zeros(65536, np.uint32)
        for (address, length), rule in sorted(begins.items(), key=lambda item: item[0][1]):
            top = address >> 16
            if length <= 16:
                first[top : top + (1 << 16 - length)] = rule
                continue
            middle = self._block(first, top)
            low = address >> 8 & 255
            if length <= 24:
                middle[low : low + (1 << 24 - length)] = rule
                continue
            last = self._block(middle, low)
            last[address & 255 : (address & 255) + (1 << 32 - length)] = rule
        return first

    def _block(self, table: NDArray[np.uint32], place: int) -> NDArray[np.uint32]:
        """The block below one entry, made of what stood there."""
        if not table[place] & _BLOCK:
            self.blocks4.append(np.full(256, table[place], np.uint32))
            table[place] = _BLOCK | len(self.blocks4) - 1
        return self.blocks4[int(table[place]) & ~_BLOCK]
