"""The kinds of statsd's metrics, what each keeps of its samples, and the lines that samples come in.

The lines are those of https://github.com/statsd/statsd/blob/master/docs/metric_types.md.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

__all__ = ["ACCURACY", "Counter", "Gauge", "Kind", "Members", "Sample", "Timer", "made", "samples"]

ACCURACY = 0.01
"""Of a timer's percentiles, relative: what is kept of its samples does not grow with their number."""
_GROWTH = (1 + ACCURACY) / (1 - ACCURACY)  # from one bucket's end to the next
_LINE = re.compile(r"(?P<name>[^:|]+):(?P<value>[^|]+)\|(?P<kind>[a-z]+)(?:\|@(?P<rate>[^|]+))?")
_PERCENTILES = (50, 90, 99)
_MOST_MEMBERS = 100_000
_MOST = 1e300  # of any sum, so that neither it nor its rate is ever infinite, which JSON has no word for
_LONGEST_NAME = 500  # bytes, of which a forger could send 64 KiB


class Sample(NamedTuple):
    """One line. kind : c, g, ms, h or s. weight : how many it stands for, by its sample rate."""

    kind: str
    name: str
    value: str
    weight: float


def samples(datagram: bytes) -> Iterator[Sample | None]:
    """The lines of a datagram; None for one that is none."""
    for line in datagram.split(b"\n"):
        if line := line.strip():
            yield _sample(line)


def _sample(line: bytes) -> Sample | None:
    """Of name:value|kind or name:value|kind|@rate."""
    try:
        match = _LINE.fullmatch(line.decode())
        if match is None:
            return None
        rate = float(match["rate"] or 1)
    except ValueError:
        return None
    if not 0 < rate <= 1 or len(match["name"].encode()) > _LONGEST_NAME:
        return None
    return Sample(match["kind"], match["name"], match["value"], 1 / rate)


class Counter(msgspec.Struct, tag="c"):
    """A sum."""

    value: float = 0.0

    def take(self, value: str, weight: float) -> None:
        """ValueError where the value is none, or leads too far; nothing has changed then."""
        self.value = _bounded(self.value + _number(value) * weight)

    def row(self, seconds: float) -> dict[str, object]:
        """What is said of so many seconds."""
        return {"value": self.value, "rate": self.value / seconds}


class Gauge(msgspec.Struct, tag="g"):
    """What was said last; a sign before it makes it a difference."""

    value: float = 0.0

    def take(self, value: str, _weight: float) -> None:
        number = _number(value)
        self.value = _bounded(self.value + number if value[0] in "+-" else number)

    def row(self, _seconds: float) -> dict[str, object]:
        return {"value": self.value}


class Timer(msgspec.Struct, tag="ms"):
    """How samples are spread. buckets : their weights, by the logarithm of what they say; None: nothing."""

    count: float = 0.0
    total: float = 0.0
    least: float = math.inf
    most: float = 0.0
    buckets: dict[int | None, float] = {}

    def take(self, value: str, weight: float) -> None:
        number = _number(value)
        if number < 0:
            raise ValueError("nothing takes less than no time")
        count, total = _bounded(self.count + weight), _bounded(self.total + number * weight)
        bucket = math.ceil(math.log(number, _GROWTH)) if number else None
        self.buckets[bucket] = self.buckets.get(bucket, 0.0) + weight
        self.count, self.total = count, total
        self.least, self.most = min(self.least, number), max(self.most, number)

    def row(self, _seconds: float) -> dict[str, object]:
        return {
            "count": self.count, "sum": self.total, "min": self.least, "max": self.most,
            **{f"p{part}": self.percentile(part) for part in _PERCENTILES},
        }  # fmt: skip

    def percentile(self, part: int) -> float:
        """What so many in a hundred samples do not exceed, to ACCURACY."""
        wanted, passed, value = self.count * part / 100, 0.0, 0.0
        for bucket in sorted(self.buckets, key=lambda one: -math.inf if one is None else one):
            value = 0.0 if bucket is None else 2 * _GROWTH**bucket / (_GROWTH + 1)
            passed += self.buckets[bucket]
            if passed >= wanted * (1 - 1e-9):  # weights are sums of fractions
                break
        return min(max(value, self.least), self.most)

    @property
    def size(self) -> int:
        """How many things are kept, which senders make more of."""
        return len(self.buckets)


class Members(msgspec.Struct, tag="s"):
    """How many different ones there are, by 64 bits of a hash; counts no more than _MOST_MEMBERS."""

    seen: set[int] = set()

    def take(self, value: str, _weight: float) -> None:
        if len(self.seen) < _MOST_MEMBERS:
            self.seen.add(int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest()))

    def row(self, _seconds: float) -> dict[str, object]:
        return {"value": len(self.seen)}

    @property
    def size(self) -> int:
        """As of a timer."""
        return len(self.seen)


Kind = Counter | Gauge | Timer | Members
_KINDS: dict[str, type[Kind]] = {"c": Counter, "g": Gauge, "ms": Timer, "h": Timer, "s": Members}


def made(kind: str) -> Kind | None:
    """A new one; None for a kind that there is not."""
    return _KINDS[kind]() if kind in _KINDS else None


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is no number")
    return number


def _bounded(number: float) -> float:
    if not -_MOST <= number <= _MOST:
        raise ValueError(f"{number} is more than {_MOST}")
    return number
