"""Millions of datagrams through one Receiver, views of them held at random: every checksum right, nothing leaked."""

from __future__ import annotations

import os
import random
import struct
import zlib
from pathlib import Path

import pytest

from fastrecv import Receiver

HEAD = struct.Struct("<IQ")  # checksum of all that follows; number
BODIES = random.Random(1).randbytes(1 << 20)


def payload(number: int) -> bytes:
    """Datagram `number`: runs of one size, so that many leave as trains."""
    size = (number // 50 * 7919) % 1400
    start = number * 64 % (len(BODIES) - 1400)
    rest = number.to_bytes(8, "little") + BODIES[start : start + size]
    return zlib.crc32(rest).to_bytes(4, "little") + rest


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("gro", [False, True], ids=["", "gro"])
@pytest.mark.parametrize("total", [100_000, pytest.param(10_000_000, marks=pytest.mark.proof)])
def test_every_checksum_is_right_and_nothing_is_leaked(total: int, gro: bool) -> None:
    draw = random.Random(total)
    before, first = descriptors(), 0
    levels: list[int] = []
    held: list[tuple[memoryview, int]] = []
    where = ("127.0.0.1", 0)
    with (
        Receiver.bind(where, gro=gro, arenas=4, max_arenas=40, receive_buffer=32 << 20) as receiver,
        Receiver.bind(where) as sender,
    ):
        while first < total:
            count = min(draw.randrange(1, 400), total - first)
            assert sender.send([payload(number) for number in range(first, first + count)], receiver.address) == count
            last = first + count
            while first < last:
                batch = receiver.recv(5)
                assert batch, f"{last - first} datagrams are missing"
                for view, _ in batch:
                    checksum, number = HEAD.unpack_from(view)
                    assert number == first
                    assert checksum == zlib.crc32(view[4:])
                    first += 1
                if draw.random() < 0.4:
                    held.append((view, number))
            while len(held) > draw.randrange(30):
                view, number = held.pop(draw.randrange(len(held)))
                assert view == payload(number)
            if first // (total // 20) > len(levels):
                levels.append(resident())
        assert receiver.drops == 0
        assert receiver.statistics().datagrams == total
        assert receiver.statistics().truncated == 0
    assert all(view == payload(number) for view, number in held)
    assert descriptors() == before
    # From the first quarter on all arenas stand; what grows after that would be leaked with the traffic.
    print(f"\nresident: {[level >> 20 for level in levels]} MiB")
    assert max(levels[5:]) - levels[5] < 8 << 20
