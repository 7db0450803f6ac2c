"""jhash: the kernel's hash of a few words, in user space (Bob Jenkins' lookup3, include/linux/jhash.h)."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["jhash"]

_INITVAL = 0xDEADBEEF  # JHASH_INITVAL
_WORD = (1 << 32) - 1


def jhash(words: Sequence[int], nonce: int) -> int:
    """jhash2() of three words of 32 bits, or four; of three it is jhash_3words()."""
    a = b = c = _INITVAL + (len(words) << 2) + nonce & _WORD
    a, b, c = a + words[0] & _WORD, b + words[1] & _WORD, c + words[2] & _WORD
    if len(words) == 4:
        a, c = _mixed(a, c, b, 4)
        b, a = _mixed(b, a, c, 6)
        c, b = _mixed(c, b, a, 8)
        a, c = _mixed(a, c, b, 16)
        b, a = _mixed(b, a, c, 19)
        c, b = _mixed(c, b, a, 4)
        a = a + words[3] & _WORD
    c = (c ^ b) - _rotated(b, 14) & _WORD
    a = (a ^ c) - _rotated(c, 11) & _WORD
    b = (b ^ a) - _rotated(a, 25) & _WORD
    c = (c ^ b) - _rotated(b, 16) & _WORD
    a = (a ^ c) - _rotated(c, 4) & _WORD
    b = (b ^ a) - _rotated(a, 14) & _WORD
    return (c ^ b) - _rotated(b, 24) & _WORD


def _rotated(word: int, by: int) -> int:
    return (word << by | word >> 32 - by) & _WORD


def _mixed(x: int, y: int, z: int, by: int) -> tuple[int, int]:
    return (x - y & _WORD) ^ _rotated(y, by), y + z & _WORD
