"""Outlets and the one schema of what leaves: a sink that fails or refuses costs its rows, counted, and no others."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from fastrecv.collector import outlet, union
from fastrecv.collector.outlet import Outlet
from fastrecv.collector.union import Union
from fastrecv.sinks import BaseSink, SinkFull, SinkStatistics
from fastrecv.sinks.interface import Data
from tests.unit.collecting import lines
from tests.unit.flow_datagrams import (
    IPFIX,
    Taken,
    a_set,
    batch,
    sent,
    template,
    templates,
)


class Stopwatch:
    """In place of the module: so much time has passed as it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_sink_that_fails_costs_rows_that_are_counted_and_is_opened_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet, "_AGAIN", 0.0)
    (tmp_path / "flows").symlink_to("/dev/full")
    one = Outlet(f"jsonl:{tmp_path}/flows")
    one.open()
    record = pa.record_batch({"x": [1, 2]})
    one.publish({0: [record]})
    assert (one.taken, one.lost) == (0, 2)
    (tmp_path / "flows").unlink()
    one.publish({0: [record]})
    one.close(1)
    assert (one.taken, one.lost) == (2, 2)
    assert lines(tmp_path / "flows") == [{"x": 1}, {"x": 2}]
    assert "flows' has failed, and is opened again in 0 s: [Errno 28] No space left on device" in caplog.messages[0]
    (tmp_path / "flows").unlink()
    (tmp_path / "flows").mkdir()
    with pytest.raises(IsADirectoryError):
        Outlet(f"jsonl:{tmp_path}/flows").open()
    assert caplog.messages[-1] == "2 rows are lost: the sink had failed"


def test_a_sink_without_room_costs_rows_that_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    one = Outlet(f"jsonl:{tmp_path}/pipe?patience=0")
    one.open()
    record = pa.record_batch({"x": ["y" * 1000] * 6000})
    for _ in range(3):
        one.publish({0: [record]})
    assert (one.taken, one.lost) == (6000, 12000)
    assert "6000 rows are lost: " in caplog.messages[0]
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        one.sink.flush(0)  # type: ignore[union-attr]
    one.close(0)


def test_rows_that_a_sink_refuses_cost_no_others_and_its_password_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = Outlet(f"nats://user:sec%2Fret@127.0.0.1:9/flows?spool={tmp_path}")
    one.open()
    one.publish({0: [pa.record_batch({"x": [b"y" * 2_000_000]})]})
    one.publish({0: [pa.record_batch({"x": [b"y"]}), pa.record_batch({"x": [b"z"]})]})
    assert (one.taken, one.lost) == (2, 1)
    assert one.sink is not None
    assert one.sink.statistics().published == 1
    one.close(0)
    assert any(said.startswith("1 rows are lost: a row of 2000") for said in caplog.messages)
    assert "'nats://...@127.0.0.1:9/flows?spool=" in caplog.messages[-1]
    assert "%2Fret" not in caplog.text


def test_rows_of_many_templates_have_one_schema_and_made_up_names_are_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(union, "MOST_UNNAMED", 2)
    found, one = Taken(), Union()
    records = []
    for number, fields in enumerate(
        [[(8, 4)], [(27, 16)], [(9001, 1), (9002, 1), (9003, 1)], [(8, 4), (4, 8)], [(4, 1)]]
    ):
        data = bytes(sum(length for _, length in fields))
        datagram = sent(IPFIX, number, templates(IPFIX, template(256, fields)), a_set(256, data))
        list(found.decoder.take(batch(datagram)))
        records += [one.joined(found.decoder.finish(raw)) for raw in found.decoder.flush()]
    assert one.schema.names[4:] == ["sourceIPv4Address", "sourceIPv6Address", "ie9001", "ie9002", "protocolIdentifier"]
    assert one.left_out == 1
    assert caplog.messages == ["2 columns have names that are not IANA's: further ones are left out"]
    assert records[-1].schema == records[-2].schema == one.schema
    assert records[-1].schema.field("protocolIdentifier").type == pa.uint64()
    rows = [row for record in records for row in record.to_pylist()]
    assert one.joined(*records).to_pylist() == [{name: row.get(name) for name in one.schema.names} for row in rows]
    assert [row.get("sourceIPv4Address") for row in rows] == ["0.0.0.0", None, None, "0.0.0.0", None]  # noqa: S104
    assert [row.get("protocolIdentifier") for row in rows] == [None, None, None, 0, 0]


def test_forged_columns_go_after_an_hour_and_those_that_somebody_has_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(union, "time", clock := Stopwatch())
    monkeypatch.setattr(union, "MOST_UNNAMED", 20)
    one = Union()

    def own(first: int) -> pa.RecordBatch:
        """What two honest exporters have together, of which one says little."""
        return one.joined(*(pa.record_batch({"octetDeltaCount": [first], name: [1]}) for name in ("ie9", "vlanId")))

    names = own(0).schema.names
    assert names == ["octetDeltaCount", "ie9", "vlanId"]
    forged = [pa.record_batch({f"ie{9000 + number}": [b"x"], "sourceIPv4Address": ["::"]}) for number in range(30)]
    one.joined(*forged)
    assert len(own(1).schema) == 3 + 19 + 1
    assert one.left_out == 11
    clock.now = union.FORGOTTEN
    busy = pa.record_batch({"octetDeltaCount": [2]})
    assert len(own(2).schema) == 3 + 19 + 1, "an hour has not passed"
    clock.now += 1
    assert one.joined(busy).schema.names == names, "what was there in this hour stays, in its order"
    assert own(3).schema.names == names
    assert one.joined(*forged[:19]).schema.names[3:5] == ["ie9000", "sourceIPv4Address"]
    assert one.left_out == 11, "there is room for other names again"
    clock.now *= 3
    assert one.joined(busy).to_pylist() == [{"octetDeltaCount": 2}]


class Choosy(BaseSink):
    """Refuses rows of shard 1, and has no room from shard 3 on."""

    def __init__(self) -> None:
        super().__init__(0)
        self.asked: list[int] = []

    def open(self) -> None:
        self._opening()

    def publish(self, data: Data, shard: int = 0) -> None:
        self.asked.append(shard)
        if shard == 1:
            raise ValueError("a row is too long")
        if shard >= 3:
            raise SinkFull("there is no room")

    def flush(self, timeout: float | None = None) -> None: ...

    def close(self, timeout: float | None = None) -> None:
        self._closed = True

    def statistics(self) -> SinkStatistics:
        return SinkStatistics()


def test_a_part_that_is_refused_costs_no_others_and_a_full_sink_is_waited_for_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Choosy()
    monkeypatch.setattr(outlet, "parsed", lambda _url: sink)
    one = Outlet("choosy:")
    one.open()
    rows = pa.record_batch({"x": [1, 2]})
    one.publish({0: [rows], 1: [rows], 2: [rows, rows], 3: [rows], 4: [rows]})
    assert (one.taken, one.lost, sink.asked) == (6, 6, [0, 1, 2, 3])
    assert caplog.messages == ["2 rows are lost: a row is too long", "4 rows are lost: there is no room"]
    one.publish({0: [rows]})
    assert one.taken == 8
    one.close(0)
