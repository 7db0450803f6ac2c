"""A disk that fills up under the collector's files: every row is in a file that is whole, or counted as lost, once."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import ipc
from pyarrow import parquet as pq

from fastrecv.collector import outlet
from fastrecv.collector.outlet import Outlet


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    mounted = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)]
    if subprocess.run(mounted, check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def rows(count: int) -> pa.RecordBatch:
    """Of 1000 bytes that nobody can compress."""
    return pa.record_batch({"pad": [os.urandom(1000) for _ in range(count)]})


def stored(folder: Path) -> int:
    found = [pq.read_table(path) for path in folder.glob("*.parquet")]
    found += [ipc.open_stream(path).read_all() for path in folder.glob("*.arrows")]
    return sum(map(len, found))


def failed(one: Outlet) -> bool:
    """Whether the writer has come to the end of the disk; what waits for it meanwhile is another's time."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if one.sink is None or one.sink.statistics().lost:
            return True
        time.sleep(0.005)
    return False


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_rows_that_a_full_disk_cost_are_counted_and_logged_once(
    disk: Path, form: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outlet, "_AGAIN", 0.0)
    one = Outlet(f"{form}:{disk}?size=200K&rotate=1h")
    one.open()
    one.publish({0: [rows(400)]})  # a file
    assert one.sink is not None
    one.sink.flush(20)
    one.publish({0: [rows(900), rows(100)]})  # which go beyond the disk, in the thread's hands
    assert failed(one)
    found = one.sink.statistics()
    assert (found.rows, found.lost) == (1400, 1000)
    assert found.published == found.acknowledged + found.dropped == 2
    assert (one.taken, one.lost, stored(disk)) == (1400, 0, 400)
    one.look()
    assert (one.taken, one.lost) == (400, 1000)
    one.look()
    assert (one.taken, one.lost) == (400, 1000)
    one.publish({0: [rows(900)]})
    assert failed(one)
    one.publish({0: [rows(7)]})  # nobody has looked: it is not taken, and the others are lost
    assert (one.taken, one.lost) == (400, 1907)
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    one.publish({0: [rows(50)]})
    one.close(20)
    assert (one.taken, one.lost, stored(disk)) == (450, 1907, 450)
    assert [message.count("1000 rows") for message in caplog.messages] == [1, 0, 0]
    assert [message.count("900 rows") for message in caplog.messages] == [0, 1, 0]
    assert caplog.messages[-1] == "7 rows are lost: the sink had failed"


def test_what_is_lost_at_the_end_is_counted_too(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = Outlet(f"parquet:{disk}")
    one.open()
    one.publish({0: [rows(2000)]})
    one.close(20)
    assert (one.taken, one.lost, stored(disk)) == (0, 2000, 0)
    assert len(caplog.messages) == 1
    assert "No space left on device: 2000 rows that were taken are in no file" in caplog.messages[0]
