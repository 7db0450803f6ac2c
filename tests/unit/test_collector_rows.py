"""Rows that leave: sums by keys and windows, and the shards of exporters."""

from __future__ import annotations

from typing import Any

import pytest

from fastrecv.collector import aggregate as aggregating
from fastrecv.collector.aggregate import Aggregation
from fastrecv.collector.decoder import Decoder
from fastrecv.collector.settings import SHARDING
from fastrecv.sinks import Shards
from tests.unit.collecting import DATAGRAM, SOURCES, bucket_of
from tests.unit.flow_datagrams import (
    IPFIX,
    a_set,
    batch,
    record5,
    sent,
    sent5,
    template,
    templates,
)


def summed(keys: list[str], *datagrams: bytes) -> list[dict[str, Any]]:
    decoder, one = Decoder(), Aggregation(keys, 60.0)
    list(decoder.take(batch(*datagrams), 1000.0))
    for raw in decoder.flush():
        assert not list(one.add(decoder.by_address(raw)))
    rows = [row for raw in one.close() for row in decoder.finish(raw).to_pylist()]
    assert not list(one.close())
    return rows


def test_flows_with_the_same_keys_are_one_row_and_a_key_that_they_lack_is_null() -> None:
    four = templates(IPFIX, template(256, [(8, 4), (1, 4), (2, 4)]), template(257, [(27, 16), (1, 8)]))
    told = a_set(256, *(bytes([10, 0, 0, host, 0, 0, 0, 9, 0, 0, 0, 2]) for host in (1, 2, 1)))
    rows = summed(["sourceIPv4Address", "sourceIPv6Address"], sent(IPFIX, 0, four, told, a_set(257, bytes(24))))
    found = {
        (row["sourceIPv4Address"], row["sourceIPv6Address"]): (
            row["deltaFlowCount"], row["octetDeltaCount"], row["packetDeltaCount"])
        for row in rows
    }  # fmt: skip
    assert found == {("10.0.0.1", None): (2, 18, 4), ("10.0.0.2", None): (1, 9, 2), (None, "::"): (1, 0, None)}
    assert [(row["flowStartMilliseconds"].timestamp(), row["flowEndMilliseconds"].timestamp()) for row in rows] == [
        (960, 1020)] * 3  # fmt: skip


def test_an_exporter_is_one_whatever_its_domains_and_versions() -> None:
    five = [sent5(0, record5(1, 10), engine=engine) for engine in (1, 2)]
    (row,) = summed(["exporterAddress"], *five, DATAGRAM)
    assert (row["exporterAddress"], row["deltaFlowCount"], row["octetDeltaCount"]) == ("192.0.2.1", 3, 1520)
    assert len(summed(["exporterAddress", "observationDomainId"], *five, DATAGRAM)) == 3


def test_a_row_is_of_the_window_in_which_it_came_however_late_anybody_looks() -> None:
    decoder, one = Decoder(), Aggregation(["exporterAddress"], 1.0)
    for now in (100.2, 100.9, 101.1, 104.3):
        list(decoder.take(batch(DATAGRAM), now))
    for raw in decoder.flush():
        assert not list(one.add(raw))
    over = [row for raw in one.close(104.9) for row in raw.to_pylist()]
    over += [row for raw in one.close() for row in raw.to_pylist()]
    found = [(row["flowStartMilliseconds"].timestamp(), row["deltaFlowCount"]) for row in over]
    assert found == [(100, 2), (101, 1), (104, 1)]
    list(decoder.take(batch(DATAGRAM), 104.9))
    for raw in decoder.flush():
        assert not list(one.add(raw))
    assert not list(one.close(104.99))
    assert len(list(one.close(105.0))) == 1


def test_a_window_with_too_many_rows_gives_them_away_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregating, "MOST_GROUPS", 100)
    monkeypatch.setattr(aggregating, "_MERGE", 10)
    decoder, one = Decoder(), Aggregation(["sourceIPv4Address"], 60.0)
    plain, early = templates(IPFIX, template(256, [(8, 4)])), []
    for number in range(10):
        told = a_set(256, *((1000 * number + host).to_bytes(4) for host in range(50)))
        list(decoder.take(batch(sent(IPFIX, 0, plain, told)), 1000.0))
        early += [len(rows) for raw in decoder.flush() for rows in one.add(raw)]
    late = [len(rows) for rows in one.close()]
    assert early
    assert max(early) <= 200
    assert sum(early) + sum(late) == 500


def sharded(*aggregate: str) -> dict[int, list[dict[str, Any]]]:
    """The rows of four exporters by shard, each of which has sent a flow of as many octets as its place says."""
    decoder = Decoder(Shards(SHARDING, 8))
    for place, source in enumerate(SOURCES):
        list(decoder.take(batch(sent5(0, record5(1, place)), source=source), 1000.0))
    raws = list(decoder.flush())
    if aggregate:
        one = Aggregation(aggregate, 60.0)
        assert not [early for raw in raws for early in one.add(decoder.by_address(raw))]
        raws = list(one.close())
    return {shard: decoder.finish(part).to_pylist() for raw in raws for shard, part in decoder.split(raw)}


def test_rows_are_of_the_shard_of_their_exporters_address_and_sums_of_many_exporters_of_the_first() -> None:
    expected: dict[int, list[int]] = {}
    for place, source in enumerate(SOURCES):
        expected.setdefault(bucket_of(source) % 8, []).append(place)
    assert len(expected) > 1
    for keys in ([], ["exporterAddress"], ["protocolIdentifier", "exporterAddress"]):
        found = sharded(*keys)
        assert {shard: [row["octetDeltaCount"] for row in rows] for shard, rows in found.items()} == expected
        assert [row["exporterAddress"] for shard in sorted(found) for row in found[shard]] == [
            SOURCES[place] for shard in sorted(expected) for place in expected[shard]
        ]
    assert {
        shard: [row["octetDeltaCount"] for row in rows] for shard, rows in sharded("protocolIdentifier").items()
    } == {0: [6]}


def test_few_rows_take_the_addresses_of_their_own_exporters_along_only() -> None:
    decoder = Decoder()
    for source in SOURCES:
        list(decoder.take(batch(sent5(0, record5(1, 1)), source=source)))
    (raw,) = decoder.flush()
    column = decoder.finish(raw.slice(2, 1)).column("exporterAddress")
    assert (column.to_pylist(), column.dictionary.to_pylist()) == ([SOURCES[2]], [SOURCES[2]])
