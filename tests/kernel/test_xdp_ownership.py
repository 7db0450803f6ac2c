"""No byte changes under what somebody still looks at, while frames arrive: batches, views, copies, in any order."""

from __future__ import annotations

import struct
import time
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from fastrecv import XdpReceiver
from tests.holding import Holding
from tests.kernel.cable import FAR, FAR6, PORT, Cable

pytestmark = pytest.mark.needs("AF_XDP in copy mode")

PATIENCE = 5.0  # seconds


class Frames(Holding):
    """Send, receive, look, copy and let go: every byte that is held stays what was sent, and each frame has a place.

    A datagram says its number, since the kernel drops those for which no frame is free.
    """

    most = 1400  # what a frame has room for
    cable: ClassVar[Cable]

    @initialize(ring=st.sampled_from([4, 16, 64]), more=st.integers(0, 70), size=st.integers(1, 20))
    def open(self, ring: int, more: int, size: int) -> None:
        self.receiver = XdpReceiver("near0", PORT, ring_size=ring, frames=ring + more, batch_size=size)
        self.frames = ring + more
        self.sent = self.received = 0
        self.next = 0  # that may come

    @rule(count=st.integers(1, 40), source=st.sampled_from([FAR, FAR6]))
    def send(self, count: int, source: str) -> None:
        for number in range(self.sent, self.sent + count):
            self.cable.put(self.cable.datagram(self.content(number), source))
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
    Frames.cable = cable
    run_state_machine_as_test(
        Frames,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )  # fmt: skip
