"""Churn: what befalls a running service, at random moments of a seed, while a paced source sends to it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Literal, Protocol, Self, get_args

import numpy as np
from numpy.typing import NDArray

from fastrecv.bench.numbered import NumberedSource, udp_counters
from fastrecv.netns import Namespace

__all__ = ["ACTIONS", "PER_MINUTE", "Action", "Due", "Pace", "Pattern", "calm", "drive", "schedule"]

Action = Literal["kill", "restart", "resize", "hang", "hand-over"]
ACTIONS: tuple[Action, ...] = get_args(Action)
PER_MINUTE: dict[Action, float] = {"kill": 60, "restart": 12, "resize": 14, "hang": 3, "hand-over": 4}
Due = tuple[float, Action]
"""Seconds from the beginning, and what is to be done then."""

_TICK = 0.01  # seconds
_FRAME = 0.05  # of the time, at its beginning and its end, that nothing befalls
_STILL = 0.5  # seconds without a change of the counters
_PATIENCE = 30.0  # seconds


class Pattern(Protocol):
    """A way to run a service, running; a context manager, which leaves nothing of it.

    done : how often what has been done. changes : what phases were for, and how many workers there were before and
    after. deaths : of workers, which may have had datagrams in their hands.
    """

    title: str
    done: Counter[str]
    changes: list[tuple[str, int, int]]

    @property
    def deaths(self) -> int: ...

    def begin(self, source: NumberedSource) -> None:
        """Its datagrams come from now on."""

    @property
    def busy(self) -> bool:
        """Whether something that was begun has not come to its end."""

    def act(self, action: Action) -> bool:
        """Do it, or say False where it cannot be done yet."""

    def look(self) -> None:
        """See what has happened since, and go on. RuntimeError where that cannot be."""

    def stop(self) -> None:
        """Let queues be read to their end, where the pattern can, and end."""

    def recorded(self) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        """Rows of NUMBERED, and by which slot."""

    def totals(self, rows: NDArray[np.void]) -> tuple[int, int, int]:
        """Datagrams handled, failed, and counted as in the hands of the dead; where nobody counts, by the rows."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def schedule(
    actions: Sequence[Action], seconds: float, seed: int, per_minute: Mapping[Action, float] = PER_MINUTE
) -> list[Due]:  # fmt: skip
    """What is to be done when, in order of time; each at least once."""
    rng = np.random.default_rng(seed)
    due: list[Due] = []
    for action in actions:
        count = max(1, round(per_minute[action] * seconds / 60))
        due += [(float(at), action) for at in rng.uniform(_FRAME, 1 - _FRAME, count) * seconds]
    return sorted(due)


def _gone(namespace: Namespace) -> int:
    """How many datagrams are in no queue any more, as far as that is counted."""
    counters = udp_counters(namespace)
    return counters["InDatagrams"] + counters["InErrors"] + counters["NoPorts"]


class Pace:
    """Lets the source send: so many a second, or as fast as its queues are read.

    rate : datagrams a second; None: as fast as can be while no more than `window` wait in queues. window : no more than
    one queue has room for, so that none is ever full, even if they all wait for one worker.
    """

    def __init__(self, source: NumberedSource, namespace: Namespace, window: int, rate: float | None = None) -> None:
        self._source, self._namespace, self._window, self._rate = source, namespace, window, rate
        self._began, self._first = time.monotonic(), source.sent
        self._limit = self._looks = self._waits = 0

    def look(self) -> None:
        """Often, please: it sends in bursts of as many as fall into the time between."""
        self._looks += 1
        self._waits += self._source.sent >= self._limit
        if self._rate is None:
            self._limit = _gone(self._namespace) + self._window
        else:
            self._limit = self._first + 1 + int(self._rate * (time.monotonic() - self._began))
        self._source.allow(self._limit)

    @property
    def waited(self) -> float:
        """Which share of the looks found the source waiting."""
        return self._waits / max(1, self._looks)


def drive(pattern: Pattern, pace: Pace, due: Sequence[Due], on_look: Callable[[float], None]) -> float:
    """Do all that is due, each thing at its time or as soon after as it can be; the seconds that it took.

    on_look : called about a hundred times a second with the seconds since the beginning. RuntimeError where something
    never comes to its end.
    """
    left = list(due)
    began = time.monotonic()
    last = due[-1][0] if due else 0.0
    while True:
        pace.look()
        pattern.look()
        now = time.monotonic() - began
        on_look(now)
        left = [(at, action) for at, action in left if at > now or not pattern.act(action)]
        if not left and not pattern.busy:
            return time.monotonic() - began
        if now > 2 * last + _PATIENCE:
            raise RuntimeError(f"still to do after {now:.0f} s: {left or 'to wait for the last'}")
        time.sleep(_TICK)


def calm(namespace: Namespace, sent: int) -> None:
    """Wait until every datagram has been counted, or nothing happens any more: the rest is lost, or nobody's."""
    before, since = -1, time.monotonic()
    deadline = since + _PATIENCE
    while time.monotonic() < deadline:
        gone = _gone(namespace)
        if gone >= sent or (gone == before and time.monotonic() - since > _STILL):
            return
        if gone != before:
            before, since = gone, time.monotonic()
        time.sleep(_TICK)
