"""Filters in classic BPF: what they say by themselves is what their instructions do, run here one by one."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrecv.classic import MAX_SIZE, Filter, Instruction, disassembled
from fastrecv.policies import ANCILLARY, KEYS, MAX_KEY, Key, Policy, Sender

NET, EXTRA, WORD = 0xFFF00000, 0xFFFFF000, 0xFFFFFFFF
PROTO, CPU = 0, 36
HASHED: tuple[Key, ...] = ("source", "source+port", "flow", "destination", "payload")

v4 = st.integers(0, 2**32 - 1).map(IPv4Address)
v6 = st.integers(0, 2**128 - 1).map(IPv6Address).filter(lambda address: address.ipv4_mapped is None)
ports = st.integers(0, 65535)
pairs = st.one_of(st.tuples(v4, v4), st.tuples(v6, v6))
senders = st.builds(
    lambda pair, *rest: Sender(pair[0], rest[0], pair[1], *rest[1:]), pairs, ports, ports, st.binary(max_size=40),
    st.integers(0, 500),
)  # fmt: skip


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    key = draw(st.sampled_from(HASHED))
    seed = draw(st.integers(0, 2**64 - 1))
    if key == "payload":
        return Policy(key, offset=draw(st.integers(0, 30)), length=draw(st.integers(1, MAX_KEY)), seed=seed)
    if key == "destination":
        return Policy(key, seed=seed)
    return Policy(key, draw(st.integers(0, 32)), draw(st.integers(0, 128)), seed=seed)


class FailedLoadError(Exception):
    pass


def bytes_of(where: int, size: int, header: bytes, payload: bytes) -> int:
    data, start = (header, where - NET) if where >= NET else (payload, where)
    if start + size > len(data):
        raise FailedLoadError
    return int.from_bytes(data[start : start + size])


def run(  # noqa: PLR0912 - a case an instruction
    program: tuple[Instruction, ...], header: bytes, payload: bytes, extra: dict[int, int]
) -> int:
    """A machine for those instructions, by Documentation/networking/filter.rst; checks what net/core/filter.c does."""
    a, x, at = 0, 0, 0
    m: dict[int, int] = {}
    while True:
        code, jt, jf, k = program[at]
        at += 1
        size = {0x00: 4, 0x08: 2, 0x10: 1}.get(code & 0x18, 0)
        operand = x if code & 0x08 else k
        match code:
            case 0x20 | 0x28 | 0x30 if k >= EXTRA:
                a = extra[k - EXTRA]
            case 0x20 | 0x28 | 0x30:
                a = bytes_of(k, size, header, payload)
            case 0x40:
                a = bytes_of(k + x & WORD, size, header, payload)
            case 0xB1:
                x = 4 * (bytes_of(k, 1, header, payload) & 15)
            case 0x80:
                a = len(payload)
            case 0x00:
                a = k
            case 0x01:
                x = k
            case 0x02:
                m[k] = a
            case 0x60:
                a = m[k]
            case 0x07:
                x = a
            case 0x87:
                a = x
            case 0x54:
                a &= k
            case 0x74:
                a >>= k
            case 0x24:
                a = a * k & WORD
            case 0x94:
                a %= k
            case 0xA4 | 0xAC:
                a ^= operand
            case 0x15:
                at += jt if a == k else jf
            case 0x35:
                at += jt if a >= k else jf
            case 0x16:
                return a
            case _:
                raise AssertionError(f"code {code:#x}")


def header_of(sender: Sender, protocol: int, options: bytes = b"", extension: bool = False) -> bytes:
    """IP and the first four bytes behind it."""
    ends = sender.source.packed + sender.destination.packed
    behind = sender.source_port.to_bytes(2) + sender.destination_port.to_bytes(2)
    if sender.source.version == 4:
        return bytes([0x45 + len(options) // 4]) + bytes(8) + bytes([protocol]) + bytes(2) + ends + options + behind
    if extension:  # destination options: next header, 8 bytes (RFC 8200, 4.6)
        return bytes([0x60]) + bytes(5) + bytes([60, 64]) + ends + bytes([protocol, 0, 1, 4, 0, 0, 0, 0]) + behind
    return bytes([0x60]) + bytes(5) + bytes([protocol, 64]) + ends + behind


def taken(made: Filter, sender: Sender, header: bytes) -> int:
    known = {PROTO: 0x0800 if header[0] >> 4 == 4 else 0x86DD, CPU: sender.cpu or 0}
    return run(made.instructions, header, sender.payload, known)


@given(policies(), st.integers(1, MAX_SIZE), senders, st.sampled_from([6, 17]), st.integers(0, 10))
def test_the_instructions_come_to_the_member_that_the_filter_names(
    policy: Policy, size: int, sender: Sender, protocol: int, options: int
) -> None:
    made = Filter(policy, size)
    assert taken(made, sender, header_of(sender, protocol, bytes(4 * options))) == made.index(sender)


@given(policies(), st.integers(1, 200), senders)
def test_ports_behind_extension_headers_count_as_0(policy: Policy, size: int, sender: Sender) -> None:
    made = Filter(policy, size)
    portless = Sender(sender.source, 0, sender.destination, 0, sender.payload)
    same = sender if sender.source.version == 4 else portless
    assert taken(made, sender, header_of(sender, 17, extension=True)) == made.index(same)


@given(policies(), st.integers(1, 200), st.tuples(v4, v4), ports, st.binary(max_size=40))
def test_mapped_addresses_are_those_of_ipv4(
    policy: Policy, size: int, pair: tuple[IPv4Address, IPv4Address], port: int, payload: bytes
) -> None:
    made = Filter(policy, size)
    mapped = [IPv6Address(f"::ffff:{address}") for address in pair]
    assert made.index(Sender(mapped[0], port, mapped[1], 53, payload)) == made.index(
        Sender(pair[0], port, pair[1], 53, payload)
    )


@given(st.integers(1, MAX_SIZE), senders)
def test_what_is_not_hashed_is_taken_modulo_the_size(size: int, sender: Sender) -> None:
    for key, value in ("cpu", sender.cpu or 0), ("protocol", 0x0800 if sender.source.version == 4 else 0x86DD):
        made = Filter(Policy.parse(key), size)
        assert made.index(sender) == value % size == taken(made, sender, header_of(sender, 17))


def test_nobody_says_where_a_sender_goes_when_the_sender_does_not_tell() -> None:
    sender = Sender(ip_address("192.0.2.1"), 1, ip_address("192.0.2.2"), 2)
    for key in ("random", "rxhash", "interface", "mark", "queue", "vlan", "cpu"):
        made = Filter(Policy.parse(key), 4)
        assert made.index(sender) is None
        assert run(made.instructions, b"", b"", dict.fromkeys(range(60), 11)) == 3


@pytest.mark.parametrize("size", [2, 3, 8, 100])
@pytest.mark.parametrize("text", ["source", "source+port", "flow", "destination", "payload[0:6]"])
def test_neighbours_are_spread_evenly(text: str, size: int) -> None:
    made = Filter(Policy.parse(text, seed=1), size)
    count = 400 * size
    found = Counter(
        made.index(Sender(ip_address(167772160 + n), 1000, ip_address(167837696 + n), 53, n.to_bytes(6)))
        for n in range(count)
    )
    # Chi-square: expected is the number of members, with a deviation of the root of twice that.
    assert sum((found[member] - 400) ** 2 / 400 for member in range(size)) < size + 5 * (2 * size) ** 0.5


def test_a_seed_is_drawn_and_kept_and_a_policys_own_is_used() -> None:
    sender = [Sender(ip_address(167772160 + n), 1, ip_address("10.9.9.9"), 1) for n in range(64)]
    first, second = Filter(Policy(), 1000), Filter(Policy(), 1000)
    assert first.policy.seed is not None
    assert [first.index(one) for one in sender] != [second.index(one) for one in sender]
    assert Filter(first.policy, 1000) == first
    assert Filter(first.policy, 1000).instructions == first.instructions
    upper, lower = Filter(Policy(seed=1 << 32), 1000), Filter(Policy(seed=1), 1000)
    assert [upper.index(one) for one in sender] != [lower.index(one) for one in sender], "all 64 bits count"


def test_a_prefix_stays_together_and_its_neighbour_goes_its_own_way() -> None:
    made = Filter(Policy("source", 24, 64, seed=3), 1000)

    def at(address: str) -> int | None:
        return made.index(Sender(ip_address(address), 1, ip_address("::1" if ":" in address else "10.0.0.1"), 1))

    assert at("10.1.2.3") == at("10.1.2.200") != at("10.1.3.3")
    assert at("2001:db8::1") == at("2001:db8::ffff:1") != at("2001:db8:0:1::1")


@pytest.mark.parametrize(
    ("policy", "size", "reason"),
    [
        (Policy("quic", length=8), 2, "key 'quic': classic BPF has no such thing, use fastrecv.balance"),
        (Policy(mapped="source"), 2, "prefixes mapped by source: classic BPF has no such thing"),
        (Policy(), 0, "a group of 0 members: give 1 to 65535"),
        (Policy(), 65536, "a group of 65536 members: give 1 to 65535"),
    ],
)
def test_what_classic_bpf_cannot_do_is_refused(policy: Policy, size: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Filter(policy, size)


TEXTS = [key for key in (*KEYS, *ANCILLARY) if key not in ("payload", "quic")]
EVERY = [
    Filter(Policy.parse(text), 5)
    for text in (*TEXTS, "source/20/57", "source+port/20/57", "flow/0/0", "payload[65000:7]", "payload[0:4]")
]


ASSEMBLY = {
    "st M[K]": 0x02, "ld M[K]": 0x60, "tax": 0x07, "txa": 0x87, "ret a": 0x16, "ld #len": 0x80, "ldx #K": 0x01,
    "ld [K]": 0x20, "ldh [K]": 0x28, "ldb [K]": 0x30, "ld [x + K]": 0x40, "ldxb 4*([K]&0xf)": 0xB1, "ld #K": 0x00,
    "and #K": 0x54, "rsh #K": 0x74, "mul #K": 0x24, "mod #K": 0x94, "xor #K": 0xA4, "xor x": 0xAC, "jeq #K": 0x15,
    "jge #K": 0x35,
}  # fmt: skip
EXTENSIONS = {
    "proto": 0, "ifidx": 8, "mark": 20, "queue": 24, "rxhash": 32, "cpu": 36, "vlan_tci": 44, "rand": 56,
}  # fmt: skip


FORMS = {
    re.compile(re.escape(form).replace("K", r"(?P<net>net\+)?(?P<k>0x[0-9a-f]+|[0-9]+)")): code
    for form, code in ASSEMBLY.items()
}


def assembled(text: str) -> Iterator[Instruction]:
    """The other way, by the opcodes of include/uapi/linux/bpf_common.h."""
    for number, line in enumerate(text.splitlines()):
        label, _, rest = line.partition(": ")
        assert label == f"l{number}"
        command, *targets = rest.split(", ")
        jt, jf = (int(target[1:]) - number - 1 for target in targets) if targets else (0, 0)
        name = command.removeprefix("ld #")
        if name in EXTENSIONS:
            yield Instruction(0x20, k=EXTRA + EXTENSIONS[name])
            continue
        ((found, code),) = ((match, code) for form, code in FORMS.items() if (match := form.fullmatch(command)))
        values = found.groupdict()
        yield Instruction(code, jt, jf, int(values.get("k") or "0", 0) + (NET if values.get("net") else 0))


@pytest.mark.parametrize("made", EVERY, ids=lambda made: str(made.policy))
def test_what_is_disassembled_can_be_assembled_again(made: Filter) -> None:
    assert tuple(assembled(disassembled(made.instructions))) == made.instructions


def test_every_instruction_that_there_is_was_disassembled_above() -> None:
    forms = {line.partition(": ")[2].partition(" ")[0] for made in EVERY
             for line in disassembled(made.instructions).splitlines()}  # fmt: skip
    assert forms == {form.partition(" ")[0] for form in ASSEMBLY}


def test_a_program_reads_like_the_kernels_documentation() -> None:
    assert disassembled(Filter(Policy("cpu"), 4).instructions) == "l0: ld #cpu\nl1: mod #0x4\nl2: ret a"
    lines = disassembled(Filter(Policy("source", 24, 0, seed=7), 4).instructions).splitlines()
    assert lines[:5] == ["l0: ldx #0x7", "l1: ld #proto", "l2: jeq #0x800, l3, l23", "l3: ld [net+12]",
                         "l4: and #0xffffff00"]  # fmt: skip
    assert lines[-2:] == ["l33: mod #0x4", "l34: ret a"]


def test_what_is_no_instruction_of_a_filter_is_named() -> None:
    with pytest.raises(ValueError, match="instruction 1, code 0x84, is none that a filter of fastrecv has"):
        disassembled([Instruction(0x16), Instruction(0x84)])


def test_it_needs_no_libbpf() -> None:
    code = "import sys, fastrecv.classic; sys.exit(any(name.startswith('fastrecv._bpf') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
