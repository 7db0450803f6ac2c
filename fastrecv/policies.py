"""Policies of a balancer: what of a sender is hashed; and the same hash in user space, to say who gets whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from types import MappingProxyType
from typing import Literal

import numpy as np

__all__ = ["BUCKETS", "KEYS", "Key", "Policy", "Sender"]

BUCKETS = 4096  # of bpf/balance.bpf.c
_SOURCE, _SOURCE_PORT, _DESTINATION, _DESTINATION_PORT = 1, 2, 4, 8  # its fields
_WORD = (1 << 64) - 1

Key = Literal["source", "source+port", "flow", "destination"]
KEYS: Mapping[Key, int] = MappingProxyType({
    "source": _SOURCE,
    "source+port": _SOURCE | _SOURCE_PORT,
    "flow": _SOURCE | _SOURCE_PORT | _DESTINATION | _DESTINATION_PORT,
    "destination": _DESTINATION,
})  # fmt: skip


@dataclass(frozen=True)
class Sender:
    """A packet as a policy sees it. IPv4 addresses may be given as such or mapped."""

    source: IPv4Address | IPv6Address
    source_port: int
    destination: IPv4Address | IPv6Address
    destination_port: int


@dataclass(frozen=True)
class Policy:
    """What decides where a sender goes.

    key : "source" (his address), "source+port", "flow" (both ends) or "destination" (the address that he asked).
    prefix4, prefix6 : bits of the source address that count, so that a network stays together. seed : of the hash.
    """

    key: Key = "source"
    prefix4: int = 32
    prefix6: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.key not in KEYS:
            raise ValueError(f"key {self.key!r}: give {', '.join(KEYS)}")
        if not 0 <= self.prefix4 <= 32 or not 0 <= self.prefix6 <= 128:
            raise ValueError(f"prefixes of {self.prefix4} and {self.prefix6} bits: give 0 to 32 and 0 to 128")
        if not 0 <= self.seed <= _WORD:
            raise ValueError(f"seed {self.seed}: give 0 to 2**64 - 1")

    def settings(self) -> dict[str, object]:
        """The constants of the program that stand for it."""
        mask6 = ((1 << self.prefix6) - 1) << 128 - self.prefix6
        return {
            "fields": KEYS[self.key],
            "source_mask4": np.frombuffer(self._mask4.to_bytes(4), np.uint32)[0],
            "source_mask6": np.frombuffer(mask6.to_bytes(16), np.uint32),
            "seed": self.seed,
        }

    def bucket(self, sender: Sender) -> int:
        """The bucket of a sender, as the program finds it."""
        fields, found = KEYS[self.key], self.seed
        if fields & _SOURCE:
            for half in _halves(self._masked(sender.source)):
                found = _mixed(found, half)
        if fields & _DESTINATION:
            for half in _halves(_number(sender.destination)):
                found = _mixed(found, half)
        if fields & (_SOURCE_PORT | _DESTINATION_PORT):
            source = sender.source_port if fields & _SOURCE_PORT else 0
            destination = sender.destination_port if fields & _DESTINATION_PORT else 0
            found = _mixed(found, source << 32 | destination)
        found = found * 0xBF58476D1CE4E5B9 & _WORD
        return (found ^ found >> 32) % BUCKETS

    @property
    def _mask4(self) -> int:
        return ((1 << self.prefix4) - 1) << 32 - self.prefix4

    def _masked(self, address: IPv4Address | IPv6Address) -> int:
        number = _number(address)
        if number >> 32 == 0xFFFF:
            return number & (0xFFFF << 32 | self._mask4)
        return number & ((1 << self.prefix6) - 1) << 128 - self.prefix6


def _number(address: IPv4Address | IPv6Address) -> int:
    """128 bits; IPv4 mapped."""
    return int(address) | (0xFFFF << 32 if address.version == 4 else 0)


def _halves(number: int) -> tuple[int, int]:
    return number >> 64, number & _WORD


def _mixed(found: int, word: int) -> int:
    found = (found ^ word) * 0x9E3779B97F4A7C15 & _WORD
    return found ^ found >> 32
