"""Filter: a policy as a classic BPF program, the same in user space, and its way into a reuseport group."""

from __future__ import annotations

import ctypes
import secrets
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from fastrecv.classic.instructions import (
    HEADER_LENGTH,
    LOAD_BEHIND,
    LOAD_X,
    NET,
    RECALL,
    RETURN,
    STORE,
    TAX,
    TXA,
    ZERO,
    Instruction,
    alu,
    jump,
    ld,
    packed,
)
from fastrecv.policies import Policy, Sender
from fastrecv.reuseport import set_program

__all__ = ["MAX_SIZE", "Filter"]

MAX_SIZE = 65535  # members of a group: U16_MAX, net/core/sock_reuseport.c

# include/uapi/asm-generic/socket.h
_SO_ATTACH_REUSEPORT_CBPF = 51
_IPPROTO_TCP, _IPPROTO_UDP = 6, 17  # include/uapi/linux/in.h
_ETHERTYPES = {4: 0x0800, 6: 0x86DD}  # include/uapi/linux/if_ether.h
_UNHASHED = {
    "cpu": "cpu", "random": "rand", "rxhash": "rxhash", "interface": "ifidx",
    "mark": "mark", "queue": "queue", "vlan": "vlan_tci", "protocol": "proto",
}  # fmt: skip
_WORD = (1 << 32) - 1
_GOLDEN = 0x9E3779B1  # a prime near 2^32 / golden ratio
_FINISH = ((0x85EBCA6B, 13), (0xC2B2AE35, 16))  # multipliers and shifts that end MurmurHash3's 32-bit hash


@dataclass(frozen=True)
class Filter:
    """A policy in classic BPF for a reuseport group of `size` members. No privilege is needed, and no libbpf.

    policy : with a seed, drawn where it had none. size : as many as the group has members; more, and those who come to
    a number that nobody has go by the kernel's hash; fewer, and the last members get nothing.

    ValueError for a policy that classic BPF cannot act by (Policy.classic), and for a size that no group has.
    """

    policy: Policy
    size: int
    instructions: tuple[Instruction, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise TypeError(f"policy {self.policy!r}: give a Policy, Policy.parse('source') say")
        if not self.policy.classic:
            what = f"prefixes mapped by {self.policy.mapped}" if self.policy.mapped else f"key {self.policy.key!r}"
            raise ValueError(f"{what}: classic BPF has no such thing, use fastrecv.balance")
        if not 1 <= self.size <= MAX_SIZE:
            raise ValueError(f"a group of {self.size} members: give 1 to {MAX_SIZE}")
        if self.policy.seed is None:
            object.__setattr__(self, "policy", replace(self.policy, seed=secrets.randbits(64)))
        object.__setattr__(self, "instructions", tuple(self._program()))

    def index(self, sender: Sender) -> int | None:
        """Whose a sender is: the place of a member in the group. None where a Sender does not say it.

        That is so of random, rxhash, interface, mark, queue and vlan, and of cpu where the sender's is not known.
        """
        version = _version(sender)
        if self.policy.key in _UNHASHED:
            known = {"cpu": sender.cpu, "protocol": _ETHERTYPES[version]}.get(self.policy.key)
            return None if known is None else known % self.size
        key = self.policy.key_of(sender.payload) if self.policy.key == "payload" else None
        if key is not None:
            return self._hashed(int.from_bytes(key[start : start + size]) for start, size in _pieces(len(key)))
        return self._hashed(self._words_of(sender, version))

    def attach(self, sock: socket.socket) -> None:
        """Attach to the group of a socket that is bound and, for TCP, listens. SocketRefusedError, with the cure.

        It replaces whatever program the group has, eBPF or classic, without a word: only who made the group knows.
        """
        program = packed(self.instructions)
        buffer = ctypes.create_string_buffer(program, len(program))
        fprog = struct.pack("@HP", len(self.instructions), ctypes.addressof(buffer))  # struct sock_fprog
        set_program(sock, _SO_ATTACH_REUSEPORT_CBPF, fprog)

    def _program(self) -> Iterator[Instruction]:
        if self.policy.key in _UNHASHED:
            yield from (ld(_UNHASHED[self.policy.key]), alu("mod", self.size), RETURN)
            return
        yield self._seeding()
        if self.policy.key == "payload":
            # A load behind the packet's end would end the program with 0: the first member's, not his.
            start, length = self.policy.offset, self.policy.length
            pieces = [mixed for at, size in _pieces(length) for mixed in _mixing(ld(start + at, size))]
            block = [*pieces, *self._finishing()]
            yield from (ld("len"), jump("jge", start + length, 0, len(block)), *block)
        four = [*self._ports(4), *self._words(4), *self._finishing()]
        yield from (ld("proto"), jump("jeq", _ETHERTYPES[4], 0, len(four)), *four)
        yield from (*self._ports(6), *self._words(6), *self._finishing())

    def _places(self, version: int) -> Iterator[tuple[int, int]]:
        """Of what is hashed of the IP header: offsets of words, and which of their bits count."""
        if self.policy.key != "destination":
            mask = self.policy.mask4 if version == 4 else self.policy.mask6
            words = {4: (12,), 6: (8, 12, 16, 20)}[version]  # RFC 791, RFC 8200
            for offset in words:
                if bits := mask >> 8 * (words[-1] - offset) & _WORD:
                    yield offset, bits
        if self.policy.key in ("destination", "flow"):
            yield from ((offset, _WORD) for offset in {4: (16,), 6: (24, 28, 32, 36)}[version])

    def _words(self, version: int) -> Iterator[Instruction]:
        for offset, bits in self._places(version):
            yield from _mixing(ld(NET + offset), *([] if bits == _WORD else [alu("and", bits)]))
        if self.policy.key in ("source+port", "flow"):
            yield from _mixing(RECALL)

    def _ports(self, version: int) -> list[Instruction]:
        """Put what counts of the ports into M[0]: source and destination, or the source's alone.

        In IPv6 they stand behind the fixed header, or count as 0: extension headers may be anywhere and many.
        """
        if self.policy.key not in ("source+port", "flow"):
            return []
        alone = [alu("rsh", 16)] if self.policy.key == "source+port" else []
        if version == 4:
            return [HEADER_LENGTH, LOAD_BEHIND, *alone, STORE, self._seeding()]
        found = [ld(NET + 40), *alone, STORE]
        return [
            ZERO, STORE, ld(NET + 6, 1),
            jump("jeq", _IPPROTO_TCP, 1, 0), jump("jeq", _IPPROTO_UDP, 0, len(found)), *found,
        ]  # fmt: skip

    def _seeding(self) -> Instruction:
        """X holds the hash, but for where it is needed to find the ports."""
        return LOAD_X._replace(k=(self.policy.seed or 0) & _WORD)

    def _finishing(self) -> list[Instruction]:
        """From the hash in X to a member."""
        done = [TXA, alu("xor", (self.policy.seed or 0) >> 32)]
        for factor, shift in _FINISH:
            done += [alu("mul", factor), TAX, alu("rsh", shift), alu("xor")]
        return [*done, alu("mod", self.size), RETURN]

    def _hashed(self, words: Iterable[int]) -> int:
        """What the instructions of `_mixing` and `_finishing` come to."""
        assert self.policy.seed is not None
        found = self.policy.seed & _WORD
        for word in words:
            found = (found ^ word) * _GOLDEN & _WORD
            found ^= found >> 16
        found ^= self.policy.seed >> 32
        for factor, shift in _FINISH:
            found = found * factor & _WORD
            found ^= found >> shift
        return found % self.size

    def _words_of(self, sender: Sender, version: int) -> Iterator[int]:
        header = {4: slice(12, 20), 6: slice(8, 40)}[version]
        addresses = b"".join(int(address).to_bytes(16)[-4 if version == 4 else 0 :]
                             for address in (sender.source, sender.destination))  # fmt: skip
        packet = bytes(header.start) + addresses
        for offset, bits in self._places(version):
            yield int.from_bytes(packet[offset : offset + 4]) & bits
        if self.policy.key == "source+port":
            yield sender.source_port
        elif self.policy.key == "flow":
            yield sender.source_port << 16 | sender.destination_port


def _mixing(*loading: Instruction) -> list[Instruction]:
    """Mix what is loaded into A into the hash in X."""
    return [*loading, alu("xor"), alu("mul", _GOLDEN), TAX, alu("rsh", 16), alu("xor"), TAX]


def _pieces(length: int) -> Iterator[tuple[int, int]]:
    """Where loads of 4, 2 and 1 bytes begin that make up a key, and how much each takes."""
    start = 0
    for size in (4, 2, 1):
        while length - start >= size:
            yield start, size
            start += size


def _version(sender: Sender) -> int:
    """Of the packet: a mapped address is one of IPv4."""
    source = sender.source
    return 6 if source.version == 6 and source.ipv4_mapped is None else 4
