"""Rule sets of the dispatcher: bindings, their precedence, and their compilation into the tables of bpf/lookup.bpf.c.

What a packet would have to search for is searched here, once: every port is told which addresses matter on it, every
address the bindings that may apply to it, in order of precedence, those of shorter covering prefixes after its own.
Rule sets may be large, hence columns of numpy and not objects wherever a step is taken for every binding.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from itertools import pairwise
from operator import attrgetter
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrecv.steering_tables import FEW, RULE, Layout, Numbers, Tables, begins

__all__ = [
    "FAMILIES",
    "FAMILY_NAMES",
    "MAX_ALTERNATIVES",
    "MAX_EXPANDED",
    "MEMBERS",
    "PROTOCOLS",
    "PROTOCOL_NAMES",
    "Binding",
    "Destination",
    "RuleSetError",
    "Tables",
    "bound_twice",
    "compile_rules",
    "destinations_of",
]

Network = IPv4Network | IPv6Network
Ports = tuple[int, int]  # first and last

MEMBERS = 4  # MEMBERS of lookup.h: sockets kept of a destination
MAX_ALTERNATIVES = 32  # CONDITIONS of lookup.h
MAX_EXPANDED = 4_000_000  # bindings, each counted once for every set of ports that is treated alike
MAX_TABLES = 1024  # IPv4 tables of 256 KiB: sets of ports with more than a few prefixes
_LAST, _DROP, _PASS = 1, 2, 4  # flags of a rule in lookup.h
PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}
FAMILIES: dict[str, int] = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
FAMILY_NAMES = {number: name for name, number in FAMILIES.items()}


class Destination(NamedTuple):
    """Where bindings lead: the sockets of a label (None: drop) for one family (AF_*) and protocol (IPPROTO_*)."""

    label: str | None
    family: int
    protocol: int


class RuleSetError(ValueError):
    """A rule set cannot be compiled; the message names the binding or the limit."""


@dataclass(frozen=True, slots=True)
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
        if not isinstance(self.prefix, (IPv4Network, IPv6Network)):
            raise TypeError(f"the prefix is {self.prefix!r}: give an ipaddress.ip_network")
        if not isinstance(self.ports, tuple) or len(self.ports) != 2:
            raise TypeError(f"the ports are {self.ports!r}: give (first, last)")
        if self.protocol not in ("tcp", "udp", "any"):
            raise RuleSetError(f"protocol {self.protocol!r}: give tcp, udp or any")
        first, last = self.ports
        if not 0 <= first <= last <= 65535:
            raise RuleSetError(f"ports {first}-{last}: give 0 to 65535, the first not above the last")
        if self.source is not None and self.source.version != self.prefix.version:
            raise RuleSetError(f"source {self.source} and prefix {self.prefix} are of different IP versions")
        if self.source is not None and self.source.prefixlen == 0:
            object.__setattr__(self, "source", None)  # any source is none in particular

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


_Link = tuple[int, int]  # of a chain: the numbers of what a binding asks for, and how it acts
_Rule = tuple[int, int, int, bytes, bytes]  # as in RULE


def bound_twice(one: Binding, other: Binding) -> RuleSetError:
    first, last = one.ports
    ports = f"port {first}" if first == last else f"ports {first}-{last}"
    return RuleSetError(
        f"{one.protocol} {one.prefix} {ports} is bound twice, to {one.label or 'drop'} and to {other.label or 'drop'}"
    )


def destinations_of(bindings: Iterable[Binding]) -> list[Destination]:
    """The destinations that bindings lead to, each once, in the order in which they first do."""
    found: dict[Destination, None] = {}
    for label, version, named in dict.fromkeys(map(attrgetter("label", "prefix.version", "protocol"), bindings)):
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        for name, protocol in PROTOCOLS.items():
            if named in (name, "any"):
                found[Destination(label, family, protocol)] = None
    return list(found)


def compile_rules(bindings: Sequence[Binding], destinations: Mapping[Destination, int]) -> Tables:
    """Compile a rule set. RuleSetError where it is ambiguous or past a limit.

    destinations : the number of every destination that `destinations_of` the bindings names. That of number n has the
    MEMBERS places from n * MEMBERS on in the map `sockets`.
    """
    families = [
        _Family(version, chosen)
        for version in (4, 6)
        if (chosen := [binding for binding in bindings if binding.prefix.version == version])
    ]
    rules, layout, expanded = _Rules(destinations), Layout(), 0
    for family in families:
        answers: list[_Answers] = []
        runs: list[tuple[int, int, int]] = []  # first and last of `ports`, and the place of their answers
        for second, (name, protocol) in enumerate(PROTOCOLS.items()):
            start = ((family.version == 6) << 17) + (second << 16)
            members = family.by_ports(name)
            known: dict[frozenset[Ports], int] = {}
            sets: list[Numbers] = []
            for first, last, ranges in _port_runs(members):
                if ranges not in known:
                    expanded += sum(len(members[ports]) for ports in ranges)
                    if expanded > MAX_EXPANDED:
                        raise RuleSetError(
                            f"more than {MAX_EXPANDED:,} bindings, those of port ranges counted anew for every set of "
                            "ports that they fall into: bind fewer ranges, or fewer ports apart"
                        )
                    known[ranges] = len(answers) + len(sets)
                    sets.append(np.sort(np.concatenate([members[ports] for ports in ranges])))
                runs.append((start + first, start + last, known[ranges]))
            answers += family.answers(sets, protocol, rules)
        entries = _laid_out(layout, family, answers)
        for first, last, number in runs:
            layout.ports[first : last + 1] = entries[number]
    return layout.tables(rules.rows(), conditions=any(bool(family.conditional.any()) for family in families))


class _Answers(NamedTuple):
    """What one set of ports answers: its prefixes, as numbers in ascending order, and where the rules of each begin."""

    prefixes: Numbers
    starts: NDArray[np.uint32]


def _laid_out(layout: Layout, family: _Family, answers: list[_Answers]) -> NDArray[np.uint32]:
    """The entry of `ports` for each of the answers; equal ones, as the ports of one service have, share theirs."""
    alike: dict[tuple[bytes, bytes], int] = {}
    which = [alike.setdefault((each.prefixes.tobytes(), each.starts.tobytes()), len(alike)) for each in answers]
    kept = [answers[place] for place in np.unique(which, return_index=True)[1]]
    sizes = np.array([len(each.prefixes) for each in kept])
    prefixes, starts = np.concatenate([each.prefixes for each in kept]), np.concatenate([each.starts for each in kept])
    high, low, length = family.high[prefixes], family.low[prefixes], family.length[prefixes]
    if family.version == 4 and np.count_nonzero(sizes > FEW) > MAX_TABLES:
        raise RuleSetError(f"more than {MAX_TABLES:,} sets of ports have more than {FEW} IPv4 prefixes each")
    return layout.add(family.version, sizes, high, low, length, starts)[which]


def _port_runs(ranges: Iterable[Ports]) -> Iterator[tuple[int, int, frozenset[Ports]]]:
    """(first, last, ranges) for every run of ports that lies in the same ranges."""
    opening: dict[int, list[Ports]] = {}
    closing: dict[int, list[Ports]] = {}
    for ports in ranges:
        opening.setdefault(ports[0], []).append(ports)
        closing.setdefault(ports[1] + 1, []).append(ports)
    active: set[Ports] = set()
    for edge, following in pairwise(sorted(opening.keys() | closing.keys())):
        active.difference_update(closing.get(edge, ()))
        active.update(opening.get(edge, ()))
        if active:
            yield edge, following - 1, frozenset(active)


class _Rules:
    """The rules as they grow; equal chains share theirs."""

    def __init__(self, destinations: Mapping[Destination, int]) -> None:
        self._all: list[_Rule] = [(0, 0, 0, bytes(16), bytes(16))]
        self._starts: dict[tuple[_Rule, ...], int] = {}
        self._destinations = destinations

    def start(self, chain: Sequence[tuple[Binding, Binding]], family: int, protocol: int) -> int:
        """Where the rules of a chain begin. Of two bindings each, one is as it asks, the other as it acts."""
        made: list[_Rule] = []
        for ask, act in chain:
            destination = self._destinations[Destination(act.label, family, protocol)]
            flags = _LAST if len(made) == len(chain) - 1 else 0
            flags |= (_DROP if act.label is None else 0) | (_PASS if act.on_miss == "pass" else 0)
            source = mask = bytes(16)
            if ask.source is not None:
                source = ask.source.network_address.packed.ljust(16, b"\0")
                mask = ask.source.netmask.packed.ljust(16, b"\0")
            made.append((destination, flags, ask.interface, source, mask))
        start = self._starts.setdefault(tuple(made), len(self._all))
        if start == len(self._all):
            self._all += made
        return start

    def rows(self) -> NDArray[np.void]:
        rows = np.zeros(len(self._all), RULE)
        destination, flags, interface, source, mask = zip(*self._all, strict=True)
        rows["destination"], rows["flags"], rows["ifindex"] = destination, flags, interface
        rows["source"] = np.frombuffer(b"".join(source), np.uint32).reshape(-1, 4)
        rows["mask"] = np.frombuffer(b"".join(mask), np.uint32).reshape(-1, 4)
        return rows


class _Family:
    """The bindings of one IP version as columns, sorted by address, length of prefix and precedence.

    prefix, ask, act : numbers of what each binding has; `asks` and `acts` hold a binding as an example of each.
    high, low, length : by number of prefix; the halves of the address, IPv4 at the upper end of the high one.
    conditional : by number of ask.
    """

    def __init__(self, version: int, bindings: list[Binding]) -> None:
        self.version, self._family = version, socket.AF_INET if version == 4 else socket.AF_INET6
        self._networks = [binding.prefix for binding in bindings]
        packed = np.frombuffer(b"".join([network.network_address.packed for network in self._networks]), np.uint8)
        halves = np.zeros((len(bindings), 16), np.uint8)
        halves[:, : len(packed) // len(bindings)] = packed.reshape(len(bindings), -1)
        high, low = halves.view(">u8").astype(np.uint64).T
        length = np.array([network.prefixlen for network in self._networks])
        self.asks, ask = _numbered(bindings, attrgetter("protocol", "ports", "source", "interface"))
        self.acts, act = _numbered(bindings, attrgetter("label", "on_miss"))
        self.conditional = np.array([example.conditional for example in self.asks])
        keys = [_key(example) for example in self.asks]
        ranks = {key: rank for rank, key in enumerate(sorted(set(keys)))}
        rank = np.array([ranks[key] for key in keys])[ask]
        self._order = np.lexsort((rank, length, low, high))  # stable: what ranks the same stays in the order given
        self.ask, self.act, rank = ask[self._order], act[self._order], rank[self._order]
        high, low, length = high[self._order], low[self._order], length[self._order]
        first = begins(high, low, length)
        self.prefix = np.cumsum(first) - 1
        self.high, self.low, self.length = high[first], low[first], length[first]
        again = ~begins(self.prefix, rank)
        again[:-1] |= again[1:]
        _refuse_ambiguous(bindings[place] for place in np.sort(self._order[again]))

    def by_ports(self, protocol: str) -> dict[Ports, Numbers]:
        """The bindings for a protocol by their ports, as places in the columns."""
        ranges: dict[Ports, int] = {}
        of_asks = [
            ranges.setdefault(example.ports, len(ranges)) if example.protocol in (protocol, "any") else -1
            for example in self.asks
        ]
        numbers = np.array(of_asks)[self.ask]
        places = np.argsort(numbers, kind="stable")
        bounds = np.searchsorted(numbers[places], np.arange(len(ranges) + 1)).tolist()
        return {ports: places[begin:end] for ports, (begin, end) in zip(ranges, pairwise(bounds), strict=True)}

    def answers(self, sets: list[Numbers], protocol: int, rules: _Rules) -> list[_Answers]:
        """The answers of sets of bindings, which are given as ascending places in the columns.

        A prefix whose first binding asks for no more than prefix and port has this one for a chain. Only the sets in
        which another asks for more are searched, prefix by prefix.
        """
        if not sets:
            return []
        places = np.concatenate(sets)
        of_set = np.repeat(np.arange(len(sets)), [len(each) for each in sets])
        heads = begins(of_set, self.prefix[places])
        places, of_set = places[heads], of_set[heads]
        bounds = np.searchsorted(of_set, np.arange(len(sets) + 1)).tolist()
        conditional = self.conditional[self.ask[places]]
        starts = np.zeros(len(places), np.uint32)
        # Nothing of what they ask for is left to a rule: those that act alike have the same.
        plain = places[~conditional]
        _, examples, which = np.unique(self.act[plain], return_index=True, return_inverse=True)
        chains = [self._chain([(int(self.ask[place]), int(self.act[place]))]) for place in plain[examples]]
        alone = [rules.start(chain, self._family, protocol) for chain in chains]
        starts[~conditional] = np.array(alone, np.uint32)[which]
        for number in np.unique(of_set[conditional]).tolist():
            found = self._chains(sets[number])
            known = {links: rules.start(self._chain(links), self._family, protocol) for links in dict.fromkeys(found)}
            starts[bounds[number] : bounds[number + 1]] = [known[links] for links in found]
        numbers = self.prefix[places]
        return [_Answers(numbers[begin:end], starts[begin:end]) for begin, end in pairwise(bounds)]

    def _chain(self, links: Iterable[_Link]) -> list[tuple[Binding, Binding]]:
        return [(self.asks[ask], self.acts[act]) for ask, act in links]

    def _chains(self, places: Numbers) -> list[tuple[_Link, ...]]:
        """For every prefix of a set of bindings those that may apply below it, in order of precedence.

        A chain ends with the first binding that asks for no more than prefix and port: what would follow never applies.
        """
        heads = np.flatnonzero(begins(self.prefix[places]))
        numbers = self.prefix[places[heads]]
        columns = (self.high[numbers].tolist(), self.low[numbers].tolist(), self.length[numbers].tolist())
        links = list(zip(self.ask[places].tolist(), self.act[places].tolist(), strict=True))
        conditional = self.conditional.tolist()
        chains: list[tuple[_Link, ...]] = []
        above: list[tuple[int, tuple[_Link, ...]]] = []  # (end, chain) of the covering prefixes, outermost first
        bounds = pairwise([*heads.tolist(), len(places)])
        for (begin, end), high, low, length in zip(bounds, *columns, strict=True):
            address = high << 64 | low
            while above and above[-1][0] <= address:
                above.pop()
            chain: list[_Link] = []
            for link in (*links[begin:end], *(above[-1][1] if above else ())):
                chain.append(link)
                if not conditional[link[0]]:
                    break
            if len(chain) > MAX_ALTERNATIVES:
                raise RuleSetError(
                    f"{self._networks[self._order[places[begin]]]}: {len(chain)} bindings by source or interface apply "
                    f"to one port, {MAX_ALTERNATIVES} can be told apart"
                )
            chains.append(tuple(chain))
            above.append((address + (1 << 128 - length), chains[-1]))
        return chains


def _numbered(bindings: list[Binding], aspect: Callable[[Binding], object]) -> tuple[list[Binding], Numbers]:
    """An example of every value that an aspect of the bindings has, and the number of each binding's value."""
    values = list(map(aspect, bindings))
    examples = dict(zip(values, bindings, strict=True))
    numbers = {value: number for number, value in enumerate(examples)}
    return list(examples.values()), np.fromiter(map(numbers.__getitem__, values), np.int64, len(values))


def _key(binding: Binding) -> tuple[int | str, ...]:
    """Sorts bindings of one prefix by precedence, and those that ask for the same next to each other."""
    source = int(binding.source.network_address) if binding.source is not None else 0
    return *binding.precedence[1:], binding.protocol, binding.interface, source


def _refuse_ambiguous(bindings: Iterable[Binding]) -> None:
    seen: dict[tuple[object, ...], Binding] = {}
    for binding in bindings:
        asked = binding.prefix, binding.ports, binding.source, binding.interface, binding.protocol
        other = seen.setdefault(asked, binding)
        if other.label != binding.label:
            raise bound_twice(other, binding)
