"""Sinks: what they take, lines of JSON, shards as the balancer's program would choose, and sinks named by text."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import re
import resource
import socket
import subprocess
import sys
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fastrecv import ENDPOINT, Batch, Receiver
from fastrecv.policies import BUCKETS, Policy, Sender, number_of
from fastrecv.sinks import JsonLines, Shards, Sink, SinkFull, parsed, record_batch

SEED = 0x5EED


def batch_of(sources: list[tuple[str, int]]) -> Batch:
    """A datagram of each source, which says its place."""
    endpoints = np.zeros(len(sources), ENDPOINT)
    for row, (address, port) in zip(endpoints, sources, strict=True):
        row["address"] = list(number_of(ip_address(address)).to_bytes(16))
        row["port"] = port
    return Batch.of([b"%d" % place for place in range(len(sources))], endpoints)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_becomes_columns_that_outlive_it() -> None:
    batch = batch_of([("192.0.2.1", 4000), ("2001:db8::1", 4001)])
    record = record_batch(batch)
    batch.release()
    assert record.schema.names == ["payload", "length", "source_address", "source_port"]
    assert record["payload"].to_pylist() == [b"0", b"1"]
    assert record["source_address"].to_pylist()[1] == IPv6Address("2001:db8::1").packed
    assert record_batch(record) is record


def test_rows_have_every_column_that_any_of_them_names() -> None:
    record = record_batch([{"a": 1}, {"b": "x", "a": 2}])
    assert record.to_pylist() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]


@pytest.mark.parametrize(("data", "words"), [
    ([{"a": 1}, {"a": "x"}], "make no Arrow columns"),
    ([{"a": IPv4Address("192.0.2.1")}], "make no Arrow columns"),
    ([1, 2], "int"),
])  # fmt: skip
def test_what_makes_no_columns_is_refused_in_words(data: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        record_batch(data)


def test_rows_are_written_as_lines_at_the_end_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for number in range(2):
        with JsonLines(path) as sink:
            sink.publish([{"n": number, "bytes": b"\xff", "at": datetime(2026, 1, 1, tzinfo=UTC)}, {"n": np.int32(7)}])
            sink.publish([])
            assert sink.statistics()[:5] == (2, 1, 0, 1, 0)
    assert isinstance(sink, Sink)
    assert lines(path) == [{"n": 0, "bytes": "/w==", "at": "2026-01-01T00:00:00+00:00"}, {"n": 7},
                               {"n": 1, "bytes": "/w==", "at": "2026-01-01T00:00:00+00:00"}, {"n": 7}]  # fmt: skip


def test_a_received_batch_is_written_with_addresses_and_all_digits_of_its_moments(tmp_path: Path) -> None:
    with Receiver.bind(("127.0.0.1", 0), timestamps=True) as receiver, Receiver.bind(("127.0.0.1", 0)) as sender:
        sender.send([b"\x00hello"], receiver.address)
        batch = receiver.recv(5)
        with JsonLines(tmp_path / "out") as sink:
            sink.publish(batch)
        (row,) = lines(tmp_path / "out")
        assert batch.timestamps is not None
        nanoseconds = int(batch.timestamps[0])
        assert base64.b64decode(row["payload"]) == b"\x00hello"
        assert (row["source_address"], row["source_port"]) == sender.address
        moment = datetime.fromtimestamp(nanoseconds // 10**9, UTC)
        assert row["timestamp"] == f"{moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds % 10**9:09}Z"


@pytest.mark.parametrize("data", [[{"a": float("nan")}], [{"a": object()}], ["text"]])
def test_what_has_no_json_is_refused_and_nothing_is_taken(tmp_path: Path, data: Any) -> None:
    with JsonLines(tmp_path / "out") as sink:
        with pytest.raises((TypeError, ValueError)):
            sink.publish(data)
        assert sink.statistics().published == 0
    assert (tmp_path / "out").read_bytes() == b""


def test_a_reader_that_stands_still_costs_no_more_than_the_patience_and_loses_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    sink = JsonLines(tmp_path / "pipe", patience=0.02)
    sink.open()
    row = {"pad": "x" * 500_000}
    for taken in range(9):  # 4 MiB, and what is in the pipe
        sink.publish([{"n": taken, **row}])
    taken += 1
    with pytest.raises(SinkFull, match="is it stopped"):
        sink.publish([row])
    assert sink.statistics().published == taken
    assert sink.statistics().waiting == taken
    with pytest.raises(TimeoutError, match="bytes wait for its reader"):
        sink.flush(0)
    found = bytearray()
    while sink.statistics().waiting:
        found += os.read(reader, 1 << 20)
        with pytest.raises(TimeoutError) if sink.statistics().spooled_bytes > 1 << 16 else contextlib.nullcontext():
            sink.flush(0)
    sink.close()
    sink.close()
    while piece := os.read(reader, 1 << 20):
        found += piece
    os.close(reader)
    assert [json.loads(line)["n"] for line in found.splitlines()] == list(range(taken))


def test_a_full_disk_leaves_whole_lines_and_what_comes_when_there_is_room_is_read(tmp_path: Path) -> None:
    before, path = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "out"
    sink = JsonLines(path)
    sink.open()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        sink.publish([{"n": 0, "pad": "x" * 600}])
        with pytest.raises(OSError, match=re.escape(f"no room for a line: '{path}'")):
            sink.publish([{"n": n, "pad": "x" * 250} for n in (1, 2, 3)])
        with pytest.raises(OSError, match="no room"):
            sink.close(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [line["n"] for line in lines(path)] == [0, 1]
    with JsonLines(path) as sink:
        sink.publish([{"n": 4}])
    assert [line["n"] for line in lines(path)] == [0, 1, 4]


@pytest.mark.parametrize("output", ["pipe", "socket", "file"])
def test_standard_output_takes_lines_whatever_it_is(tmp_path: Path, output: str) -> None:
    code = "from fastrecv.sinks import *\nwith parsed('jsonl:-') as sink: sink.publish([{'n': 1}])\nprint('own')"
    if output == "file":
        near, far = os.open(tmp_path / "out", os.O_RDONLY | os.O_CREAT), os.open(tmp_path / "out", os.O_WRONLY)
    else:
        near, far = os.pipe() if output == "pipe" else [end.detach() for end in socket.socketpair()]
    subprocess.run([sys.executable, "-c", code], check=True, stdout=far, timeout=20)
    os.close(far)
    found = os.read(near, 100)
    os.close(near)
    assert found == b'{"n": 1}\nown\n'


def test_a_sink_is_used_between_open_and_close(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "out")
    with pytest.raises(ValueError, match="call open"):
        sink.publish([{"a": 1}])
    with sink:
        with pytest.raises(ValueError, match="shard -1"):
            sink.publish([{"a": 1}], -1)
        with pytest.raises(ValueError, match="opened before"):
            sink.open()
    with pytest.raises(ValueError, match="is closed"):
        sink.publish([{"a": 1}])


@pytest.mark.parametrize("text", ["source", "source/16/48", "source+port", "flow", "destination"])
def test_shards_are_the_buckets_of_the_balancer(text: str) -> None:
    draw = random.Random(text)
    policy = Policy.parse(text, seed=draw.getrandbits(64))
    ends = []
    for _ in range(400):
        four = draw.random() < 0.5
        address = IPv4Address(draw.getrandbits(32)) if four else IPv6Address(draw.getrandbits(128))
        ends.append((address, draw.getrandbits(16)))
    senders = [Sender(*source, *destination) for source, destination in zip(ends[::2], ends[1::2], strict=True)]
    record = pa.record_batch({
        f"{end}_{part}": [getattr(sender, end if part == "address" else f"{end}_port") for sender in senders]
        if part == "port" else
        pa.array([number_of(getattr(sender, end)).to_bytes(16) for sender in senders], pa.binary(16))
        for end in ("source", "destination") for part in ("address", "port")
    })  # fmt: skip
    expected = [policy.bucket(sender) for sender in senders]
    assert Shards(policy).of(record).tolist() == expected
    assert Shards(policy).of(record.slice(50, 100)).tolist() == expected[50:150]
    assert Shards(policy, 64).of(record).tolist() == [bucket % 64 for bucket in expected if bucket is not None]
    if text.startswith("source"):
        batch = batch_of([(str(sender.source), sender.source_port) for sender in senders])
        assert Shards(policy).of(batch).tolist() == expected


def test_a_batch_is_split_by_shard_and_keeps_its_order() -> None:
    shards = Shards(Policy("source", seed=SEED), 8)
    batch = batch_of([(f"192.0.2.{place % 50}", 1000) for place in range(500)])
    parts = shards.split(batch)
    assert [shard for shard, _ in parts] == sorted(set(shards.of(batch).tolist()))
    assert sum(len(part) for _, part in parts) == 500
    for shard, part in parts:
        places = [int(payload) for payload in part["payload"].to_pylist()]
        assert places == sorted(places)
        assert set(shards.of(part).tolist()) == {shard}
    assert shards.split(Batch.of([], np.zeros(0, ENDPOINT))) == []


@pytest.mark.parametrize(("policy", "count", "words"), [
    (Policy("quic", length=8, seed=1), 8, "shards go by"),
    (Policy("source"), 8, "has no seed"),
    (Policy("source", seed=1), 12, "power of two"),
    (Policy("source", seed=1), 2 * BUCKETS, "power of two"),
])  # fmt: skip
def test_shards_that_hosts_could_not_agree_on_are_refused(policy: Policy, count: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Shards(policy, count)


def test_a_batch_without_what_the_policy_goes_by_is_refused() -> None:
    shards = Shards(Policy("destination", seed=SEED))
    with pytest.raises(ValueError, match="has no destinations"):
        shards.of(batch_of([("192.0.2.1", 1)]))
    with pytest.raises(ValueError, match="no column destination_address"):
        shards.of(record_batch([{"a": 1}]))


@pytest.mark.parametrize(("url", "words"), [
    ("jsonl:", "has no path"),
    ("out.jsonl", "is no sink"),
    ("json:-", "did you mean 'jsonl'"),
    ("jsonl:-?patient=1", "did you mean 'patience'"),
    ("jsonl:-?patience", "has no value"),
    ("jsonl:-?patience=1&patience=2", "given twice"),
    ("jsonl:-?patience=-1", "patience '-1': give seconds"),
    ("jsonl:-?patience=5d", "patience '5d': give seconds"),
    ("parquet:", "has no path: give parquet:/folder"),
    ("parquet:/tmp/x?size=64MB", "size '64MB': give bytes like 64M"),
    ("nats:localhost/flows?spool=/tmp/x", "give nats://host"),
    ("nats://localhost?spool=/tmp/x", "give nats://host"),
    ("nats://localhost/flows", "has no spool"),
    ("nats://localhost/flows?spool=", "has no spool"),
    ("nats:///flows?spool=/tmp/x", "no servers"),
    ("jsonl", "'jsonl' is no sink: give"),
    ("nats://localhost/?spool=/tmp/x", "prefix ''"),
    ("nats://localhost:4222,host:abc/flows?spool=/tmp/x", "server 'host:abc': give host, host:port or [address]:port"),
    ("nats://localhost:99999/flows?spool=/tmp/x", "server 'localhost:99999'"),
    ("nats://[::1]:0/flows?spool=/tmp/x", "server '[::1]:0'"),
    ("nats://localhost/a.*?spool=/tmp/x", "prefix 'a.*'"),
    ("nats://localhost/flows?spool=/tmp/x&stream=a.b", "stream 'a.b'"),
    ("nats://localhost/flows?spool=/tmp/x&spool_size=1G", "did you mean 'spool-size'"),
    ("nats://localhost/flows?spool=/tmp/x&spool-size=1M", "give 16M or more"),
    ("nats://localhost/flows?spool=/tmp/x&full=drop", "full 'drop': give block or drop-oldest"),
    ("nats://localhost/flows?spool=/tmp/x&window=0", "a window of 0"),
    ("nats://localhost/flows?spool=/tmp/x&window=many", "window 'many': give a whole number"),
])  # fmt: skip
def test_what_names_no_sink_is_refused_in_one_line(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        parsed(url)
    assert "\n" not in str(raised.value)


def test_without_the_extra_rows_become_json_and_what_needs_it_names_it(tmp_path: Path) -> None:
    code = """
import sys
sys.modules |= dict.fromkeys(["pyarrow", "nats"])
from fastrecv.sinks import parsed
with parsed("jsonl:-") as sink:
    sink.publish([{"n": 1}])
for url in sys.argv[1:]:
    try:
        parsed(url).open()
    except ModuleNotFoundError as error:
        print(error, flush=True)
"""
    urls = [f"parquet:{tmp_path}", f"nats://localhost/flows?spool={tmp_path}"]
    found = subprocess.run([sys.executable, "-c", code, *urls], check=True, capture_output=True, text=True, timeout=20)
    said = "pyarrow is not installed: pip install 'fastrecv[sinks]'"
    assert found.stdout.splitlines() == ['{"n": 1}', said, said]


def test_no_error_shows_a_password() -> None:
    with pytest.raises(ValueError, match="has no spool") as raised:
        parsed("nats://jane:s3cret@localhost/flows")
    assert "s3cret" not in str(raised.value)


def test_a_sink_is_made_of_text(tmp_path: Path) -> None:
    sink = parsed(f"jsonl:{tmp_path}/a%20b?patience=500ms")
    assert isinstance(sink, JsonLines)
    assert sink.patience == 0.5
    with sink:
        sink.publish([{"a": 1}])
    assert lines(tmp_path / "a b") == [{"a": 1}]
