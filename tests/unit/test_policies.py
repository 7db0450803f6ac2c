"""Policies in words, what makes no sense, and the hash as the kernel's program computes it."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrecv.policies import ANCILLARY, BUCKETS, KEYS, Policy, Sender

ASKED = Sender(ip_address("198.51.100.7"), 4242, ip_address("192.0.2.1"), 443)
MAPPED = replace(ASKED, source=ip_address("::ffff:198.51.100.7"), destination=ip_address("::ffff:192.0.2.1"))
OTHER = Sender(ip_address("2001:db8::7"), 4242, ip_address("2001:db8:1::1"), 443)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("source", Policy()),
        ("source/24", Policy(prefix4=24)),
        ("source/29/125", Policy(prefix4=29, prefix6=125)),
        ("source/0/0", Policy(prefix4=0, prefix6=0)),
        ("source+port", Policy("source+port")),
        ("source+port/24/64", Policy("source+port", 24, 64)),
        ("flow", Policy("flow")),
        ("flow/32/64", Policy("flow", 32, 64)),
        ("destination", Policy("destination")),
        ("payload[16:4]", Policy("payload", offset=16, length=4)),
        ("payload[4]", Policy("payload", length=4)),
        ("payload[65535:20]", Policy("payload", offset=65535, length=20)),
        ("quic[8]", Policy("quic", length=8)),
        *((key, Policy(key)) for key in ("cpu", "random", *ANCILLARY)),  # type: ignore[arg-type] # they are keys
    ],
)
def test_words_are_read_and_written_alike(text: str, policy: Policy) -> None:
    assert Policy.parse(text) == policy
    assert Policy.parse(str(policy)) == policy
    assert Policy.parse(text, mapped="source", seed=5) == replace(policy, mapped="source", seed=5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "policy '': give source"),
        ("sauce", "policy 'sauce': give source"),
        ("Source", "policy 'Source': give source"),
        ("source ", "give source"),
        ("source/", "give source"),
        ("source/33", "prefixes of 33 and 128 bits: give 0 to 32 and 0 to 128"),
        ("source/32/129", "prefixes of 32 and 129 bits"),
        ("source/-1", "give source"),
        ("destination/24", "key 'destination' has no source address that a prefix could shorten"),
        ("cpu/24", "key 'cpu' has no source address"),
        ("payload", "key 'payload' of 0 bytes: give a length of 1 to 20"),
        ("payload[4:0]", "key 'payload' of 0 bytes"),
        ("payload[4:21]", "key 'payload' of 21 bytes: give a length of 1 to 20"),
        ("payload[65536:4]", "offset 65536: give 0 to 65535"),
        ("payload[4:]", "give source"),
        ("quic", "key 'quic' of 0 bytes: give a length of 1 to 20"),
        ("quic[21]", "key 'quic' of 21 bytes"),
        ("quic[1:8]", "policy 'quic[1:8]': give source"),
        ("source[4]", "key 'source' takes no length"),
        ("flow[0:4]", "policy 'flow[0:4]': give source"),
    ],
)
def test_words_that_make_no_sense_are_refused_with_those_that_do(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("[", r"\[")):
        Policy.parse(text)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"key": "sauce"}, "key 'sauce': give source, source"),
        ({"prefix4": 33}, "give 0 to 32"),
        ({"prefix6": -1}, "give 0 to 32 and 0 to 128"),
        ({"offset": 4}, "key 'source' takes no offset"),
        ({"key": "quic", "length": 8, "offset": 4}, "key 'quic' takes no"),
        ({"mapped": "port"}, "mapped 'port': give source or destination"),
        ({"seed": -1}, "seed -1: give 0 to 2"),
        ({"seed": 1 << 64}, "give 0 to 2"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Policy(**options)  # type: ignore[arg-type] # that is the point


def test_every_key_says_which_program_can_act_by_it() -> None:
    for key in (*KEYS, *ANCILLARY):
        policy = Policy(key, length=4 if key in ("payload", "quic") else 0)  # type: ignore[arg-type] # a key
        assert policy.ebpf == (key not in ANCILLARY)
        assert policy.classic == (key != "quic")
        assert not replace(policy, mapped="source").classic


# The hash: tests/kernel/test_balance*.py hold it against the program's own


def multiplied(found: int, factor: int) -> int:
    """In 64 bits, with the upper half folded in: bpf/balance.h, written out once more."""
    product = np.array([found], np.uint64) * np.uint64(factor)
    return int((product ^ product >> np.uint64(32))[0])


def hashed(seed: int, words: tuple[int, ...]) -> int:
    for word in words:
        seed = multiplied(seed ^ word, 0x9E3779B97F4A7C15)
    return multiplied(seed, 0xBF58476D1CE4E5B9)


SOURCE4 = (0, 0xFFFF_C633_6407)
TARGET4 = (0, 0xFFFF_C000_0201)
SOURCE6 = (0x2001_0DB8 << 32, 7)
TARGET6 = (0x2001_0DB8_0001_0000, 1)


@pytest.mark.parametrize(
    ("text", "sender", "words"),
    [
        ("source", ASKED, SOURCE4),
        ("source", MAPPED, SOURCE4),
        ("source", OTHER, SOURCE6),
        ("source/24/64", ASKED, (0, 0xFFFF_C633_6400)),
        ("source/24/64", OTHER, (0x2001_0DB8 << 32, 0)),
        ("source/0/0", ASKED, (0, 0xFFFF << 32)),
        ("source/0/0", OTHER, (0, 0)),
        ("source+port", ASKED, (*SOURCE4, 4242 << 32)),
        ("flow", ASKED, (*SOURCE4, *TARGET4, 4242 << 32 | 443)),
        ("flow", OTHER, (*SOURCE6, *TARGET6, 4242 << 32 | 443)),
        ("destination", MAPPED, TARGET4),
        ("payload[1:3]", replace(ASKED, payload=b"abcdef"), (0x62_63_64_00_00_00_00_00, 0, 0)),
        ("payload[0:9]", replace(ASKED, payload=b"abcdefghij"), (0x6162636465666768, 0x69 << 56, 0)),
        ("payload[4:3]", replace(ASKED, payload=b"abcdef"), SOURCE4),
        ("quic[2]", replace(ASKED, payload=b"\x40\x01\x02\x03"), (0x0102 << 48, 0, 0)),
        ("quic[2]", replace(ASKED, payload=b"\xc0\x00\x00\x00\x01\x02\x08\x09"), (0x0809 << 48, 0, 0)),
        ("quic[2]", replace(ASKED, payload=b"\xc0\x00\x00\x00\x01\x01\x08\x09"), SOURCE4),
        ("quic[2]", replace(ASKED, payload=b"\xc0\x00\x00\x00\x01"), SOURCE4),
        ("quic[2]", replace(ASKED, payload=b"\x40\x01"), SOURCE4),
        ("quic[2]", ASKED, SOURCE4),
    ],
)
def test_the_hash_is_of_these_words(text: str, sender: Sender, words: tuple[int, ...]) -> None:
    policy = Policy.parse(text, seed=0x0123456789ABCDEF)
    assert policy.hash(sender) == hashed(0x0123456789ABCDEF, words)
    assert policy.bucket(sender) == hashed(0x0123456789ABCDEF, words) % BUCKETS


def test_nobody_can_say_where_chance_or_an_unknown_cpu_leads() -> None:
    assert Policy("random", seed=0).bucket(ASKED) is None
    assert Policy("cpu", seed=0).bucket(ASKED) is None
    assert Policy("cpu", seed=0).bucket(replace(ASKED, cpu=3)) == 3
    assert Policy("cpu", seed=0).bucket(replace(ASKED, cpu=BUCKETS + 3)) == 3


@given(st.integers(0, (1 << 32) - 1), st.integers(0, 32), st.integers(0, 65535))
def test_what_a_prefix_leaves_out_makes_no_difference(number: int, bits: int, port: int) -> None:
    policy = Policy(prefix4=bits, seed=1)
    network = number >> 32 - bits << 32 - bits
    assert policy.hash(replace(ASKED, source=ip_address(number), source_port=port)) == policy.hash(
        replace(ASKED, source=ip_address(network))
    )


def test_another_seed_is_another_order() -> None:
    first = [Policy(seed=1).bucket(replace(ASKED, source=ip_address(number))) for number in range(64)]
    second = [Policy(seed=2).bucket(replace(ASKED, source=ip_address(number))) for number in range(64)]
    assert sum(one == other for one, other in zip(first, second, strict=True)) < 5


def test_the_hash_spreads_neighbours_evenly() -> None:
    policy = Policy(seed=0)
    found = [policy.bucket(Sender(ip_address(f"10.{a}.{b}.1"), 1, ip_address("10.0.0.1"), 1)) for a in range(64)
             for b in range(256)]  # fmt: skip
    counts = np.bincount(np.array(found, int), minlength=BUCKETS)
    assert abs(counts.var() / counts.mean() - 1) < 0.1, "as many as a random hash puts together, no more"
