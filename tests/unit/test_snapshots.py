"""What is kept of a handler's state: the last whole one, wherever its writer ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EIO, ENOSPC
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from fastrecv.workers.counters import Counters, Row
from fastrecv.workers.snapshots import LONGEST, Snapshots, begun

STATES = st.binary(max_size=200_000) | st.integers(0, 5000).map(lambda length: bytes([length % 256]) * length)


class Killed(BaseException):
    """The writer has got so far, and no further."""


class Areas(RuleBasedStateMachine):
    """Writers that follow one another at a slot; each may end at any byte, and the kernel may write less than asked."""

    def __init__(self) -> None:
        super().__init__()
        self._counters = Counters()
        self._row = self._counters.row(3)
        self._fd = begun(self._row)
        self._writer = Snapshots(self._fd, self._row)
        self._kept: bytes | None = None

    @rule(state=STATES, at_once=st.integers(1, 70_000))
    def write(self, state: bytes, at_once: int) -> None:
        with writing(at_once):
            self._writer.write(state)
        self._kept = state

    @rule(state=STATES.filter(len), fraction=st.floats(0, 1))
    def die(self, state: bytes, fraction: float) -> None:
        with writing(1000, until=int(fraction * (len(state) - 1))), pytest.raises(Killed):
            self._writer.write(state)
        self.succeed()

    @rule()
    def fail(self) -> None:
        with writing(1000, until=0, error=OSError(ENOSPC, "no space")), pytest.raises(OSError, match="no space"):
            self._writer.write(b"state")

    @rule()
    def succeed(self) -> None:
        self._writer = Snapshots(self._fd, self._counters.row(3))

    @rule()
    def unchanged(self) -> None:
        with writing(0, until=0):
            self._writer.write(None)

    @invariant()
    def whole(self) -> None:
        assert self._writer.read() == self._kept

    def teardown(self) -> None:
        os.close(self._fd)
        self._counters.close()


@contextmanager
def writing(at_once: int, until: int | None = None, error: BaseException | None = None) -> Iterator[None]:
    """os.pwrite writes no more than that at once, and raises when it would write more than `until` in all."""
    pwrite, left = os.pwrite, until

    def limited(fd: int, data: memoryview, place: int) -> int:
        nonlocal left
        length = min(len(data), at_once)
        if left is not None:
            if left < len(data) and left < length:
                pwrite(fd, data[:left], place)
                raise error or Killed
            left -= length
        return pwrite(fd, data[:length], place)

    os.pwrite = limited  # type: ignore[assignment]
    try:
        yield
    finally:
        os.pwrite = pwrite


def test_the_last_whole_state_stays_wherever_a_writer_ends() -> None:
    run_state_machine_as_test(Areas, settings=settings(max_examples=40, stateful_step_count=20, deadline=None))


@pytest.fixture
def row() -> Iterator[Row]:
    with Counters() as counters:
        yield counters.row(0)


@pytest.fixture
def fd(row: Row) -> Iterator[int]:
    made = begun(row)
    yield made
    os.close(made)


def test_a_slot_that_begins_has_no_state(row: Row, fd: int) -> None:
    Snapshots(fd, row).write(b"")
    assert Snapshots(fd, row).read() == b""
    again = begun(row)
    assert Snapshots(again, row).read() is None
    os.close(again)


@pytest.mark.parametrize(
    ("state", "kind", "message"),
    [
        ("text", TypeError, r"snapshot\(\) gives str: give bytes, or None where nothing has changed"),
        (0, TypeError, r"snapshot\(\) gives int"),
        (bytes(LONGEST + 1), ValueError, r"snapshot\(\) gives 1,073,741,825 bytes: 1,073,741,824 at most"),
    ],
    ids=["text", "number", "long"],
)
def test_what_cannot_be_kept(state: Any, kind: type[Exception], message: str, row: Row, fd: int) -> None:
    kept = Snapshots(fd, row)
    kept.write(b"before")
    with pytest.raises(kind, match=message):
        kept.write(state)
    assert kept.read() == b"before"


def test_bytes_by_any_name(row: Row, fd: int) -> None:
    kept = Snapshots(fd, row)
    for state in (bytearray(b"four"), memoryview(b"for2" * 2).cast("I")):
        kept.write(state)
        assert kept.read() == bytes(state)


def test_a_state_that_was_cut_off_is_no_state(row: Row, fd: int) -> None:
    kept = Snapshots(fd, row)
    kept.write(b"first")
    kept.write(b"second")
    os.ftruncate(fd, 3)
    with pytest.raises(OSError, match="3 bytes are left of a snapshot of 6") as caught:
        kept.read()
    assert caught.value.errno == EIO
