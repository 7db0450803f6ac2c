"""Policies of a balancer: what of a packet says whose it is; and the kernel's hash of that in user space.

The programs that act by them are bpf/balance.bpf.c (fastrecv.balance) and classic BPF (fastrecv.classic).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from types import MappingProxyType
from typing import Literal, Self

import numpy as np

__all__ = ["ANCILLARY", "BUCKETS", "KEYS", "MAX_KEY", "Key", "Mapped", "Policy", "Sender", "number_of"]

BUCKETS = 4096  # of bpf/balance.h
MAX_KEY = 20  # bytes of a payload that can be a key; as long as a QUIC connection id (RFC 9000, 17.2)
_SOURCE, _SOURCE_PORT, _DESTINATION, _DESTINATION_PORT, _PAYLOAD, _QUIC, _CPU, _RANDOM = (1 << bit for bit in range(8))
_WORD = (1 << 64) - 1

Key = Literal[
    "source", "source+port", "flow", "destination", "payload", "quic", "cpu", "random",
    "rxhash", "interface", "mark", "queue", "vlan", "protocol",
]  # fmt: skip
Mapped = Literal["source", "destination"]

KEYS: Mapping[str, int] = MappingProxyType({
    "source": _SOURCE,
    "source+port": _SOURCE | _SOURCE_PORT,
    "flow": _SOURCE | _SOURCE_PORT | _DESTINATION | _DESTINATION_PORT,
    "destination": _DESTINATION,
    "payload": _PAYLOAD,
    "quic": _QUIC,
    "cpu": _CPU,
    "random": _RANDOM,
})  # fmt: skip
"""What balance.bpf.c knows, with its bits."""
ANCILLARY = ("rxhash", "interface", "mark", "queue", "vlan", "protocol")
"""What classic BPF alone knows: the kernel's ancillary data of a packet (SKF_AD_*, include/uapi/linux/filter.h)."""
_WORDS = re.compile(
    r"(?P<key>[a-z+]+)(/(?P<prefix4>\d{1,9})(/(?P<prefix6>\d{1,9}))?|\[((?P<offset>\d{1,9}):)?(?P<length>\d{1,9})\])?"
)


@dataclass(frozen=True)
class Sender:
    """A packet as a policy sees it. IPv4 addresses may be given as such or mapped.

    payload : what follows the UDP or TCP header. cpu : the one that takes the packet, where that is known.
    """

    source: IPv4Address | IPv6Address
    source_port: int
    destination: IPv4Address | IPv6Address
    destination_port: int
    payload: bytes = b""
    cpu: int | None = None


@dataclass(frozen=True)
class Policy:
    """What decides where a sender goes.

    key : one of KEYS or ANCILLARY:

    - "source" (his address), "source+port", "flow" (both ends), "destination" (the address that he asked);
    - "payload": `length` bytes of it from `offset` on; "quic": the first `length` bytes of the destination connection
      id, in long and in short headers (RFC 9000, 17). A packet that has no such bytes goes by its source;
    - "cpu": the one that takes the packet; "random": any;
    - in classic BPF only: "rxhash", "interface", "mark", "queue", "vlan", "protocol".

    prefix4, prefix6 : bits of the source address that count, so that a network stays together. mapped : prefixes of the
    source or destination address that have slots of their own come first (Balancer.place). seed : of the hash; None
    lets the balancer draw one, so that nobody outside can choose his slot.

    ValueError for what makes no sense.
    """

    key: Key = "source"
    prefix4: int = 32
    prefix6: int = 128
    offset: int = 0
    length: int = 0
    mapped: Mapped | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.key not in KEYS and self.key not in ANCILLARY:
            raise ValueError(f"key {self.key!r}: give {', '.join((*KEYS, *ANCILLARY))}")
        if not 0 <= self.prefix4 <= 32 or not 0 <= self.prefix6 <= 128:
            raise ValueError(f"prefixes of {self.prefix4} and {self.prefix6} bits: give 0 to 32 and 0 to 128")
        if (self.prefix4, self.prefix6) != (32, 128) and not self._fields & _SOURCE:
            raise ValueError(f"key {self.key!r} has no source address that a prefix could shorten")
        by_bytes = self.key in ("payload", "quic")
        if by_bytes and not 1 <= self.length <= MAX_KEY:
            raise ValueError(
                f"key {self.key!r} of {self.length} bytes: give a length of 1 to {MAX_KEY}, payload[OFFSET:LENGTH] or "
                "quic[LENGTH]"
            )
        if (self.length and not by_bytes) or (self.offset and self.key != "payload"):
            raise ValueError(f"key {self.key!r} takes no {'length' if self.length else 'offset'}")
        if not 0 <= self.offset <= 65535:
            raise ValueError(f"offset {self.offset}: give 0 to 65535")
        if self.mapped not in (None, "source", "destination"):
            raise ValueError(f"mapped {self.mapped!r}: give source or destination")
        if self.seed is not None and not 0 <= self.seed <= _WORD:
            raise ValueError(f"seed {self.seed}: give 0 to 2**64 - 1")

    @classmethod
    def parse(cls, text: str, *, mapped: Mapped | None = None, seed: int | None = None) -> Self:
        """A policy from words: source, source/24/64, flow, payload[16:4] (offset, length), quic[8]. ValueError."""
        match = _WORDS.fullmatch(text)
        key = match["key"] if match else text
        if match is None or (key not in KEYS and key not in ANCILLARY) or (match["offset"] and key != "payload"):
            raise ValueError(
                f"policy {text!r}: give source[/BITS4[/BITS6]], source+port, flow, destination, "
                f"payload[OFFSET:LENGTH], quic[LENGTH], cpu, random; in classic BPF also {', '.join(ANCILLARY)}"
            )
        return cls(
            key,  # type: ignore[arg-type] # looked at above
            int(match["prefix4"] or 32), int(match["prefix6"] or 128),
            int(match["offset"] or 0), int(match["length"] or 0), mapped, seed,
        )  # fmt: skip

    def __str__(self) -> str:
        """As `parse` reads it."""
        if self.key == "payload":
            return f"payload[{self.offset}:{self.length}]"
        if self.key == "quic":
            return f"quic[{self.length}]"
        if (self.prefix4, self.prefix6) != (32, 128):
            return f"{self.key}/{self.prefix4}/{self.prefix6}"
        return self.key

    @property
    def classic(self) -> bool:
        """Whether classic BPF can act by it (fastrecv.classic)."""
        return self.key != "quic" and self.mapped is None

    @property
    def ebpf(self) -> bool:
        """Whether the balancer's own program can act by it (fastrecv.balance)."""
        return self.key in KEYS

    @property
    def _fields(self) -> int:
        return KEYS.get(self.key, 0)

    @property
    def mask4(self) -> int:
        """Of the source address, 32 bits."""
        return ((1 << self.prefix4) - 1) << 32 - self.prefix4

    @property
    def mask6(self) -> int:
        """Of the source address, 128 bits."""
        return ((1 << self.prefix6) - 1) << 128 - self.prefix6

    def settings(self) -> dict[str, object]:
        """The constants of balance.bpf.c that stand for it; the seed must have been drawn."""
        assert self.seed is not None
        return {
            "fields": self._fields,
            "source_mask4": np.frombuffer(self.mask4.to_bytes(4), np.uint32)[0],
            "source_mask6": np.frombuffer(self.mask6.to_bytes(16), np.uint32),
            "payload_offset": self.offset,
            "key_length": self.length,
            "mapped": {None: 0, "source": _SOURCE, "destination": _DESTINATION}[self.mapped],
            "seed": self.seed,
        }

    def bucket(self, sender: Sender) -> int | None:
        """The bucket of a sender, as balance.bpf.c finds it; None where nobody can say: at random, on some CPU.

        That a prefix of his may have a slot of its own is left out.
        """
        if self.key == "random" or (self.key == "cpu" and sender.cpu is None):
            return None
        return (sender.cpu or 0) % BUCKETS if self.key == "cpu" else self.hash(sender) % BUCKETS

    def hash(self, sender: Sender) -> int:
        """The hash of a sender's key, 64 bits, as balance.bpf.c computes it."""
        assert self.seed is not None
        fields = self._fields
        found = self.seed
        if fields & (_PAYLOAD | _QUIC):
            key = self.key_of(sender.payload)
            if key is None:
                fields = _SOURCE
            else:
                padded = key.ljust(24, b"\0")
                for start in range(0, 24, 8):
                    found = _mixed(found, int.from_bytes(padded[start : start + 8]))
        if fields & _SOURCE:
            for half in _halves(self.masked(sender.source)):
                found = _mixed(found, half)
        if fields & _DESTINATION:
            for half in _halves(number_of(sender.destination)):
                found = _mixed(found, half)
        if fields & (_SOURCE_PORT | _DESTINATION_PORT):
            source = sender.source_port if fields & _SOURCE_PORT else 0
            destination = sender.destination_port if fields & _DESTINATION_PORT else 0
            found = _mixed(found, source << 32 | destination)
        found = found * 0xBF58476D1CE4E5B9 & _WORD
        return found ^ found >> 32

    def key_of(self, payload: bytes) -> bytes | None:
        """The bytes of a payload that are the key; None where it is too short, or no QUIC packet, for that."""
        if self.key == "payload":
            start = self.offset
        elif not payload:
            return None
        elif payload[0] & 0x80:  # a long header: version, length of the id, id (RFC 9000, 17.2)
            if len(payload) < 6 or payload[5] < self.length:
                return None
            start = 6
        else:
            start = 1  # a short header (17.3.1)
        key = payload[start : start + self.length]
        return key if len(key) == self.length else None

    def masked(self, address: IPv4Address | IPv6Address) -> int:
        """What counts of a source address, as 128 bits; IPv4 mapped."""
        number = number_of(address)
        if number >> 32 == 0xFFFF:
            return number & (0xFFFF << 32 | self.mask4)
        return number & self.mask6


def number_of(address: IPv4Address | IPv6Address) -> int:
    """128 bits; IPv4 mapped."""
    return int(address) | (0xFFFF << 32 if address.version == 4 else 0)


def _halves(number: int) -> tuple[int, int]:
    return number >> 64, number & _WORD


def _mixed(found: int, word: int) -> int:
    found = (found ^ word) * 0x9E3779B97F4A7C15 & _WORD
    return found ^ found >> 32
