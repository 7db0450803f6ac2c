"""The flow decoder on datagrams as RFC 3954 and RFC 7011 have them, and as nobody has."""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import msgspec
import numpy as np
import pytest

from fastrecv import Batch
from fastrecv._flow import MALFORMED, MOST_EXPORTERS, MOST_FIELDS, MOST_ROWS, MOST_TEMPLATES
from fastrecv.collector import decoder as decoding
from fastrecv.collector.decoder import Decoder
from fastrecv.sockets import endpoints
from tests.unit.flow_datagrams import (
    ENTERPRISE,
    IPFIX,
    NETFLOW9,
    OCTETS,
    PACKETS,
    SOURCE,
    VARIABLE,
    Taken,
    a_set,
    batch,
    options,
    options_templates,
    record5,
    sent,
    sent5,
    taken,
    template,
    templates,
)  # fmt: skip

both = pytest.mark.parametrize("version", [NETFLOW9, IPFIX])


def rows(version: int, fields: list[tuple[int, int]], *records: bytes) -> list[dict[str, object]]:
    """What records of these fields become, without the columns that every row has."""
    found = taken(sent(version, 0, templates(version, template(256, fields)), a_set(256, *records)))
    assert found["malformed"] == 0
    assert len(found.rows) == len(records)
    common = {"exporterAddress", "observationDomainId", "exportProtocolVersion", "collectionTimeMilliseconds"}
    return [{name: value for name, value in row.items() if name not in common} for row in found.rows]


def moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=milliseconds)


def test_version_5_has_the_same_names() -> None:
    record = struct.pack(
        "!4s4s4sHHIIIIHHBBBBHHBBH", bytes([192, 0, 2, 9]), bytes([198, 51, 100, 7]), bytes([0, 0, 0, 1]), 1, 65535, 10,
        2**32 - 1, 90_000, 95_000, 1024, 53, 0, 0x1B, 17, 4, 64496, 65535, 24, 32, 0,
    )  # fmt: skip
    header = struct.pack("!HHIIIIBBH", 5, 1, 100_000, 1_700_000_000, 250_000_000, 7, 1, 4, 0)
    assert taken(header + record).rows == [{
        "exporterAddress": "192.0.2.1", "observationDomainId": 0x0104, "exportProtocolVersion": 5,
        "collectionTimeMilliseconds": moment(1_000_500),
        "octetDeltaCount": 2**32 - 1, "packetDeltaCount": 10, "protocolIdentifier": 17, "ipClassOfService": 4,
        "tcpControlBits": 0x1B, "sourceTransportPort": 1024, "sourceIPv4Address": "192.0.2.9",
        "sourceIPv4PrefixLength": 24, "ingressInterface": 1, "destinationTransportPort": 53,
        "destinationIPv4Address": "198.51.100.7", "destinationIPv4PrefixLength": 32, "egressInterface": 65535,
        "ipNextHopIPv4Address": "0.0.0.1", "bgpSourceAsNumber": 64496, "bgpDestinationAsNumber": 65535,
        "flowEndMilliseconds": moment(1_699_999_995_250), "flowStartMilliseconds": moment(1_699_999_990_250),
    }]  # fmt: skip


def test_version_5_is_counted() -> None:
    first, second = sent5(0, record5(1, 40), record5(2**32 - 1, 2**32 - 1)), sent5(7, record5(3, 100))
    found = taken(first, second, second[:-1], second + b"0", sent5(8))
    assert found.counts == (3, 2**32 + 139, 2**32 + 3, 3)
    assert (found["lost"], found["length"], len(found.exporters)) == (5, 3, 1)


def test_values_of_every_type() -> None:
    six = ip_address("2001:db8::1").packed
    ntp = struct.pack("!II", 2_208_988_800 + 1_700_000_000, 1 << 31)
    fields = [(27, 16), (56, 6), (152, 8), (150, 4), (154, 8), (156, 8), (276, 1), (320, 8), (82, 8), (313, 3), (94, 4)]
    data = (
        six + bytes.fromhex("0200c0ffee01") + (1_700_000_000_123).to_bytes(8) + (1_700_000_000).to_bytes(4) + ntp + ntp
        + b"\1" + struct.pack("!d", 0.25) + b"eth0\0\0\0\0" + b"abc" + b"\0\1\2\3"
    )  # fmt: skip
    assert rows(IPFIX, fields, data) == [{
        "sourceIPv6Address": "2001:db8::1", "sourceMacAddress": "02:00:c0:ff:ee:01",
        "interfaceName": "eth0", "applicationDescription": "\0\1\2\3".rstrip("\0"),
        "flowStartMilliseconds": moment(1_700_000_000_123), "flowStartSeconds": moment(1_700_000_000_000),
        "flowStartMicroseconds": moment(1_700_000_000_500), "flowStartNanoseconds": moment(1_700_000_000_500),
        "dataRecordsReliability": True, "absoluteError": 0.25, "ipHeaderPacketSection": b"abc",
    }]  # fmt: skip


@pytest.mark.parametrize("length", range(1, 9))
def test_numbers_may_be_of_any_length(length: int) -> None:
    value = int.from_bytes(bytes(range(1, length + 1)))
    (row,) = rows(IPFIX, [(OCTETS, length), (4, length), (434, length)], 3 * value.to_bytes(length))
    assert row == {"octetDeltaCount": value, "protocolIdentifier": value, "mibObjectValueInteger": value}
    (row,) = rows(IPFIX, [(434, length)], b"\xff" * length)
    assert row == {"mibObjectValueInteger": -1}
    plain = templates(IPFIX, template(256, [(OCTETS, length)]))
    assert taken(sent(IPFIX, 0, plain, a_set(256, value.to_bytes(length))))["octets"] == value


def test_what_has_no_name_or_no_such_length_is_bytes_of_its_number() -> None:
    fields = [(9000, 3), (ENTERPRISE, 2), (8, 3), (27, 4), (152, 4), (8, 4), (8, 4), (210, 5)]
    assert rows(IPFIX, fields, bytes(range(1, 30))) == [{
        "ie9000": b"\1\2\3", "pen9999id1": b"\4\5", "ie8": b"\6\7\x08", "ie27": b"\x09\x0a\x0b\x0c",
        "ie152": b"\x0d\x0e\x0f\x10", "sourceIPv4Address": "17.18.19.20", "sourceIPv4Address.2": "21.22.23.24",
    }]  # fmt: skip


def test_reverse_elements_are_named_after_what_they_reverse() -> None:
    biflow = struct.pack("!HHHHI", 256, 1, 0x8000 | OCTETS, 4, 29305)  # RFC 5103
    found = taken(sent(IPFIX, 0, templates(IPFIX, biflow), a_set(256, (7).to_bytes(4))))
    assert found.rows[0]["reverseOctetDeltaCount"] == 7
    assert found["octets"] == 0


def test_fields_of_any_length() -> None:
    long = b"y" * 300
    data = b"".join([b"\3abc", b"\1\0", b"\0", b"\1\2", b"\xff" + len(long).to_bytes(2) + long, b"\0\3"])
    found = taken(sent(
        IPFIX, 0, templates(IPFIX, template(256, [(82, VARIABLE), (4, 2)])), a_set(256, data, padding=2)
    ))  # fmt: skip
    assert [(row["interfaceName"], row["protocolIdentifier"]) for row in found.rows] == [
        ("abc", 256), ("", 258), (long.decode(), 3)]  # fmt: skip
    assert (found["flows"], found["malformed"]) == (3, 0)


def test_a_record_beyond_its_set_ends_the_datagram_and_those_before_it_stay() -> None:
    plain = templates(IPFIX, template(256, [(82, VARIABLE)]))
    found = taken(sent(IPFIX, 0, plain, a_set(256, b"\3abc", b"\4abc"), a_set(256, b"\1d")))
    assert ([row["interfaceName"] for row in found.rows], found["data"], found["flows"]) == (["abc"], 1, 1)
    assert taken(sent(IPFIX, 0, plain, a_set(256, b"\1a\xff\0")))["data"] == 1


def test_forged_text_times_and_numbers_become_what_every_reader_takes() -> None:
    nan, late = struct.pack("!d", float("nan")), b"\xff" * 8
    assert rows(IPFIX, [(82, 3), (152, 8), (320, 8), (276, 1)], b"a\xff\xfe" + late + nan + b"\7") == [{
        "interfaceName": "a\ufffd\ufffd", "flowStartMilliseconds": moment(253402300799999), "absoluteError": None,
        "dataRecordsReliability": None,
    }]  # fmt: skip


def test_times_since_the_exporter_began_are_made_absolute_and_its_clock_may_wrap() -> None:
    plain = templates(NETFLOW9, template(256, [(22, 4), (21, 4)]))
    told = a_set(256, struct.pack("!II", 2**32 - 1000, 500))
    (row,) = taken(sent(NETFLOW9, 0, plain, told, uptime=2000, seconds=10_000)).rows
    assert (row["flowStartMilliseconds"], row["flowEndMilliseconds"]) == (moment(9_997_000), moment(9_998_500))
    (row,) = rows(IPFIX, [(22, 4)], (77).to_bytes(4))  # whose header says nothing of it
    assert row == {"flowStartSysUpTime": 77}


@both
def test_templates_are_of_a_source_and_data_without_one_is_counted(version: int) -> None:
    data = a_set(300, bytes([7, 7]))
    found = taken(sent(version, 0, data, data))
    assert (found["unknown"], *found.counts) == (2, 0, 0, 0, 0)
    known = sent(version, 1, templates(version, template(300, [(OCTETS, 1)])), data)
    assert found.take(known).counts == (2, 14, 0, 0)
    found.take(sent(version, 2, templates(version, template(300, [(PACKETS, 2)])), data))
    assert found.counts == (3, 14, 0x0707, 0)  # a template may change
    found.take(sent(version, 0, data), source="192.0.2.2")
    assert found["unknown"] == 3


@both
def test_options_are_no_flows(version: int) -> None:
    found = taken(
        sent(
            version, 0,
            options_templates(version, options(version, 400, [(OCTETS, 4)], [(OCTETS, 4), (41, 8)])),
            templates(version, template(401, [(OCTETS, 4)])),
            a_set(400, bytes(16), bytes(16)),
            a_set(401, (9).to_bytes(4)),
        ),
    )  # fmt: skip
    assert found.counts == (1, 9, 0, 0)
    assert (found["unknown"], found["lost"], found["options"]) == (0, 0, 2)
    assert found["due"] == (1 if version == NETFLOW9 else 3)


@both
def test_padding_is_no_record(version: int) -> None:
    fields = [(OCTETS, 4), (27, 1)]
    for padding in (3, 4, 8):
        found = taken(
            sent(
                version, 0, templates(version, template(256, fields), padding=padding), a_set(256, bytes(5), padding=3)
            )
        )
        assert found.counts == (1, 0, 0, 0)


def test_templates_are_withdrawn() -> None:
    plain = templates(IPFIX, template(256, [(OCTETS, 1)]), template(257, [(OCTETS, 1)]))
    special = options_templates(IPFIX, options(IPFIX, 258, [(149, 4)], [(41, 4)]))
    for withdrawn, left in (
        (templates(IPFIX, template(257, [])), {256, 258}),
        (templates(IPFIX, template(999, [])), {256, 257, 258}),
        (templates(IPFIX, template(258, [])), {256, 257, 258}),  # that is one of options
        (options_templates(IPFIX, template(258, [])), {256, 257}),
        (templates(IPFIX, template(2, [])), {258}),
        (options_templates(IPFIX, template(3, [])), {256, 257}),
    ):
        found = taken(sent(IPFIX, 0, plain, special), sent(IPFIX, 0, withdrawn))
        assert (found["malformed"], found["lost"]) == (0, 0)
        found.take(*(sent(IPFIX, 0, a_set(name, bytes(8))) for name in (256, 257, 258)))
        assert found["unknown"] == 3 - len(left)
        assert (found["flows"], found["options"]) == (8 * len(left & {256, 257}), len(left & {258}))


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("template", templates(NETFLOW9, template(255, [(OCTETS, 4)]))),
        ("template", templates(NETFLOW9, template(256, []))),
        ("template", templates(NETFLOW9, template(256, [(OCTETS, 0)]))),
        ("template", templates(NETFLOW9, template(256, [(OCTETS, 4)] * (MOST_FIELDS + 1)))),
        ("template", templates(NETFLOW9, *(template(256 + n, [(OCTETS, 4)]) for n in range(MOST_TEMPLATES + 1)))),
        ("template", templates(NETFLOW9, template(256, [(OCTETS, 4)] * 3)[:-1])),
        ("template", options_templates(NETFLOW9, b"\1\0\0\4")),
        ("data", a_set(256)),
        ("set", a_set(200, bytes(8))),
        ("set", a_set(2, bytes(8))),
        ("set", struct.pack("!HH", 256, 3)),
        ("set", struct.pack("!HH", 256, 9)),
        ("set", b"\0"),
    ],
)
def test_what_is_malformed(kind: str, wrong: bytes) -> None:
    good = templates(NETFLOW9, template(256, [(OCTETS, 4)]))
    after = sent(NETFLOW9, 2, good, a_set(256, bytes(4)))
    found = taken(sent(NETFLOW9, 0, good), sent(NETFLOW9, 1, wrong), after)
    assert {name: found[name] for name in MALFORMED} == dict.fromkeys(MALFORMED, 0) | {kind: 1}
    assert (found["datagrams"], found["flows"]) == (3, 1)


def test_headers_that_are_none() -> None:
    plain = sent(IPFIX, 0, templates(IPFIX, template(256, [(OCTETS, 4)])))
    found = taken(b"", b"\0", b"\0\x09", sent5(0)[:23], b"nonsense", bytes(2000), plain + b"\0", plain[:-1], sent5(0))
    assert {name: found[name] for name in MALFORMED} == dict.fromkeys(MALFORMED, 0) | {
        "header": 4, "version": 2, "length": 3}  # fmt: skip
    assert found["datagrams"] == 9


@pytest.mark.parametrize(
    ("version", "numbers", "lost", "late"),
    [
        (NETFLOW9, (5, 6, 9, 10), 2, 0),
        (NETFLOW9, (2**32 - 1, 0, 1), 0, 0),
        (NETFLOW9, (2**32 - 2, 1), 2, 0),
        (NETFLOW9, (2**31 + 5, 0, 1), 0, 0),
        (NETFLOW9, (1, 2, 4, 3, 5), 0, 1),  # one was overtaken
        (NETFLOW9, (1, 2, 2, 3), 0, 1),  # one came twice
        (NETFLOW9, (5000, 0, 1, 2, 3, 4, 6), 1, 3),  # the exporter has begun anew
        (IPFIX, (0, 3, 9, 12), 3, 0),
        (IPFIX, (2**32 - 3, 0, 3), 0, 0),
        (IPFIX, (0, 6, 3, 9), 0, 1),
    ],
)
def test_gaps_in_sequence_numbers_are_losses(version: int, numbers: tuple[int, ...], lost: int, late: int) -> None:
    plain = templates(version, template(256, [(OCTETS, 1)]))
    found = taken(*(sent(version, number, plain, a_set(256, bytes(3))) for number in numbers))
    assert (found["lost"], found["late"]) == (lost, late)


def numbered(*datagrams: tuple[int, int]) -> list[bytes]:
    """IPFIX datagrams of a sequence number, and of so many records."""
    plain = templates(IPFIX, template(256, [(OCTETS, 1)]))
    return [sent(IPFIX, sequence, plain, a_set(256, bytes(records))) for sequence, records in datagrams]


ITSELF = (24, 24), (56, 32), (68, 12), (100, 32), (120, 20)
"""As softflowd 1.1.0 numbers them: each with the flows of its own."""
BEFORE = (0, 3), (3, 5), (8, 2), (10, 4), (14, 6)


def test_gaps_of_an_exporter_that_counts_the_datagram_itself_in() -> None:
    assert taken(*numbered(*ITSELF))["lost"] == 0
    assert taken(*numbered(*ITSELF[:3], ITSELF[4]))["lost"] == 32
    assert taken(*numbered((24, 24), (88, 32), (100, 12)))["lost"] == 32, "its first number says it"
    assert taken(*numbered((124, 24), (188, 32), (200, 12)))["lost"] == 40  # of 32: nothing has shown its habit yet


def test_a_loss_that_looks_like_another_habit_is_one() -> None:
    assert taken(*numbered(*BEFORE))["lost"] == 0
    assert taken(*numbered(*BEFORE[:3], BEFORE[4]))["lost"] == 4  # 14 - 8 are as many as the last one has
    gaps = [(8, 8), (16, 4), (20, 5), (29, 9)]
    assert taken(*numbered((0, 3), *gaps))["lost"] == 5 + 4, "who begins with 0 is not softflowd"
    later = [(100 + sequence, records) for sequence, records in [(0, 3), *gaps]]
    assert taken(*numbered(*later))["lost"] == 4, "one datagram that fits another habit settles nothing"


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("stream", "lost"), [(ITSELF, 32), (BEFORE, 4)])
def test_the_habit_of_an_exporter_goes_to_the_next(stream: tuple[tuple[int, int], ...], lost: int, exact: bool) -> None:
    second = Taken()
    second.decoder.restore(taken(*numbered(*stream[:3])).decoder.snapshot(), exact)
    second.take(*numbered(*stream[2:3] if not exact else (), stream[4]))
    assert second["lost"] == lost


def test_an_exporter_that_begins_anew_may_have_another_habit() -> None:
    again = [((1 << 31) + sequence, records) for sequence, records in ITSELF]
    assert taken(*numbered(*BEFORE, *again))["lost"] == 0
    assert taken(*numbered(*BEFORE, *again[:3], again[4]))["lost"] == 32
    assert taken(*numbered(*ITSELF, *again))["lost"] == 0
    assert taken(*numbered(*ITSELF, *again[:3], again[4]))["lost"] == 32
    before = [((1 << 31) + sequence, records) for sequence, records in BEFORE]
    assert taken(*numbered(*ITSELF, *before))["lost"] == 0


def test_those_that_are_too_many_have_no_sequence_together() -> None:
    found = Taken()
    spread = [(str(ip_address(0x0A000000 + host)), 9) for host in range(MOST_EXPORTERS)]
    list(found.decoder.take(Batch.of([sent5(0, record5(1, 1))] * len(spread), endpoints(spread))))
    plain = templates(NETFLOW9, template(256, [(OCTETS, 1)]))
    found.take(*(sent(NETFLOW9, number, plain) for number in (5, 9, 1)), source="203.0.113.9")
    assert (found["lost"], found["late"], found["datagrams"]) == (0, 0, MOST_EXPORTERS + 3)


def test_after_records_that_nobody_could_count_no_loss_is_made_up() -> None:
    plain = templates(IPFIX, template(256, [(OCTETS, 1)]))
    assert taken(sent(IPFIX, 0, plain), sent(IPFIX, 0, a_set(999, b"?")), sent(IPFIX, 7, plain))["lost"] == 0


# What is bounded, and what outlives a decoder


def test_forged_exporters_are_one_and_silent_ones_are_forgotten() -> None:
    known = sent(NETFLOW9, 1, templates(NETFLOW9, template(256, [(OCTETS, 4)])), a_set(256, bytes(4)))
    found = taken(known)
    spread = [ip_address(0x0A000000 + host) for host in range(MOST_EXPORTERS + 500)]
    forged = Batch.of([sent5(0, record5(1, 1))] * len(spread), endpoints([(str(one), 9) for one in spread]))
    assert [len(raw) for raw in found.decoder.take(forged, 5000.0)] == []
    table = found.exporters
    assert (len(table), table["datagrams"][-1], table["address"][-1].any()) == (MOST_EXPORTERS + 1, 501, False)
    (raw,) = found.decoder.flush()
    texts = found.decoder.finish(raw).column("exporterAddress").to_pylist()
    assert (texts[0], texts[-1]) == ("10.0.0.0", "::")
    found.take(known, source="203.0.113.9")
    assert (found["flows"], found["unknown"]) == (1 + len(spread), 2), "one has no template for another"
    assert not list(found.decoder.forget(4000.0))
    assert len(found.exporters) == MOST_EXPORTERS + 1
    assert not list(found.decoder.forget(1000.5 + 3600.1))
    assert len(found.exporters) == MOST_EXPORTERS - 1, "the first and the last have been silent for an hour"
    assert found.take(sent(NETFLOW9, 2, a_set(256, bytes(4))))["unknown"] == 1  # it is a new one now


def test_templates_of_those_who_stay_stay() -> None:
    def data(version: int) -> bytes:
        return sent(version, 2, a_set(256, (7).to_bytes(2)))

    found = Taken()
    for host, elements in (("192.0.2.1", OCTETS), ("192.0.2.2", PACKETS), ("192.0.2.3", 4)):
        found.take(sent(IPFIX, 1, templates(IPFIX, template(256, [(elements, 2)]))), source=host)
    list(found.decoder.take(batch(data(IPFIX), source="192.0.2.2"), 9000.0))
    list(found.decoder.take(batch(data(IPFIX), source="192.0.2.3"), 9000.0))
    assert sum(len(raw) for raw in found.decoder.forget(9000.0)) == 2
    assert found.decoder.pending == 0
    found.take(data(IPFIX), source="192.0.2.2").take(data(IPFIX), source="192.0.2.3")
    assert [row.get("packetDeltaCount", row.get("protocolIdentifier")) for row in found.rows] == [7, 7]
    assert [row["exporterAddress"] for row in found.rows] == ["192.0.2.2", "192.0.2.3"]


def test_layouts_are_bounded_and_those_that_somebody_has_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MOST_LAYOUTS", 8)
    found = Taken()
    for number in range(50):
        fields = [(OCTETS, 4), (9000 + number, 1 + number)]
        found.take(sent(IPFIX, 0, templates(IPFIX, template(256, fields)), a_set(256, bytes(5 + number))))
    assert (found["flows"], found["malformed"], len(found.rows)) == (50, 0, 50)
    assert len(found.decoder._layouts) <= 8
    for number in range(50):
        found.take(sent(IPFIX, 0, templates(IPFIX, template(300 + number, [(OCTETS, 2), (9000 + number, 1)]))))
        found.take(sent(IPFIX, 0, a_set(300 + number, bytes(3))))
    assert (found["flows"], found["unknown"], len(found.decoder._layouts) <= 8) == (100, 0, True)


def test_who_comes_with_too_many_layouts_costs_those_before_him_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MOST_LAYOUTS", 16)
    found, plain = Taken(), sent(IPFIX, 0, templates(IPFIX, template(256, [(OCTETS, 4)])))
    for host in range(3):
        found.take(plain, source=f"192.0.2.{host}")
    for number in range(100):
        wild = templates(IPFIX, template(256 + number % 20, [(9000 + number, 4)]))
        found.take(sent(IPFIX, 0, wild), source=f"203.0.113.{number // 20}")
    for host in range(3):
        found.take(sent(IPFIX, 0, a_set(256, bytes(4))), source=f"192.0.2.{host}")
    assert (found["flows"], found["unknown"], len(found.decoder._layouts) <= 16) == (3, 0, True)


def test_a_field_of_no_length_is_no_column() -> None:
    assert rows(IPFIX, [(82, 0), (4, 1), (9000, 0)], b"\7", b"\x08") == [
        {"protocolIdentifier": 7}, {"protocolIdentifier": 8}]  # fmt: skip
    assert rows(IPFIX, [(82, 0), (82, VARIABLE)], b"\1a", b"\0") == [{"interfaceName": "a"}, {"interfaceName": ""}]


def test_few_bytes_that_make_many_rows_are_given_away_in_between() -> None:
    found = Taken()
    found.take(sent(NETFLOW9, 0, templates(NETFLOW9, template(256, [(4, 1)]))))
    dense = sent(NETFLOW9, 1, a_set(256, bytes(65000)))
    taken_away = [len(raw) for raw in found.decoder.take(batch(*[dense] * 5), 1.0)]
    assert taken_away == [2 * 65000, 2 * 65000]
    assert all(rows <= MOST_ROWS for rows in taken_away)
    assert [len(raw) for raw in found.decoder.flush()] == [65000]


def test_the_state_goes_to_the_next() -> None:
    first = taken(
        sent(NETFLOW9, 1, templates(NETFLOW9, template(256, [(OCTETS, 4)])), a_set(256, (1500).to_bytes(4))),
        sent(NETFLOW9, 2, options_templates(NETFLOW9, options(NETFLOW9, 257, [(1, 2)], [(41, 2)]))),
    )
    more = (sent(NETFLOW9, 4, a_set(256, (40).to_bytes(4))), sent(NETFLOW9, 5, a_set(257, bytes(4))))
    for exact, lost in ((True, 1), (False, 0)):
        second = Taken()
        second.decoder.restore(first.decoder.snapshot(), exact)
        assert second.take(*more).counts == (2, 1540, 0, 0)
        assert (second["lost"], second["options"], second["datagrams"]) == (lost, 1, 4)
        assert [row["octetDeltaCount"] for row in second.rows] == [40]
        assert second.rows[0]["observationDomainId"] == SOURCE


def test_a_state_that_is_none_changes_nothing() -> None:
    one = Taken()
    for data in (b"nonsense", b"", msgspec.msgpack.encode([b"short", [], []])):
        with pytest.raises((msgspec.DecodeError, ValueError)):
            one.decoder.restore(data)
    assert one.take(sent5(0, record5(1, 1)))["flows"] == 1


def test_batches_without_senders_are_refused() -> None:
    with pytest.raises(TypeError, match="a UDP socket have it"):
        list(Decoder().take(Batch.of([b"x"])))


def test_an_ipv6_exporter_and_a_mapped_one_have_their_texts() -> None:
    found = Taken().take(sent5(0, record5(1, 1)), source="2001:db8::1").take(sent5(0, record5(1, 1)))
    assert [row["exporterAddress"] for row in found.rows] == ["2001:db8::1", "192.0.2.1"]
    assert np.array_equal(found.exporters["address"][1][-4:], [192, 0, 2, 1])
