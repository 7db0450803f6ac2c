"""The tables of bpf/lookup.bpf.c, laid out by address: trees of intervals, and tables of 16, 8 and 8 bits for IPv4.

All sets of ports are laid out at once, each address going with the number of its tree or table: there may be one set
with very many prefixes, or very many with a few.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastrecv.bpf import Object

__all__ = ["FEW", "NODE", "RULE", "Layout", "Numbers", "Tables", "begins"]

Numbers = NDArray[np.int64]
_Words = NDArray[np.uint32]
_Halves = NDArray[np.uint64]

FEW = 16  # IPv4 prefixes that a tree of two nodes holds: a little slower than a table, which takes 256 KiB
_ROOMY = 32  # tables that may be spent on few prefixes
_TABLES6 = 64  # where more sets of ports would have one, IPv6 has trees only
# lookup.h: kinds of `ports`, the flag of a block, the fan of a node and the flags of its children.
_ANSWER, _TREE, _TABLE = 1 << 30, 2 << 30, 3 << 30
_BLOCK = 1 << 31
_FAN, _LEAF, _LOW = 8, 1 << 31, 1 << 30

NODE = np.dtype([("key", "u8", (_FAN - 1,)), ("child", "u4", (_FAN,))])
RULE = np.dtype(
    [("destination", "u4"), ("flags", "u4"), ("ifindex", "u4"), ("source", "u4", (4,)), ("mask", "u4", (4,))]
)


@dataclass
class Tables:
    """What lookup.bpf.c reads, ready to be put into its maps. Entry 0 of `rules` is never used.

    ports : uint32, shape (4 * 65536,), by family (IPv4 first), protocol (TCP first) and port. first : uint32, shape
    (n, 65536), by the upper 16 bits of the address. blocks4 : uint32, shape (n, 256). nodes : NODE. rules : RULE, one
    each.
    """

    ports: NDArray[np.uint32]
    first: NDArray[np.uint32]
    blocks4: NDArray[np.uint32]
    nodes: NDArray[np.void]
    rules: NDArray[np.void]
    conditions: bool

    def load(self, lookup: Object) -> None:
        """Size the maps of an opened `lookup` object, load it, and fill them. CAP_BPF and CAP_NET_ADMIN.

        Its maps `sockets` and `counts` are the caller's: to reuse or to size before, and to fill.
        """
        arrays = {
            "ports": self.ports.reshape(-1, 16), "first": self.first.reshape(-1, 16), "blocks4": self.blocks4,
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


def begins(*columns: NDArray[np.generic]) -> NDArray[np.bool_]:
    """The rows that differ from the one before."""
    found = np.ones(len(columns[0]), np.bool_)
    found[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return found


class Layout:
    """The tables by address, and the way to them from `ports`."""

    def __init__(self) -> None:
        self.ports = np.zeros(4 * 65536, np.uint32)
        self._firsts = [np.zeros(0, np.uint32)]
        self._tables = 0
        self._blocks4 = np.zeros((0, 256), np.uint32)
        self._nodes = [np.zeros(0, NODE)]
        self._size = 0  # of all nodes

    def tables(self, rules: NDArray[np.void], *, conditions: bool) -> Tables:
        nodes = np.concatenate(self._nodes)
        first = np.concatenate(self._firsts).reshape(-1, 65536)
        return Tables(self.ports, first, self._blocks4, nodes, rules, conditions)

    def add(
        self, version: int, sizes: Numbers, high: _Halves, low: _Halves, length: Numbers, starts: _Words
    ) -> NDArray[np.uint32]:
        """Lay out all sets of prefixes that an IP version has: an entry of `ports` for each set.

        sizes : the number of prefixes in each. high, low, length : the prefixes set after set, each set sorted by
        address and length; IPv4 addresses at the upper end of the high half. starts : where the rules of each begin.
        """
        entries = np.zeros(len(sizes), np.uint32)
        heads = np.cumsum(sizes) - sizes
        answer = (sizes == 1) & (length[heads] == 0)
        entries[answer] = _ANSWER | starts[heads[answer]]
        table = (sizes > (FEW if len(sizes) > _ROOMY else 0)) & ~answer
        if version == 6 and np.count_nonzero(table) > _TABLES6:
            table[:] = False
        rows, number = _chosen(table, sizes)
        if len(number):
            entries[table] = _TABLE | np.arange(self._tables, self._tables + number[-1] + 1, dtype=np.uint32)
            if version == 4:
                self._paint4(number << 32 | (high[rows] >> np.uint64(32)).astype(np.int64), length[rows], starts[rows])
            else:
                self._paint6(number, high[rows], low[rows], length[rows], starts[rows])
        tree = ~answer & ~table
        rows, number = _chosen(tree, sizes)
        if len(number):
            shift = np.uint64(32 if version == 4 else 0)
            entries[tree] = _TREE | self._trees(number, high[rows], low[rows], length[rows], starts[rows], 0, shift)
        return entries

    def _paint4(self, address: Numbers, length: Numbers, starts: _Words) -> None:
        """Tables of 16, 8 and 8 bits. address : sorted, the number of its table above its 32 bits."""
        count = sum(np.count_nonzero(begins(address[length > depth] >> 32 - depth)) for depth in (16, 24))
        table, used = self._first(int(address[-1] >> 32) + 1), 0
        self._blocks4 = np.empty((count, 256), np.uint32)
        for depth in (16, 24, 32):
            for bits in np.unique(length[length <= depth]).tolist():  # shorter ones first: longer ones cover them
                rows = length == bits
                table.reshape(-1, 1 << depth - bits)[address[rows] >> 32 - bits] = starts[rows, None]
            # The rest is painted into blocks, each made of the entry that now leads to it.
            rows = length > depth
            address, length, starts = address[rows], length[rows], starts[rows]
            new = begins(address >> 32 - depth)
            entries = address[new] >> 32 - depth
            blocks = self._blocks4[used : used + len(entries)]
            blocks[:] = table[entries, None]
            table[entries] = _BLOCK | np.arange(used, used + len(entries), dtype=np.uint32)
            table, used = blocks.reshape(-1), used + len(entries)
            address = (np.cumsum(new) - 1) << 32 - depth | address & (1 << 32 - depth) - 1

    def _paint6(self, table: Numbers, high: _Halves, low: _Halves, length: Numbers, starts: _Words) -> None:
        """Tables of 16 bits that lead to trees over the other 112, which so are a node or two deep."""
        first = self._first(int(table[-1]) + 1)
        address = table << 16 | (high >> np.uint64(48)).astype(np.int64)
        for bits in np.unique(length[length <= 16]).tolist():
            rows = length == bits
            first.reshape(-1, 1 << 16 - bits)[address[rows] >> 16 - bits] = starts[rows, None]
        rows = length > 16
        if not rows.any():
            return
        new = begins(address[rows])
        entries = address[rows][new]
        trees = len(entries)
        # In every tree the rest is what the entry said that now leads to it.
        first[entries] = _BLOCK | self._trees(
            np.concatenate([np.arange(trees), np.cumsum(new) - 1]),
            np.concatenate([np.zeros(trees, np.uint64), high[rows]]),
            np.concatenate([np.zeros(trees, np.uint64), low[rows]]),
            np.concatenate([np.full(trees, 16), length[rows]]),
            np.concatenate([first[entries], starts[rows]]),
            16, np.uint64(0),
        )  # fmt: skip

    def _first(self, count: int) -> _Words:
        """So many tables more."""
        made = np.zeros(count << 16, np.uint32)
        self._firsts.append(made)
        self._tables += count
        return made

    def _trees(
        self, tree: Numbers, high: _Halves, low: _Halves, length: Numbers, starts: _Words, known: int, shift: np.uint64
    ) -> NDArray[np.uint32]:
        """Trees over the high halves; where prefixes are longer than that, they lead on to ones over the low halves.

        known : bits at the upper end that are not looked at any more. shift : of the keys, for IPv4.
        """
        of, keys, first, end = _intervals(tree, high << np.uint64(known), np.minimum(length, 64) - known)
        children = np.full(len(keys), _LEAF, np.uint32)
        leaves = np.uint32(_LEAF) | starts
        short, long = length <= 64, length > 64
        _cover(children, first[short], end[short], length[short], leaves[short])
        if long.any():
            above, tree = np.unique(first[long], return_inverse=True)
            low_of, low_keys, first, end = _intervals(tree, low[long], length[long] - 64)
            below = children[above][low_of]
            _cover(below, first, end, length[long], leaves[long])
            children[above] = _LOW | self._grow(low_of, low_keys, below)
        return self._grow(of, keys >> shift, children)

    def _grow(self, tree: Numbers, keys: _Halves, children: _Words) -> NDArray[np.uint32]:
        """Nodes over the intervals of trees 0, 1 and so on, level by level; the numbers of their roots."""
        roots = np.zeros(int(tree[-1]) + 1, np.uint32)
        kept = begins(tree, children)  # intervals side by side that lead to the same are one
        tree, keys, children = tree[kept], keys[kept], children[kept]
        while len(tree):
            bounds = np.append(np.flatnonzero(begins(tree)), len(tree))
            groups = -(-np.diff(bounds) // _FAN)
            place = np.arange(groups.sum()) - np.repeat(np.cumsum(groups) - groups, groups)
            slots = (np.repeat(bounds[:-1], groups) + _FAN * place)[:, None] + np.arange(_FAN)
            last = np.repeat(bounds[1:] - 1, groups)[:, None]
            # A node that is not full repeats its last child, behind keys that only the largest number reaches.
            filled = np.minimum(slots, last)
            level = np.zeros(len(slots), NODE)
            level["key"] = np.where(slots <= last, keys[filled], ~np.uint64(0))[:, 1:]
            level["child"] = children[filled]
            self._nodes.append(level)
            numbers = np.arange(self._size, self._size + len(level), dtype=np.uint32)
            self._size += len(level)
            tree, keys = tree[slots[:, 0]], keys[slots[:, 0]]
            root = np.repeat(groups == 1, groups)
            roots[tree[root]] = numbers[root]
            tree, keys, children = tree[~root], keys[~root], numbers[~root]
        return roots


def _chosen(sets: NDArray[np.bool_], sizes: Numbers) -> tuple[NDArray[np.bool_], Numbers]:
    """The rows of the chosen sets, and for each of these rows the number of its set among the chosen."""
    return np.repeat(sets, sizes), np.repeat(np.arange(np.count_nonzero(sets)), sizes[sets])


def _intervals(tree: Numbers, start: _Halves, length: Numbers) -> tuple[Numbers, _Halves, Numbers, Numbers]:
    """Where in its tree a prefix of 64 bits begins or ends: tree and key of all intervals between, 0 always being one.

    And for each prefix the first of its intervals and the one after its last.
    """
    trees, count = int(tree[-1]) + 1, len(tree)
    stop = start + (np.uint64(1) << (64 - length).astype(np.uint64))  # 0 at the very end, for numpy also from 1 << 64
    trees_of = np.concatenate([tree, tree, np.arange(trees)])
    keys = np.concatenate([start, stop, np.zeros(trees, np.uint64)])
    order = np.lexsort((keys, trees_of))
    trees_of, keys = trees_of[order], keys[order]
    new = begins(trees_of, keys)
    interval = np.empty(len(order), np.int64)
    interval[order] = np.cumsum(new) - 1
    trees_of, keys = trees_of[new], keys[new]
    end = np.where(stop == 0, np.searchsorted(trees_of, tree, "right"), interval[count : 2 * count])
    return trees_of, keys, interval[:count], end


def _cover(values: _Words, first: Numbers, end: Numbers, length: Numbers, value: _Words) -> None:
    """Give intervals the value of the longest prefix that covers them."""
    for bits in np.unique(length):
        rows = length == bits  # which do not overlap
        sizes = end[rows] - first[rows]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        values[np.repeat(first[rows], sizes) + within] = np.repeat(value[rows], sizes)
