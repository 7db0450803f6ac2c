"""Files of rows: whole or absent, rotated, readable by those who are to read them."""

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
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import ipc

from fastrecv import Receiver
from fastrecv.sinks import ArrowFiles, Parquet, Sink, SinkFull, parsed

Made = type[Parquet] | type[ArrowFiles]
BOTH = pytest.mark.parametrize("made", [Parquet, ArrowFiles])


def files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.parquet"), *folder.glob("*.arrows")])


def read(path: Path) -> pa.Table:
    return pq.read_table(path) if path.suffix == ".parquet" else ipc.open_stream(path).read_all()


def numbers(folder: Path) -> list[int]:
    return [number for path in files(folder) for number in read(path)["n"].to_pylist()]


def until(found: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@BOTH
def test_what_was_published_is_in_one_file_when_the_sink_is_closed(made: Made, tmp_path: Path) -> None:
    with made(tmp_path / "new") as sink:
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


@BOTH
def test_a_file_is_finished_by_time_though_nothing_more_comes(made: Made, tmp_path: Path) -> None:
    with made(tmp_path, rotate=0.1) as sink:
        sink.publish([{"n": 0}])
        until(lambda: files(tmp_path))
        sink.publish([{"n": 1}])
    assert len(files(tmp_path)) == 2
    assert numbers(tmp_path) == [0, 1]


@BOTH
def test_a_file_is_finished_by_size_and_another_schema_begins_another(made: Made, tmp_path: Path) -> None:
    with made(tmp_path, size=100_000) as sink:
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


def test_rows_with_other_dictionaries_share_an_arrow_file(tmp_path: Path) -> None:
    with parsed(f"arrow:{tmp_path}?compression=zstd") as sink:
        for words in (["a", "b"], ["c"], ["b", "d", "a"]):
            sink.publish(pa.record_batch({"word": pa.array(words).dictionary_encode()}))
    (path,) = files(tmp_path)
    assert read(path)["word"].to_pylist() == ["a", "b", "c", "b", "d", "a"]


WRITER = """
import os, sys
from fastrecv.sinks import files, parsed
if sys.argv[2] == "before the rename":
    files._appear = lambda path: os.kill(os.getpid(), 9)
with parsed(f"{sys.argv[3]}:{sys.argv[1]}?size=1000") as sink:
    if sys.argv[2] == "before the footer":
        files._File.finish = lambda self: os.kill(os.getpid(), 9)
    sink.publish([{"n": 0, "pad": os.urandom(2000)}])
"""


@pytest.mark.parametrize("scheme", ["arrow", "parquet"])
@pytest.mark.parametrize(("killed", "rows"), [("before the footer", []), ("before the rename", [0])])
def test_what_a_killed_process_leaves_is_removed_or_finished(
    tmp_path: Path, killed: str, rows: list[int], scheme: str
) -> None:
    words = [sys.executable, "-c", WRITER, str(tmp_path), killed, scheme]
    code = subprocess.run(words, check=False, timeout=20).returncode
    assert code == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    assert files(tmp_path) == []
    with parsed(f"{scheme}:{tmp_path}"):
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
        with pytest.raises(OSError, match="File too large: 1 rows that were taken are in no file"):
            sink.flush(10)
        with pytest.raises(OSError, match="File too large"):
            sink.publish([{"n": 1}])
        with pytest.raises(OSError, match="File too large"):
            sink.close()
        assert (sink.statistics().waiting, sink.statistics().dropped, sink.statistics().lost) == (0, 1, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"rotate": 0}, {"size": 0}, {"patience": -1}])
def test_what_makes_no_files_is_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give"):
        Parquet(tmp_path, **options)


def test_a_compression_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compression 'gzip': give lz4, zstd, none"):
        parsed(f"arrow:{tmp_path}?compression=gzip")
