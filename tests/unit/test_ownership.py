"""Nobody ever overwrites what somebody still looks at: arenas, batches, views, copies and threads in any order."""

from __future__ import annotations

import random
import struct
import threading
import time

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from fastrecv import Receiver
from tests.holding import Holding, content


class Ownership(Holding):
    """Receive, look, copy and let go in any order: every byte that anybody holds stays what was sent."""

    gro = False

    @initialize(size=st.integers(1, 5), arenas=st.integers(1, 3), more=st.integers(0, 2))
    def open(self, size: int, arenas: int, more: int) -> None:
        self.receiver = Receiver.bind(
            ("127.0.0.1", 0),
            batch_size=size,
            arenas=arenas,
            max_arenas=arenas + more,
            gro=self.gro,
            receive_buffer=1 << 22,
        )
        self.limit = arenas + more
        self.sender = Receiver.bind(("127.0.0.1", 0))
        self.sent, self.received = 0, 0

    @rule(count=st.integers(1, 12))
    def send(self, count: int) -> None:
        if self.sent - self.received < 100:
            payloads = [content(self.sent + i) for i in range(count)]
            assert self.sender.send(payloads, self.receiver.address) == count
            self.sent += count

    @rule()
    def recv(self) -> None:
        try:
            batch = self.receiver.recv(5 if self.sent > self.received else 0)
        except BufferError:
            assert len(self.batches) + len(self.views) >= self.limit, "refused, though arenas are free"
            return
        self.batches.append((batch, list(range(self.received, self.received + len(batch)))))
        self.received += len(batch)

    def teardown(self) -> None:
        if hasattr(self, "receiver"):
            self.receiver.close()
            self.sender.close()
            self.every_byte_is_what_was_sent()  # also without the Receiver


class OwnershipOfTrains(Ownership):
    gro = True


quick = settings(max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
TestOwnership = Ownership.TestCase
TestOwnership.settings = quick
TestOwnershipOfTrains = OwnershipOfTrains.TestCase
TestOwnershipOfTrains.settings = quick


def test_threads_that_receive_hold_look_and_release_see_only_what_was_sent() -> None:
    """Four threads on one Receiver, each holding batches and views at random while the others' arenas are reused."""
    total = 20_000
    wrong: list[int] = []
    checked = [0] * 4
    with Receiver.bind(("127.0.0.1", 0), batch_size=8, arenas=4, max_arenas=24, receive_buffer=64 << 20) as receiver:

        def check(views: list[memoryview]) -> int:
            for view in views:
                number = struct.unpack_from("<Q", view)[0]
                if bytes(view) != content(number):
                    wrong.append(number)
            return len(views)

        def read(place: int) -> None:
            draw = random.Random(place)
            held: list[list[memoryview]] = []
            while True:
                try:
                    batch = receiver.recv(1)
                except BufferError:
                    time.sleep(0)
                    if held:
                        checked[place] += check(held.pop(draw.randrange(len(held))))
                    continue
                if not batch:
                    break
                held.append([view for view, _ in batch])
                if draw.random() < 0.3:
                    batch.release()
                while len(held) > 4:
                    checked[place] += check(held.pop(draw.randrange(len(held))))
            for views in held:
                checked[place] += check(views)

        threads = [threading.Thread(target=read, args=[place]) for place in range(4)]
        for thread in threads:
            thread.start()
        with Receiver.bind(("127.0.0.1", 0)) as sender:
            for first in range(0, total, 50):
                sender.send([content(number) for number in range(first, first + 50)], receiver.address)
                while receiver.statistics().datagrams < first - 2000:
                    time.sleep(0.001)
        for thread in threads:
            thread.join()
        assert receiver.drops == 0
    assert not wrong
    assert sum(checked) == total
