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

FEW = 16  # IPv4 prefixes that a tree serves as well as a table of 256 KiB
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


def begins(*columns: NDArray[np.generic]) -> NDArray[np.bool_]:
    """The rows that differ from the one before."""
    found = np.ones(len(columns[0]), np.bool_)
    found[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return found


