"""The statsd example: which lines are samples, what each kind keeps of them, and what outlives a worker."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import aggregates
import pytest
from aggregates import Aggregates
from hypothesis import given
from hypothesis import strategies as st
from kinds import ACCURACY, Counter, Gauge, Members, Sample, Timer, samples

from fastrecv import Batch


@pytest.mark.parametrize(
    ("line", "sample"),
    [
        (b"hits:1|c", Sample("c", "hits", "1", 1)),
        (b"hits:-2.5|c|@0.25", Sample("c", "hits", "-2.5", 4)),
        (b"a.b-c/d e:3|ms", Sample("ms", "a.b-c/d e", "3", 1)),
        ("größe:+4|g".encode(), Sample("g", "größe", "+4", 1)),
        (b"users:a:b|s", Sample("s", "users", "a:b", 1)),
        (b"hits:1|c|@0", None),
        (b"hits:1|c|@2", None),
        (b"hits:1|c|@nan", None),
        (b"hits:1|c|@0.1|more", None),
        (b"hits:1|c|#tag:1", None),
        (b":1|c", None),
        (b"hits:|c", None),
        (b"hits:1", None),
        (b"hits", None),
        (b"\xff:1|c", None),
        (b"n" * 500 + b":1|c", Sample("c", "n" * 500, "1", 1)),
        (b"n" * 501 + b":1|c", None),
    ],
)
def test_lines(line: bytes, sample: Sample | None) -> None:
    assert list(samples(line)) == [sample]


def test_a_datagram_has_many_lines_and_empty_ones_are_none() -> None:
    assert [sample and sample.name for sample in samples(b"\na:1|c\r\n\nbad\nb:1|c\n")] == ["a", None, "b"]
    assert list(samples(b"")) == []


def test_counters_and_gauges() -> None:
    counter, gauge = Counter(), Gauge()
    counter.take("3", 1)
    counter.take("-1", 4)
    assert counter.row(10) == {"value": -1.0, "rate": -0.1}
    for value, expected in (("7", 7), ("+2", 9), ("-4.5", 4.5), ("0", 0), ("-3", -3)):
        gauge.take(value, 1)
        assert gauge.row(10) == {"value": expected}
    for metric in (counter, gauge):
        for nonsense in ("x", "nan", "inf", ""):
            with pytest.raises((ValueError, IndexError)):
                metric.take(nonsense, 1)
    assert (counter.value, gauge.value) == (-1, -3)


def test_percentiles_of_a_timer_are_those_of_all_samples_but_for_its_accuracy() -> None:
    draw = random.Random(7)
    taken = [draw.lognormvariate(3, 2) for _ in range(5000)]
    timer = Timer()
    for value in taken:
        timer.take(repr(value), 1)
    said, taken = timer.row(1), sorted(taken)
    assert (said["count"], said["min"], said["max"]) == (5000, taken[0], taken[-1])
    assert said["sum"] == pytest.approx(sum(taken))
    for part in (50, 90, 99):
        assert said[f"p{part}"] == pytest.approx(taken[math.ceil(len(taken) * part / 100) - 1], rel=2 * ACCURACY)
    assert len(timer.buckets) < 1000


def test_a_timer_goes_by_weights_and_takes_nothing_below_0() -> None:
    timer = Timer()
    timer.take("0", 9)
    timer.take("100", 1)
    assert timer.row(1) == {"count": 10, "sum": 100, "min": 0, "max": 100, "p50": 0, "p90": 0, "p99": 100}
    with pytest.raises(ValueError, match="no time"):
        timer.take("-1", 1)
    assert timer.count == 10


def test_members_are_counted_once() -> None:
    members = Members()
    for value in ("a", "b", "a", "ä"):
        members.take(value, 1)
    assert members.row(1) == {"value": 3}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STATSD_SINK", f"jsonl:{tmp_path / 'rows'}")
    return tmp_path / "rows"


def written(aggregates: Aggregates, path: Path) -> dict[str, object]:
    aggregates._sink.open()
    aggregates._write()
    aggregates._sink.close()
    return {row["name"]: row["value"] for row in map(json.loads, path.read_text().splitlines())}


def test_what_is_refused_is_counted_and_costs_no_other_line(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregates, "MOST", 3)
    found = Aggregates()
    found.handle(Batch.of([b"a:1|c\nnonsense\nb:x|c\nc:1|y\nd:1|g", b"a:1|c\ne:5|c", b"f:1|c\na:1|c"]))
    assert written(found, rows) == {"a": 3, "d": 1, aggregates.REFUSED: 5}


def test_what_would_be_infinite_is_refused_and_nothing_else_is_lost_by_it(rows: Path) -> None:
    found = Aggregates()
    found.handle(Batch.of([
        b"a:1e300|c\na:1e300|c", b"b:1e308|c", b"c:1|c|@1e-320", b"d:1e300|g\nd:+1e300|g", b"e:9e299|ms\ne:9e299|ms",
        b"f:1|ms|@1e-320", b"g:0|ms|@1e-320", b"h:-1e300|c|@0.5",
    ]))  # fmt: skip
    assert found._metrics["ms", "e"].metric.row(0.001)["count"] == 1
    del found._metrics["ms", "e"], found._encoded["ms", "e"]
    assert written(found, rows) == {"a": 1e300, "d": 1e300, aggregates.REFUSED: 8}


def test_members_and_buckets_are_bounded_until_they_are_written(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregates, "ROOM", 4)
    first, second = Aggregates(), Aggregates()
    first.handle(Batch.of([b"s:a|s\ns:a|s\ns:b|s\nt:1|ms"]))
    second.restore(first.snapshot() or b"")
    second.handle(Batch.of([b"s:c|s\ns:d|s\nu:1|h\na:1|c\ng:1|g"]))
    del second._metrics["ms", "t"], second._encoded["ms", "t"]
    second._size -= 1
    assert written(second, rows) == {"s": 3, "a": 1, "g": 1, aggregates.REFUSED: 2}
    second.handle(Batch.of([b"s:e|s"]))
    assert second._metrics["s", "s"].metric.row(1) == {"value": 1}


def test_the_next_worker_has_what_is_not_written_and_gauges(rows: Path) -> None:
    first, second = Aggregates(), Aggregates()
    assert first.snapshot() is None
    first.handle(Batch.of([b"a:1|c\ng:7|g\nt:0|ms\ns:x|s"]))
    state = first.snapshot()
    assert state is not None
    assert first.snapshot() is None
    second.restore(state)
    second.handle(Batch.of([b"a:1|c\ng:+1|g\nt:5|ms\ns:x|s\ns:y|s"]))
    third = Aggregates()
    third.restore(second.snapshot() or b"")
    third.handle(Batch.of([b"t:10|ms"]))
    assert third._metrics["ms", "t"].metric.row(1)["count"] == 3
    del third._metrics["ms", "t"], third._encoded["ms", "t"]
    assert written(third, rows) == {"a": 2, "g": 8, "s": 2}
    assert {(row["series"], row["number"]) for row in map(json.loads, rows.read_text().splitlines())} == {
        (first._series, 0)
    }
    assert list(third._metrics) == [("g", "g")]
    assert third._number == 1


def test_what_no_sink_takes_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATSD_SINK", "jsonl:/dev/full")
    found = Aggregates()
    found.handle(Batch.of([b"a:1|c"]))
    found._sink.open()
    with pytest.raises(OSError, match="No space left"):
        found._write()
    assert (list(found._metrics), found._number) == ([("c", "a")], 0)
    with pytest.raises(OSError, match="No space left"):
        found._sink.close()


@given(st.binary(max_size=60))
def test_every_datagram_is_survived(data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("STATSD_SINK", "jsonl:-")
        found = Aggregates()
    found.handle(Batch.of([data, b"a:" + data + b"|c", data + b":1|ms", b"a:1|" + data]))
    assert found._metrics.keys() == found._encoded.keys()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("STATSD_EVERY", "0", "STATSD_EVERY is '0': give seconds"),
        ("STATSD_EVERY", "nan", "STATSD_EVERY is 'nan': give seconds"),
        ("STATSD_SINK", "file", "STATSD_SINK: 'file' is no sink"),
    ],
)
def test_settings_that_make_no_sense_are_said(
    name: str, text: str, words: str, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=re.escape(words)):
        Aggregates()
