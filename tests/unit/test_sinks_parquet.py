"""Parquet files: whole or absent, rotated, readable by those who are to read them."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from fastrecv import Receiver
from fastrecv.sinks import Parquet, Sink, SinkFull, parsed


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def numbers(folder: Path) -> list[int]:
    return [number for path in files(folder) for number in pq.read_table(path)["n"].to_pylist()]


def until(found: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_was_published_is_in_one_file_when_the_sink_is_closed(tmp_path: Path) -> None:
    with Parquet(tmp_path / "new") as sink:
        for number in range(100):
            sink.publish([{"n": number}], number % 3)
        sink.publish([])
        assert files(tmp_path / "new") == []
        statistics = sink.statistics()
        assert (statistics.rows, statistics.published, statistics.acknowledged, statistics.waiting) == (
            100,
            100,
            0,
            100,
        )
    assert isinstance(sink, Sink)
    assert sink.statistics().acknowledged == 100
    assert len(files(tmp_path / "new")) == 1
    assert numbers(tmp_path / "new") == list(range(100))
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_received_batches_are_read_by_duckdb_and_pyarrow(tmp_path: Path) -> None:
    with Receiver.bind(("127.0.0.1", 0), timestamps=True) as receiver, Receiver.bind(("127.0.0.1", 0)) as sender:
        with parsed(f"parquet:{tmp_path}?rotate=1h&size=1G") as sink:
            taken = 0
            for number in range(200):
                sender.send([b"%d" % number], receiver.address)
            while taken < 200:
                batch = receiver.recv(5)
                sink.publish(batch)
                taken += len(batch)
                batch.release()
        port = sender.address[1]
    assert pq.read_table(files(tmp_path)[0]).num_rows == 200
    query = "SELECT count(*), sum(decode(payload)::INT), any_value(source_port), min(timestamp) > '2020-01-01', " \
            "any_value(hex(source_address)) FROM read_parquet(?)"  # fmt: skip
    found = duckdb.execute(query, [f"{tmp_path}/*.parquet"]).fetchall()
    assert found == [(200, 19900, port, True, "00000000000000000000FFFF7F000001")]


def test_a_file_is_finished_by_time_though_nothing_more_comes(tmp_path: Path) -> None:
    with Parquet(tmp_path, rotate=0.1) as sink:
        sink.publish([{"n": 0}])
        until(lambda: files(tmp_path))
        sink.publish([{"n": 1}])
    assert len(files(tmp_path)) == 2
    assert numbers(tmp_path) == [0, 1]


def test_a_file_is_finished_by_size_and_another_schema_begins_another(tmp_path: Path) -> None:
    with Parquet(tmp_path, size=100_000) as sink:
        for number in range(10):
            sink.publish([{"n": number, "pad": os.urandom(50_000)}])
        sink.publish([{"n": 10, "other": 1}])
    assert 5 <= len(files(tmp_path)) <= 7
    assert numbers(tmp_path) == list(range(11))


def test_flush_finishes_the_file(tmp_path: Path) -> None:
    with Parquet(tmp_path) as sink:
        sink.flush()
        sink.publish([{"n": 0}])
        sink.flush(10)
        assert numbers(tmp_path) == [0]
        assert sink.statistics().waiting == 0


WRITER = """
import os, sys
from fastrecv.sinks import Parquet
from fastrecv.sinks import parquet
if sys.argv[2] == "before the rename":
    parquet._appear = lambda path: os.kill(os.getpid(), 9)
with Parquet(sys.argv[1], size=1000) as sink:
    if sys.argv[2] == "before the footer":
        parquet._File.finish = lambda self: os.kill(os.getpid(), 9)
    sink.publish([{"n": 0, "pad": os.urandom(2000)}])
"""


@pytest.mark.parametrize(("killed", "rows"), [("before the footer", []), ("before the rename", [0])])
def test_what_a_killed_process_leaves_is_removed_or_finished(tmp_path: Path, killed: str, rows: list[int]) -> None:
    code = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path), killed], check=False, timeout=20).returncode
    assert code == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    assert files(tmp_path) == []
    with Parquet(tmp_path):
        assert numbers(tmp_path) == rows
    assert list(tmp_path.iterdir()) == files(tmp_path)


def test_what_a_live_process_writes_is_left_alone(tmp_path: Path) -> None:
    with Parquet(tmp_path) as first:
        first.publish([{"n": 0}])
        until(lambda: list(tmp_path.iterdir()))
        with Parquet(tmp_path) as second:
            second.publish([{"n": 1}])
    assert sorted(numbers(tmp_path)) == [0, 1]


def test_a_disk_that_stands_still_costs_no_more_than_the_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands, add = threading.Event(), Parquet._step
    monkeypatch.setattr(Parquet, "_step", lambda self: stands.wait() and add(self))
    with Parquet(tmp_path, patience=0.05) as sink:
        row = {"n": 0, "pad": bytes(32 << 20)}
        sink.publish([row])
        sink.publish([row])
        with pytest.raises(SinkFull, match="the disk has not taken"):
            sink.publish([row])
        with pytest.raises(TimeoutError, match="2 messages are in no finished file"):
            sink.flush(0)
        stands.set()
        sink.flush(10)
    assert numbers(tmp_path) == [0, 0]


def test_a_full_disk_is_said_by_the_next_call_and_leaves_no_half_file(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    sink = Parquet(tmp_path, size=100_000)
    sink.open()
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        sink.publish([{"pad": os.urandom(500_000)}])
        with pytest.raises(OSError, match="File too large"):
            sink.flush(10)
        with pytest.raises(OSError, match="File too large"):
            sink.publish([{"n": 1}])
        with pytest.raises(OSError, match="File too large"):
            sink.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"rotate": 0}, {"size": 0}, {"patience": -1}])
def test_what_makes_no_files_is_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give"):
        Parquet(tmp_path, **options)
