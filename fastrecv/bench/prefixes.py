"""The prefixes a rule set is made of, drawn from a seeded distribution that every report names.

What a trie costs depends on the prefixes in it, not only on their number: neighbours share a path, strangers do not.
"""

from __future__ import annotations

import functools
import socket
from ipaddress import ip_address

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_ENTRIES", "describe", "draw"]

MAX_ENTRIES = 1_000_000

_BITS = {socket.AF_INET: 32, socket.AF_INET6: 128}
_LENGTHS = {socket.AF_INET: (16, 24), socket.AF_INET6: (32, 64)}  # shortest and longest drawn, in bits


def describe(sizes: list[int], seed: int) -> str:
    """The distribution in words, for reports. sizes : of the rule sets."""
    if not sizes:
        return "none"
    numbers = ", ".join(f"{size:,}" for size in sorted(set(sizes)))
    return (
        f"{numbers} prefixes (seed {seed}): the destination's own /24 (IPv6: /64), the others with a length uniform "
        "in 16..24 (IPv6: 32..64) and an address uniform over the whole space"
    )


@functools.cache
def draw(family: int, destination: str, entries: int, seed: int) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """`entries` different prefixes, the first of them the destination's own.

    Returns lengths in bits, shape (n,), and network addresses in network byte order with host bits zero,
    shape (n, 4) or (n, 16).
    """
    rng = np.random.default_rng(seed)
    size = _BITS[socket.AddressFamily(family)] // 8
    shortest, longest = _LENGTHS[socket.AddressFamily(family)]
    own = np.frombuffer(ip_address(destination).packed, np.uint8)
    lengths, addresses = np.array([longest], np.uint32), _mask(own[None, :], np.array([longest]))
    while len(lengths) < entries:
        missing = entries - len(lengths)
        more = rng.integers(shortest, longest, missing, dtype=np.uint32, endpoint=True)
        lengths = np.concatenate([lengths, more])
        drawn = rng.integers(0, 256, (missing, size), dtype=np.uint8)
        addresses = np.concatenate([addresses, _mask(drawn, more)])
        rows = np.column_stack([lengths.astype(np.uint8), addresses])
        _, first = np.unique(rows.view(f"V{size + 1}").ravel(), return_index=True)
        first.sort()  # the destination's own stays first
        lengths, addresses = lengths[first], addresses[first]
    return lengths, addresses


def _mask(addresses: NDArray[np.uint8], lengths: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Zero the host bits of each row."""
    kept = np.arange(8 * addresses.shape[1]) < lengths[:, None].astype(int)
    return addresses & np.packbits(kept, axis=1)
