"""What somebody holds of a receiver: batches, copies and views in any order, none of whose bytes may ever change."""

from __future__ import annotations

import random
import struct

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastrecv import Batch

__all__ = ["Holding", "content"]


def content(number: int, most: int = 1500) -> bytes:
    """What datagram `number` says: its number, and as many bytes as that gives, none of them by chance."""
    return struct.pack("<Q", number) + random.Random(number).randbytes(number * 37 % most)


class Holding(RuleBasedStateMachine):
    """Look, copy and let go in any order: every byte that anybody holds stays what was sent.

    What is held stands in lists of its own, since Hypothesis keeps what goes into its bundles. most : of `content`.
    """

    most = 1500

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[Batch, list[int]]] = []
        self.views: list[tuple[memoryview, bytes]] = []

    def content(self, number: int) -> bytes:
        return content(number, self.most)

    @precondition(lambda self: self.batches)
    @rule(which=st.integers(0, 99), row=st.integers(0, 99), kind=st.integers(0, 7))
    def look(self, which: int, row: int, kind: int) -> None:
        batch, numbers = self.batches[which % len(self.batches)]
        if not numbers:
            return
        i = row % len(numbers)
        whole = self.content(numbers[i])
        start, size = int(batch.offsets[i]), int(batch.lengths[i])
        lengths = np.array([len(self.content(number)) for number in numbers], np.int32)
        self.views.append((
            lambda: (batch[i], whole),
            lambda: (batch.data[start : start + size].data, whole),
            lambda: (batch.lengths.data, lengths.tobytes()),
            lambda: (batch.records("<u8").data, np.array(numbers, np.uint64).tobytes()),
            lambda: (batch.records("<u8")[i : i + 1].data, whole[:8]),
            lambda: (np.frombuffer(batch[i], np.uint8)[:5].data, whole[:5]),
            lambda: (batch[i][2:], whole[2:]),
            lambda: (batch.packed()[0].data, b"".join(map(self.content, numbers))),
        )[kind]())  # fmt: skip

    @precondition(lambda self: self.batches)
    @rule(which=st.integers(0, 99))
    def copy(self, which: int) -> None:
        batch, numbers = self.batches[which % len(self.batches)]
        self.batches.append((batch.copy(), numbers))

    @precondition(lambda self: self.batches)
    @rule(which=st.integers(0, 99), explicitly=st.booleans())
    def let_go(self, which: int, explicitly: bool) -> None:
        batch, _ = self.batches.pop(which % len(self.batches))
        if explicitly:
            batch.release()

    @precondition(lambda self: self.views)
    @rule(which=st.integers(0, 99))
    def look_away(self, which: int) -> None:
        self.views.pop(which % len(self.views))

    @invariant()
    def every_byte_is_what_was_sent(self) -> None:
        for batch, numbers in self.batches:
            assert [payload for payload, _ in batch.datagrams()] == [self.content(number) for number in numbers]
        for view, expected in self.views:
            assert view.tobytes() == expected
