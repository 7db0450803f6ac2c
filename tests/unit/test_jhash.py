"""The kernel's jhash in user space, against the hash of bytes that it was made from."""

from __future__ import annotations

import numpy as np
import pytest

from fastrecv.jhash import jhash

WORD = 0xFFFFFFFF


def turned(word: int, by: int) -> int:
    bits = f"{word:032b}"
    return int(bits[by:] + bits[:by], 2)


def lookup3(data: bytes, seed: int) -> int:
    """hashlittle() of lookup3.c, one statement after the other (burtleburtle.net/bob/c/lookup3.c, public domain)."""
    state = dict.fromkeys("abc", 0xDEADBEEF + len(data) + seed & WORD)

    def take(block: bytes) -> None:
        for number, name in enumerate("abc"):
            state[name] = state[name] + int.from_bytes(block[4 * number : 4 * number + 4], "little") & WORD

    while len(data) > 12:
        take(data[:12])
        data = data[12:]
        for x, y, z, by in (
            ("a", "c", "b", 4), ("b", "a", "c", 6), ("c", "b", "a", 8),
            ("a", "c", "b", 16), ("b", "a", "c", 19), ("c", "b", "a", 4),
        ):  # fmt: skip
            state[x] = state[x] - state[y] & WORD
            state[x] ^= turned(state[y], by)
            state[y] = state[y] + state[z] & WORD
    if data:
        take(data)
        for x, y, by in zip("cabcabc", "bcabcab", (14, 11, 25, 16, 4, 14, 24), strict=True):
            state[x] ^= state[y]
            state[x] = state[x] - turned(state[y], by) & WORD
    return state["c"]


@pytest.mark.parametrize(
    ("data", "seed", "expected"),
    [
        (b"", 0, 0xDEADBEEF),
        (b"", 0xDEADBEEF, 0xBD5B7DDE),
        (b"Four score and seven years ago", 0, 0x17770551),
        (b"Four score and seven years ago", 1, 0xCD628161),
    ],
)
def test_the_reference_gives_what_its_author_printed(data: bytes, seed: int, expected: int) -> None:
    """driver5() of lookup3.c."""
    assert lookup3(data, seed) == expected


@pytest.mark.parametrize("length", [3, 4])
def test_words_are_hashed_as_their_bytes_by_the_reference(length: int) -> None:
    rng = np.random.default_rng(length)
    for row in rng.integers(0, 1 << 32, (2000, length + 1)).tolist():
        words, seed = row[:-1], row[-1]
        assert jhash(words, seed) == lookup3(b"".join(word.to_bytes(4, "little") for word in words), seed)


def test_the_edges_of_a_word_are_hashed_as_well() -> None:
    for words in ([0, 0, 0], [WORD] * 3, [0] * 4, [WORD] * 4):
        for seed in (0, 1, WORD):
            assert jhash(words, seed) == lookup3(b"".join(word.to_bytes(4, "little") for word in words), seed)
