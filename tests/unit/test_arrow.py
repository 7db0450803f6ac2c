"""The Arrow interface, against the libraries that are to take it: pyarrow, polars, DuckDB."""

from __future__ import annotations

import gc
import random
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import polars
import pyarrow as pa
import pytest

from fastrecv import Batch, Receiver

PAYLOADS = [b"", b"short", b"exactly12byt", b"thirteen byte", bytes(range(256)) * 5]
COLUMNS = ["payload", "length", "source_address", "source_port", "destination_address", "destination_port",
           "interface", "timestamp", "hardware_timestamp", "tos"]  # fmt: skip


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    features = ("timestamps", "hardware_timestamps", "destinations", "destination_ports", "tos")
    with Receiver.bind(("127.0.0.1", 0), **dict.fromkeys(features, True)) as made:
        yield made


def batch_of(receiver: Receiver, payloads: list[bytes]) -> Batch:
    with Receiver.bind(("127.0.0.1", 0)) as sender:
        for payload in payloads:
            sender.send([payload], receiver.address)
        batch = receiver.recv(5)
        assert len(batch) == len(payloads)
        return batch


def test_pyarrow_takes_a_batch_and_every_column_is_right(receiver: Receiver) -> None:
    batch = batch_of(receiver, PAYLOADS)
    record = pa.record_batch(batch)
    record.validate(full=True)
    assert record.schema.names == COLUMNS
    assert record.schema.field("payload").type == pa.binary_view()
    assert record["payload"].to_pylist() == PAYLOADS
    assert record["length"].to_pylist() == [len(payload) for payload in PAYLOADS]
    loopback = bytes(10) + b"\xff\xff" + socket.inet_aton("127.0.0.1")
    assert record["source_address"].to_pylist() == [loopback] * 5
    assert batch.sources is not None
    assert record["source_port"].to_pylist() == batch.sources["port"].tolist()
    assert record["destination_address"].to_pylist() == [loopback] * 5
    assert record["destination_port"].to_pylist() == [receiver.address[1]] * 5
    assert record["interface"].to_pylist() == [socket.if_nametoindex("lo")] * 5
    assert batch.timestamps is not None
    assert record["timestamp"].cast(pa.int64()).to_pylist() == batch.timestamps.tolist()
    assert record["hardware_timestamp"].null_count == 5
    assert record["tos"].to_pylist() == [0] * 5


def test_the_payload_is_not_copied(receiver: Receiver) -> None:
    batch = batch_of(receiver, PAYLOADS)
    data = pa.record_batch(batch)["payload"].buffers()[2]
    assert data.address == batch.data.__array_interface__["data"][0]


@pytest.mark.parametrize("way", ["asked of the batch", "asked for by the consumer"])
def test_a_packed_copy_is_ordinary_binary(receiver: Receiver, way: str) -> None:
    batch = batch_of(receiver, PAYLOADS)
    if way == "asked of the batch":
        record = pa.record_batch(batch.arrow(packed=True))
    else:
        wanted = pa.schema([field.with_type(pa.binary()) if field.name == "payload" else field
                            for field in pa.record_batch(batch).schema])  # fmt: skip
        record = pa.record_batch(batch, schema=wanted)
    record.validate(full=True)
    assert record.schema.field("payload").type == pa.binary()
    assert record["payload"].to_pylist() == PAYLOADS
    batch.release()
    assert receiver.arenas == 4
    assert len([batch_of(receiver, [b"x"]) for _ in range(4)]) == 4


def test_polars_takes_a_batch(receiver: Receiver) -> None:
    frame = polars.DataFrame(batch_of(receiver, PAYLOADS))
    assert frame.columns == COLUMNS
    assert frame["payload"].to_list() == PAYLOADS
    assert frame["timestamp"].dtype == polars.Datetime("ns", "UTC")
    assert abs((frame["timestamp"][0] - datetime.now(UTC)).total_seconds()) < 60


def test_duckdb_takes_a_batch(receiver: Receiver) -> None:
    batch = batch_of(receiver, PAYLOADS)
    connection = duckdb.connect()
    connection.register("batch", batch)
    rows = connection.execute("select payload, length, octet_length(payload) from batch order by length").fetchall()
    assert [row[0] for row in rows] == sorted(PAYLOADS, key=len)
    assert all(length == size for _, length, size in rows)


def test_what_is_not_asked_for_is_no_column(tmp_path: Path) -> None:
    with Receiver.bind(("127.0.0.1", 0)) as receiver:
        assert pa.record_batch(batch_of(receiver, [b"x"])).schema.names == COLUMNS[:4]
        assert pa.record_batch(receiver.recv(0)).num_rows == 0
    with Receiver.bind(str(tmp_path / "x")) as receiver, Receiver.bind(str(tmp_path / "y")) as sender:
        sender.send([b"unix"], str(tmp_path / "x"))
        assert pa.record_batch(receiver.recv(5)).to_pydict() == {"payload": [b"unix"], "length": [4]}


def test_a_train_is_a_table_as_well() -> None:
    payloads = [random.randbytes(size) for size in [100] * 30 + [40] + [9] * 20]
    with Receiver.bind(("127.0.0.1", 0), gro=True) as receiver, Receiver.bind(("127.0.0.1", 0)) as sender:
        sender.send(payloads, receiver.address)
        record = pa.record_batch(receiver.recv(5))
        record.validate(full=True)
        assert record["payload"].to_pylist() == payloads


def test_one_column_keeps_the_arena_until_the_last_thread_lets_go(receiver: Receiver) -> None:
    payloads = [random.randbytes(500) for _ in range(20)]
    batch = batch_of(receiver, payloads)
    columns = [pa.record_batch(batch)["payload"] for _ in range(8)]
    batch.release()
    del batch
    for i in range(3 * receiver.arenas):
        batch_of(receiver, [bytes([i]) * 500] * 20).release()
    assert all(column.to_pylist() == payloads for column in columns)

    def let_go(column: list[object]) -> None:
        column.clear()

    threads = [threading.Thread(target=let_go, args=[[column]]) for column in columns]
    columns.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del threads, thread
    gc.collect()
    assert len([batch_of(receiver, [b"x"]) for _ in range(receiver.arenas)]) == receiver.arenas


def test_capsules_that_nobody_takes_leave_nothing_held(receiver: Receiver) -> None:
    for _ in range(3 * receiver.arenas):
        batch = batch_of(receiver, [b"x"])
        capsules = batch.__arrow_c_schema__(), batch.__arrow_c_array__(), batch.__arrow_c_stream__()
        assert len(capsules) == 3


def test_a_stream_gives_its_batch_once(receiver: Receiver) -> None:
    batch = batch_of(receiver, PAYLOADS)
    reader = pa.RecordBatchReader.from_stream(batch)
    assert [record.num_rows for record in reader] == [5]
