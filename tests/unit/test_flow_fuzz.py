"""Whatever is sent: nothing is raised, every row lies within the data, and every datagram is decoded or counted."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.flow_datagrams import (
    ENTERPRISE,
    IPFIX,
    NETFLOW9,
    OCTETS,
    PACKETS,
    VARIABLE,
    Taken,
    a_set,
    options,
    options_templates,
    record5,
    sent,
    sent5,
    taken,
    template,
    templates,
)

Sets = tuple[int, list[tuple[int, int]], bytes, tuple[int, int, int]]


@st.composite
def data_sets(draw: st.DrawFn) -> Sets:
    """A version, fields, records of them, and what these say: flows, octets, packets."""
    version = draw(st.sampled_from([NETFLOW9, IPFIX]))
    others = st.tuples(st.sampled_from([4, 7, 8, 12, 22, 27, 82, 152, 210, 300, 320]), st.integers(1, 20))
    if version == IPFIX:
        others |= st.tuples(st.sampled_from([82, 313, ENTERPRISE]), st.integers(1, 9) | st.just(VARIABLE))
    fields = draw(st.lists(others, min_size=1, max_size=6))
    fields.insert(draw(st.integers(0, len(fields))), (OCTETS, draw(st.integers(1, 8))))
    if draw(st.booleans()):
        fields.insert(draw(st.integers(0, len(fields))), (PACKETS, draw(st.integers(1, 8))))
    data, sums = b"", {OCTETS: 0, PACKETS: 0}
    records = draw(st.integers(1, 12))
    for _ in range(records):
        for element, length in fields:
            low, high = (0, 300) if length == VARIABLE else (length, length)
            value = draw(st.binary(min_size=low, max_size=high))
            if element in sums:
                sums[element] += int.from_bytes(value)
            if length == VARIABLE:
                data += bytes([len(value)]) if len(value) < 255 else struct.pack("!BH", 255, len(value))
            data += value
    return version, fields, data, (records, sums[OCTETS] % 2**64, sums[PACKETS] % 2**64)


def accounted(found: Taken, datagrams: int) -> None:
    """Nothing is counted twice, or not at all."""
    assert found["datagrams"] == datagrams
    assert found["malformed"] <= datagrams
    assert found["flows"] == len(found.rows)
    assert found["octets"] == sum(row.get("octetDeltaCount") or 0 for row in found.rows) % 2**64
    table = found.exporters
    assert len({(one["address"].tobytes(), int(one["domain"]), int(one["version"])) for one in table}) == len(table)


@settings(max_examples=150, deadline=None)
@given(data_sets(), st.data())
def test_any_fields_of_any_length_are_decoded_and_whatever_is_cut_off_or_changed_raises_nothing(
    of: Sets, data: st.DataObject
) -> None:
    version, fields, records, expected = of
    learnt, told = templates(version, template(256, fields)), a_set(256, records)
    first, second = sent(version, 1, learnt), sent(version, 2, told)
    for found in (taken(first, second), taken(sent(version, 1, learnt, told)), taken(first).take(second)):
        assert found.counts == (*expected, 0)
        accounted(found, int(found["datagrams"]))
    cut = data.draw(st.integers(0, len(second) - 1))
    found = taken(first, second[:cut])
    assert found["malformed"] == (0 if version == NETFLOW9 and cut == 20 else 1)
    accounted(found, 2)
    changed = bytearray(data.draw(st.sampled_from([first, second])))
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(2, len(changed) - 1))] = data.draw(st.integers(0, 255))
    accounted(taken(first, bytes(changed), second), 3)


_WORDS = st.sampled_from([
    template(256, [(OCTETS, 4), (8, 4)]), template(256, [(82, VARIABLE), (PACKETS, 3)]), template(2, []),
    options(IPFIX, 300, [(149, 4)], [(41, 8)]), record5(1, 2), a_set(256, bytes(8)), a_set(256, b"\3abc\0\0\1"),
    templates(IPFIX, template(256, [(27, 16)])), b"\1\0",
    options_templates(NETFLOW9, options(NETFLOW9, 256, [(1, 4)], [(2, 4)])),
    b"\0\0", b"\xff\xff", b"\0\2", b"\0\4",
])  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 5, 9, 10]), st.lists(_WORDS | st.binary(max_size=40), max_size=6)), min_size=1
    )
)
def test_noise_raises_nothing(noise: list[tuple[int, list[bytes]]]) -> None:
    datagrams: list[bytes] = []
    for version, words in noise:
        body = b"".join(words)
        if version in (NETFLOW9, IPFIX):
            datagrams.append(sent(version, len(datagrams), body))
        else:
            datagrams.append(sent5(len(datagrams), body) if version else body)
    found = taken(*datagrams)
    accounted(found, len(datagrams))
    second = Taken()
    second.decoder.restore(found.decoder.snapshot())
    assert second["flows"] == found["flows"]
    second.take(*datagrams)
    assert second["datagrams"] == 2 * len(datagrams)
    assert second["flows"] == found["flows"] + len(second.rows)
