"""Classic BPF: its instructions as the kernel takes them, put together by name, and written out for people.

Codes, offsets and ancillary data: include/uapi/linux/bpf_common.h and filter.h. What reads best is the notation of
Documentation/networking/filter.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["ANCILLARY", "NET", "Instruction", "alu", "disassembled", "jump", "ld", "packed"]

NET = 0xFFF00000  # SKF_NET_OFF: from here on offsets count from the IP header
_ANCILLARY_OFFSET = 0xFFFFF000  # SKF_AD_OFF
ANCILLARY = {
    "proto": 0,
    "ifidx": 8,
    "mark": 20,
    "queue": 24,
    "rxhash": 32,
    "cpu": 36,
    "vlan_tci": 44,
    "rand": 56,
}
"""What the kernel knows of a packet, by its name in filter.rst, as an SKF_AD_* number."""

_LD, _LDX, _ST, _ALU, _JMP, _RET, _MISC = 0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x07
_ABS, _IND, _MEM, _LEN, _MSH = 0x20, 0x40, 0x60, 0x80, 0xA0
_X, _A = 0x08, 0x10
_SIZES = {4: (0x00, "ld"), 2: (0x08, "ldh"), 1: (0x10, "ldb")}
_OPERATIONS = {"and": 0x50, "rsh": 0x70, "mul": 0x20, "mod": 0x90, "xor": 0xA0}
_JUMPS = {"jeq": 0x10, "jge": 0x30}


class Instruction(NamedTuple):
    """struct sock_filter: jt and jf say how many instructions a jump passes over, k is the operand."""

    code: int
    jt: int = 0
    jf: int = 0
    k: int = 0


def ld(what: str | int, size: int = 4) -> Instruction:
    """Load `size` bytes from an offset, or ancillary data by its name ("len" is the packet's), into A."""
    if what == "len":
        return Instruction(_LD | _LEN)
    if isinstance(what, str):
        return Instruction(_LD | _ABS, k=_ANCILLARY_OFFSET + ANCILLARY[what])
    return Instruction(_LD | _SIZES[size][0] | _ABS, k=what)


def alu(name: str, k: int | None = None) -> Instruction:
    """A = A `name` k; without k, X."""
    return Instruction(_ALU | _OPERATIONS[name] | (_X if k is None else 0), k=k or 0)


def jump(name: str, k: int, jt: int, jf: int) -> Instruction:
    """If A `name` k pass over jt instructions, else over jf."""
    return Instruction(_JMP | _JUMPS[name], jt, jf, k)


LOAD_X = Instruction(_LDX)  # with k: X = k
HEADER_LENGTH = Instruction(_LDX | _SIZES[1][0] | _MSH, k=NET)  # X = length of an IPv4 header
LOAD_BEHIND = Instruction(_LD | _IND, k=NET)  # A = the word at the IP header + X
ZERO = Instruction(_LD)  # A = 0
STORE = Instruction(_ST)  # M[0] = A
RECALL = Instruction(_LD | _MEM)  # A = M[0]
TAX, TXA = Instruction(_MISC), Instruction(_MISC | 0x80)
RETURN = Instruction(_RET | _A)


def packed(instructions: Iterable[Instruction]) -> bytes:
    """As the kernel reads them: an array of struct sock_filter."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


def disassembled(instructions: Iterable[Instruction]) -> str:
    """One line an instruction, such as `l2: ldb [net+6]` or `l3: jeq #0x6, l5, l4`; ValueError for what is none.

    The notation of Documentation/networking/filter.rst. [net+12] is SKF_NET_OFF + 12, byte 12 of the IP header; [12] is
    byte 12 of the payload.
    """
    return "\n".join(f"l{number}: {_text(number, one)}" for number, one in enumerate(instructions))


def _text(number: int, one: Instruction) -> str:
    place = f"net+{one.k - NET}" if NET <= one.k < _ANCILLARY_OFFSET else str(one.k)
    forms = {
        _LD: f"ld #{one.k:#x}", _LD | _LEN: "ld #len", RECALL.code: f"ld M[{one.k}]", STORE.code: f"st M[{one.k}]",
        LOAD_BEHIND.code: f"ld [x + {place}]", LOAD_X.code: f"ldx #{one.k:#x}",
        HEADER_LENGTH.code: f"ldxb 4*([{place}]&0xf)", TAX.code: "tax", TXA.code: "txa", RETURN.code: "ret a",
    }  # fmt: skip
    forms |= {_LD | size | _ABS: f"{name} [{place}]" for size, name in _SIZES.values()}
    forms |= {_ALU | code: f"{name} #{one.k:#x}" for name, code in _OPERATIONS.items()}
    forms |= {_ALU | code | _X: f"{name} x" for name, code in _OPERATIONS.items()}
    ends = f"l{number + 1 + one.jt}, l{number + 1 + one.jf}"
    forms |= {_JMP | code: f"{name} #{one.k:#x}, {ends}" for name, code in _JUMPS.items()}
    for name in ANCILLARY:
        if one == ld(name):
            return f"ld #{name}"
    if one.code not in forms:
        raise ValueError(f"instruction {number}, code {one.code:#x}, is none that a filter of fastrecv has")
    return forms[one.code]
