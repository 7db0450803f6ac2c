"""What the collector's columns are made of: memory that is used again, and numbers of which each is kept once."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrecv._flow import distinct
from fastrecv.collector.decoder import Decoder
from tests.unit.flow_datagrams import batch, record5, sent5

_FLOWS = 30 * 400


def gathered(decoder: Decoder, octets: int) -> pa.RecordBatch:
    """A record batch whose flows have so many octets each; its columns are large enough to be used again."""
    datagram = sent5(0, *[record5(1, octets)] * 30)
    for _ in range(_FLOWS // 30 // 100):
        assert not list(decoder.take(batch(*[datagram] * 100)))
    (raw,) = decoder.flush()
    return raw


def octets(raw: pa.RecordBatch) -> pa.Array:
    return raw.column("octetDeltaCount")


def test_what_somebody_holds_is_not_written_over() -> None:
    decoder = Decoder()
    held = [gathered(decoder, number) for number in range(4)]
    part = octets(held.pop()).slice(17, 1)  # keeps all of its column, and nothing of the others
    later = [gathered(decoder, number) for number in range(4, 8)]
    for number, raw in [*enumerate(held), *enumerate(later, 4)]:
        assert len(raw) == _FLOWS
        assert np.unique(octets(raw).to_numpy()).tolist() == [number]
    assert part.to_pylist() == [3]


AGAIN = """
import resource
from fastrecv.collector.decoder import Decoder
from tests.unit.flow_datagrams import batch, record5, sent5

decoder, datagrams = Decoder(), batch(*[sent5(0, *[record5(1, 2)] * 30)] * 400)
for number in range(13):
    if number == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert not list(decoder.take(datagrams))
    list(decoder.flush())
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="its malloc is another, which touches pages of its own")
def test_what_nobody_holds_is_used_again() -> None:
    """Ten times 12,000 rows are some 2,500 pages, which would be new: malloc gives back at once here what is freed."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    words = [sys.executable, "-P", "-c", AGAIN]
    said = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert int(said.stdout) < 250, said


@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 3)))
def test_distinct_numbers_make_up_all(numbers: list[int]) -> None:
    given_numbers = np.array(numbers, "u4")
    places, found = distinct(given_numbers)
    assert found.tolist() == list(dict.fromkeys(numbers))
    assert found[np.frombuffer(memoryview(places), "i4")].tolist() == numbers


@pytest.mark.parametrize("count", [2**11 - 1, 2**11, 2**11 + 1, 100_000])  # of which half a table is full
def test_any_number_of_them_may_differ(count: int) -> None:
    numbers = np.random.default_rng(1).permutation(np.arange(count, dtype="u4") * 65537).repeat(2)
    places, found = distinct(numbers)
    assert len(found) == count
    assert np.array_equal(found[np.frombuffer(memoryview(places), "i4")], numbers)
