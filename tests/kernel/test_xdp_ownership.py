"""No byte changes under what somebody still looks at, while frames arrive: batches, views, copies, in any order."""

from __future__ import annotations

import random
import struct
import time
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fastrecv import Batch, XdpReceiver
from tests.kernel.cable import FAR, FAR6, PORT, Cable

pytestmark = pytest.mark.needs("AF_XDP in copy mode")

PATIENCE = 5.0  # seconds


def content(number: int) -> bytes:
    """What datagram `number` says: its number, and as many bytes as that gives, none of them by chance."""
    return struct.pack("<Q", number) + random.Random(number).randbytes(number * 37 % 1400)


class Holding(RuleBasedStateMachine):
    """Send, receive, look, copy and let go: every byte that is held stays what was sent, and each frame has a place.

    A datagram says its number, since the kernel drops those for which no frame is free.
    """

    cable: ClassVar[Cable]

    @initialize(ring=st.sampled_from([4, 16, 64]), more=st.integers(0, 70), size=st.integers(1, 20))
    def open(self, ring: int, more: int, size: int) -> None:
        self.receiver = XdpReceiver("near0", PORT, ring_size=ring, frames=ring + more, batch_size=size)
        self.frames = ring + more
        self.sent = self.received = 0
        self.next = 0  # that may come
        self.batches: list[tuple[Batch, list[int]]] = []
        self.views: list[tuple[memoryview, bytes]] = []

    @rule(count=st.integers(1, 40), source=st.sampled_from([FAR, FAR6]))
    def send(self, count: int, source: str) -> None:
        for number in range(self.sent, self.sent + count):
            self.cable.put(self.cable.datagram(content(number), source))
        self.sent += count

    @rule()
    def recv(self) -> None:
        try:
            batch = self.receiver.recv(0)
        except BufferError:
            assert self.receiver.statistics().held == self.frames, "refused, though frames are free"
            return
        numbers = [struct.unpack_from("<Q", payload)[0] for payload, _ in batch.datagrams()]
        assert numbers == sorted(set(numbers))
        if numbers:
            assert self.next <= numbers[0] <= numbers[-1] < self.sent
            self.next = numbers[-1] + 1
        self.received += len(batch)
        self.batches.append((batch, numbers))

    @precondition(lambda self: self.batches)
    @rule(which=st.integers(0, 99), row=st.integers(0, 99), kind=st.integers(0, 5))
    def look(self, which: int, row: int, kind: int) -> None:
        batch, numbers = self.batches[which % len(self.batches)]
        if not numbers:
            return
        i = row % len(numbers)
        whole = content(numbers[i])
        start, size = int(batch.offsets[i]), int(batch.lengths[i])
        self.views.append((
            lambda: (batch[i], whole),
            lambda: (batch.data[start : start + size].data, whole),
            lambda: (batch.lengths.data, np.array([len(content(one)) for one in numbers], np.int32).tobytes()),
            lambda: (batch.records("<u8").data, np.array(numbers, np.uint64).tobytes()),
            lambda: (batch[i][2:], whole[2:]),
            lambda: (batch.packed()[0].data, b"".join(map(content, numbers))),
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
            assert [payload for payload, _ in batch.datagrams()] == [content(number) for number in numbers]
        for view, expected in self.views:
            assert view.tobytes() == expected

    @invariant()
    def frames_are_held_by_somebody(self) -> None:
        if not self.batches and not self.views:
            assert self.receiver.statistics().held == 0

    def teardown(self) -> None:
        if not hasattr(self, "receiver"):
            return
        with self.receiver as receiver:
            self.every_byte_is_what_was_sent()
            self._drain(receiver)
            assert receiver.statistics().kernel.invalid_descriptors == receiver.statistics().unreadable == 0
        self.every_byte_is_what_was_sent()  # also without the receiver

    def _drain(self, receiver: XdpReceiver) -> None:
        """Every frame is found again, received or counted as dropped."""
        deadline = time.monotonic() + PATIENCE
        while self.received + (dropped := receiver.statistics().kernel.dropped) < self.sent:
            assert time.monotonic() < deadline, f"{self.received} received, {dropped} dropped of {self.sent}"
            try:
                self.received += len(receiver.recv(0))
            except BufferError:
                half = len(self.batches) // 2
                del self.batches[half:], self.views[half:]  # the others stay, while that is enough
        assert self.received + dropped == self.sent


@pytest.mark.parametrize(
    ("examples", "steps"), [(25, 40), pytest.param(500, 100, marks=pytest.mark.proof)], ids=["short", "long"]
)
def test_what_is_held_stays_while_frames_arrive(cable: Cable, examples: int, steps: int) -> None:
    Holding.cable = cable
    run_state_machine_as_test(
        Holding,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )  # fmt: skip
