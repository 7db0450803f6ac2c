"""Signals for a poll loop: a descriptor that becomes readable, and which have come."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Self

__all__ = ["Signals"]


class Signals:
    """Takes signals while it is entered; from the main thread only (signal(7))."""

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        self._numbers = tuple(numbers)

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before = {number: signal.signal(number, _woken) for number in self._numbers}
        self._woken_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)  # who executed this program may hold them
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._woken_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._reader)
        os.close(self._writer)

    def fileno(self) -> int:
        return self._reader

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """None comes within: what is sent waits for the end, or for the program that is executed."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)

    def come(self) -> list[signal.Signals]:
        """Those that have come since, in their order."""
        try:
            numbers = os.read(self._reader, 4096)
        except BlockingIOError:
            return []
        return [signal.Signals(number) for number in numbers if number in self._numbers]


def _woken(_number: int, _frame: FrameType | None) -> None:
    """Its number is in the pipe (signal.set_wakeup_fd)."""
