"""The account of the scale-out bench over records made up here: what is wrong with them, it says."""

from __future__ import annotations

import importlib
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from fastrecv.bench.numbered import NUMBERED
from fastrecv.bench.scale_out import account, tables
from fastrecv.bench.scale_out.account import AtHost, Deliveries
from fastrecv.bench.scale_out.addresses import SHARDS
from fastrecv.bench.scale_out.cli import command
from fastrecv.bench.scale_out.consuming import DELIVERED, DELIVERIES, KEPT, Ledger, records_of, shard_of
from fastrecv.bench.scale_out.engine import Held
from fastrecv.bench.scale_out.exporters import DATAGRAM, RECORDS, filled, numbered, sent_by_each
from fastrecv.bench.scale_out.paper import needed
from fastrecv.bench.scale_out.running import FAULTS, Plan, Run, schedule
from fastrecv.bench.scale_out.throughput import Throughput
from fastrecv.collector.decoder import Decoder
from fastrecv.collector.settings import SHARDING
from fastrecv.sinks import Shards
from tests.unit.flow_datagrams import batch

EXPORTERS, ROUNDS, HOSTS, BATCH = 60, 12, 3, 2
Rows = NDArray[np.void]


def sent() -> Rows:
    """All records of all rounds, in the order in which they are sent; the route changes in phase 1, round 6."""
    rows = np.zeros(EXPORTERS * ROUNDS * RECORDS, NUMBERED)
    datagram, record = np.divmod(np.arange(len(rows)), RECORDS)
    turn, rows["sender"] = np.divmod(datagram, EXPORTERS)
    rows["number"] = turn * RECORDS + record
    rows["phase"] = np.select([turn < 6, turn == 6], [0, 1], 2)
    return rows


@dataclass
class Story:
    """Exporters are at host number % 3 until host 2 goes, then at number % 2; all comes to the consumers."""

    acknowledged: list[Rows] = field(init=False)
    kept: Rows = field(init=False)
    delivered: Rows = field(init=False)
    removed: int = 4
    destroyed: int = 0
    killed: frozenset[int] = frozenset()
    deaths: int = 0

    def __post_init__(self) -> None:
        self.kept = sent()
        at = np.where(self.kept["phase"] == 0, self.kept["sender"] % 3, self.kept["sender"] % 2)
        self.acknowledged = [self.kept[at == number] for number in range(HOSTS)]
        self.arrived = [len(rows) // RECORDS for rows in self.acknowledged]
        messages = len(self.kept) // 100
        self.delivered = np.zeros(messages, DELIVERED)
        self.delivered["sequence"], self.delivered["times"], self.delivered["records"] = np.arange(messages), 1, 100

    def hosts(self) -> list[AtHost]:
        counted = {"NoPorts": 0, "InErrors": 0}
        return [
            account.at_host(
                number, self.arrived[number], counted | {"InDatagrams": self.arrived[number] - self.destroyed},
                len(self.acknowledged[number]), killed=number in self.killed, deaths=self.deaths,
            )
            for number in range(HOSTS)
        ]  # fmt: skip

    def judged(self) -> account.Account:
        return account.judged(
            EXPORTERS, EXPORTERS * ROUNDS, self.hosts(), self.acknowledged, self.kept,
            account.deliveries(self.delivered, self.removed),
        )  # fmt: skip

    def faults(self) -> list[str]:
        return account.faults(self.judged(), BATCH)


def test_where_nothing_is_wrong_nothing_is_said() -> None:
    story = Story()
    found = story.judged()
    assert account.faults(found, BATCH) == []
    assert found.sent == found.arrived == found.queued == found.acknowledged == found.kept == 7200
    assert found.before == found.nowhere == found.saved == found.in_hands == found.destroyed == 0
    assert found.deliveries == Deliveries(72, 0, 7200, 0, 4, 0)


def test_a_record_that_was_acknowledged_and_is_at_no_consumer_is_a_fault() -> None:
    story = Story()
    story.kept = np.delete(story.kept, [5, 77])
    assert story.faults() == ["2 records were acknowledged and are at no consumer"]


def test_a_duplicate_that_is_left_is_a_fault() -> None:
    story = Story()
    story.kept = np.concatenate([story.kept, story.kept[100:103]])
    assert story.faults() == ["3 duplicates are left after their removal"]


def test_duplicates_that_were_removed_are_counted_by_their_kind() -> None:
    story = Story()
    again = np.array(
        [(3, 2, 100, 100, 0), (900, 1, 50, 50, 0)], DELIVERED
    )  # message 3 once more; 50 records in another one
    story.delivered = np.concatenate([story.delivered, again])
    found = story.judged()
    assert account.faults(found, BATCH) == []
    assert found.before == 150
    assert found.deliveries == Deliveries(73, 1, 7350, 50, 4, 0)


def test_a_record_in_another_shard_than_its_exporters_is_a_fault() -> None:
    story = Story()
    story.delivered["astray"][5:7] = 3, 4
    assert story.faults() == ["7 records came in another shard than their exporter's"]


def test_a_record_that_two_hosts_acknowledge_is_a_fault() -> None:
    story = Story()
    story.acknowledged[1] = np.concatenate([story.acknowledged[1], story.acknowledged[0][:1]])
    story.arrived[1] += 1
    assert "1 records were acknowledged twice" in story.faults()


def test_a_record_that_nobody_has_sent_is_a_fault() -> None:
    story = Story()
    made_up = np.array([(EXPORTERS, 0, 0), (0, ROUNDS * RECORDS, 0)], NUMBERED)
    story.kept = np.concatenate([story.kept, made_up])
    story.deaths = 1
    assert "2 records are at a consumer that nobody has sent" in story.faults()


def test_a_queue_may_be_destroyed_where_a_host_was_killed_only() -> None:
    story = Story(killed=frozenset({0, 1, 2}), destroyed=3)
    story.acknowledged = [rows[: -3 * RECORDS] for rows in story.acknowledged]
    story.kept = np.concatenate(story.acknowledged)
    assert story.faults() == []
    assert story.judged().destroyed == 3 * RECORDS * HOSTS
    story.killed = frozenset({1, 2})
    assert story.faults() == ["host 0: 30 records were lost with a queue, though it was never killed"]


def test_a_batch_may_be_in_the_hands_of_a_dead_worker_and_no_more() -> None:
    story = Story(deaths=1)
    story.acknowledged = [rows[: -BATCH * RECORDS] for rows in story.acknowledged]
    found = story.judged()
    assert account.faults(found, BATCH) == []
    assert (found.in_hands, found.saved) == (60, 60)
    story.acknowledged[2] = story.acknowledged[2][:-1]
    assert story.faults() == ["host 2: 21 records in the hands of 1 dead workers, 20 at most"]
    story.deaths = 0
    assert len(story.faults()) == HOSTS


def test_exporters_that_move_are_counted_and_those_at_two_hosts() -> None:
    story = Story()
    moved = account.moves(story.acknowledged, EXPORTERS, 3, [("host 2 taken away", 3, 2)])
    (step,) = moved.steps
    assert (step.moved, step.ideal, moved.spread, moved.unseen) == (40, 20.0, 0, 0)  # by modulo, n % 3 != n % 2
    stray = np.array([(0, 55, 0)], NUMBERED)
    spread = [story.acknowledged[0], np.concatenate([story.acknowledged[1], stray]), story.acknowledged[2]]
    assert account.moves(spread, EXPORTERS, 3, []).spread == 1


def test_the_datagrams_are_netflow_5_and_say_whose_they_are() -> None:
    datagram = filled(1200, exporter=7, phase=3)
    parsed = importlib.import_module("netflow").parse_packet(datagram, {})  # ships no types
    assert (parsed.header.version, parsed.header.count, len(parsed.flows)) == (5, RECORDS, RECORDS)
    assert struct.unpack_from("!I", datagram, 16) == (1200,)  # flow_sequence
    rows = numbered(np.frombuffer(datagram, DATAGRAM))
    assert rows["sender"].tolist() == [7] * RECORDS
    assert rows["number"].tolist() == list(range(1200, 1200 + RECORDS))
    assert set(rows["phase"].tolist()) == {3}


def test_they_take_turns() -> None:
    assert sent_by_each(4, 10).tolist() == [3 * RECORDS, 3 * RECORDS, 2 * RECORDS, 2 * RECORDS]


def test_a_consumer_keeps_each_record_once_also_after_a_kill(tmp_path: Path) -> None:
    rows = sent()[:500]
    ledger = Ledger(tmp_path)
    shards = np.array([shard_of(exporter) for exporter in rows["sender"].tolist()])
    ledger.take(rows[:300], 0, 1, 1)
    ledger.take(rows[200:400], 1, 2, 1)
    ledger.close()
    with (tmp_path / KEPT).open("ab") as kept:
        kept.write(rows[400].tobytes()[:5])  # a SIGKILL in the middle of a row
    ledger = Ledger(tmp_path)
    ledger.take(rows[200:400], 1, 2, 2)
    ledger.take(rows[350:], 0, 3, 1)
    ledger.close()
    assert np.array_equal(np.fromfile(tmp_path / KEPT, NUMBERED), rows)
    found = np.fromfile(tmp_path / DELIVERIES, DELIVERED)
    astray = [int(np.count_nonzero(shards[part] != shard)) for part, shard in (
        (slice(300), 0), (slice(200, 400), 1), (slice(200, 400), 1), (slice(350, None), 0))]  # fmt: skip
    assert min(astray) > 0
    assert found.tolist() == [
        (1, 1, 300, 0, astray[0]), (2, 1, 200, 100, astray[1]), (2, 2, 200, 200, astray[2]), (3, 1, 150, 50, astray[3])
    ]  # fmt: skip
    assert account.deliveries(found, 0) == Deliveries(3, 1, 850, 150, 0, sum(astray))


def collected(*datagrams: tuple[str, bytes]) -> list[tuple[int, bytes]]:
    """What the collector publishes of datagrams, each from an address: shards and messages."""
    decoder, messages = Decoder(Shards(SHARDING, SHARDS)), []
    for address, datagram in datagrams:
        list(decoder.take(batch(datagram, source=address)))
    for raw in decoder.flush():
        for shard, part in decoder.split(raw):
            record, stream = decoder.finish(part), pa.BufferOutputStream()
            with pa.ipc.new_stream(stream, record.schema) as writer:
                writer.write_batch(record)
            messages.append((shard, stream.getvalue().to_pybytes()))
    return messages


def test_a_message_of_the_collector_gives_its_records_and_its_shard_is_their_exporters() -> None:
    datagrams = [(f"198.18.{exporter // 256}.{exporter % 256}", filled(10 * exporter, exporter, 3))
                 for exporter in (0, 1, 2, 300, 1999)]  # fmt: skip
    found = [(shard, records_of(message)) for shard, message in collected(*datagrams)]
    assert len(found) > 1
    for shard, rows in found:
        assert {shard_of(exporter) for exporter in rows["sender"].tolist()} == {shard}
    rows = np.concatenate([rows for _, rows in found])
    rows.sort(order=["sender", "number"])
    assert np.array_equal(rows, numbered(np.frombuffer(b"".join(data for _, data in datagrams), DATAGRAM)))
    (message,) = (message for _, message in collected(("198.18.0.7", filled(0, 8, 0))))
    with pytest.raises(ValueError, match="a record is of another exporter than it says"):
        records_of(message)


def test_everything_befalls_once_and_in_order() -> None:
    due = schedule(60, seed=3)
    assert due == sorted(due) == schedule(60, seed=3) != schedule(60, seed=4)
    assert [what for _, what in due if what != "kill_worker"] == [what for _, what in FAULTS]
    assert sum(what == "kill_worker" for _, what in due) == 12
    assert sum(what == "kill_worker" for _, what in schedule(4, seed=1)) == 2
    assert all(0 < at < 60 for at, _ in due)


def test_a_hundred_hosts_need_a_hundred_times_as_much() -> None:
    need = needed(Throughput(1, 2.0, records=1000, messages=100, bytes=64_000, microseconds={"engine": 8.0}))
    assert (need.records, need.messages, need.bytes, need.copied) == (50_000, 5000, 3_200_000, 9_600_000)
    assert need.cpus == {"engine": pytest.approx(0.4)}
    assert need.stored == 600 * 9_600_000
    assert need.spooled == 600 * 32_000
    assert need.ids == 600 * 5000


def test_a_run_is_told_in_words_and_in_json() -> None:
    story = Story()
    story.kept = story.kept[1:]
    found = story.judged()
    run = Run(
        2, [Throughput(1, 2.0, 1000, 100, 64_000, {"hosts": 5.0})], 6.0, 7200, {"host killed": 1}, found,
        account.moves(story.acknowledged, EXPORTERS, 3, [("host 2 taken away", 3, 2)]), 40, Held(0, 0, 0, 0),
        account.faults(found, BATCH),
    )  # fmt: skip
    told = tables.described(Plan(3, EXPORTERS, 6.0, 1200, 1, 0), run)
    assert "FAULT: 1 records were acknowledged and are at no consumer" in told
    assert "| host 2 taken away | 3 to 2 |              40 |                20 |" in told
    assert (
        "| 1     |              500 |                       5.0 |                10 |                           64 |"
        in told
    )
    kept = json.loads(json.dumps(tables.record(run)))
    assert kept["account"]["nowhere"] == 1
    assert kept["account"]["hosts"][0]["acknowledged"] == len(story.acknowledged[0])
    assert kept["throughput"][0]["rate"] == 500


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "1000"], "2,000 exporters in 60 s need --rate 6667 at least"),
        (["--exporters", "20000"], "'--exporters': 20000 is not in the range"),
        (["--hosts", "1"], "'--hosts': 1 is not in the range"),
        (["--policy", "2"], "'--policy': '2' is not one of"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2
    assert words in result.output
