"""Microseconds per call of the door to libbpf: how a rule set gets into the kernel, and how it does not.

Run with `make microbench` (root). The comparison within a group is what counts; absolute times are this machine's.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastrecv.bench.prefixes import draw
from fastrecv.bpf import Map, packaged

ENTRIES = 10_000


@pytest.fixture
def trie() -> Iterator[Map]:
    with packaged("letter") as letter:
        letter.maps["prefixes4"].max_entries = ENTRIES
        letter.load()
        yield letter.maps["prefixes4"]


@pytest.fixture
def keys(trie: Map) -> np.ndarray[Any, Any]:
    rows = np.zeros(ENTRIES, trie.key_dtype)
    rows["length"], rows["address"] = draw(socket.AF_INET, "192.0.2.1", ENTRIES, 1)
    return rows


@pytest.mark.benchmark(group=f"{ENTRIES:,} prefixes into a trie")
def test_in_one_call(benchmark: BenchmarkFixture, trie: Map, keys: np.ndarray[Any, Any]) -> None:
    values = np.zeros(ENTRIES, np.uint32)
    benchmark(trie.update, keys, values)
    assert len(trie) == ENTRIES


@pytest.mark.benchmark(group=f"{ENTRIES:,} prefixes into a trie")
def test_one_call_each(benchmark: BenchmarkFixture, trie: Map, keys: np.ndarray[Any, Any]) -> None:
    def update() -> None:
        for i in range(ENTRIES):
            trie.update(keys[i : i + 1], [0])

    benchmark.pedantic(update, rounds=5)
    assert len(trie) == ENTRIES


@pytest.mark.benchmark(group=f"{ENTRIES:,} prefixes out of a trie")
def test_items(benchmark: BenchmarkFixture, trie: Map, keys: np.ndarray[Any, Any]) -> None:
    trie.update(keys, np.zeros(ENTRIES, np.uint32))
    found, _ = benchmark(trie.items)
    assert len(found) == ENTRIES


@pytest.mark.benchmark(group="a variable of a program")
def test_get_a_variable(benchmark: BenchmarkFixture) -> None:
    with packaged("flood") as flood:
        flood.load()
        assert benchmark(flood.get, "frames") == 0


@pytest.mark.benchmark(group="a test run")
def test_a_test_run(benchmark: BenchmarkFixture) -> None:
    with packaged("swallow") as swallow:
        program = swallow.load().programs["swallow"]
        frame = bytes(64)
        assert benchmark(program.run, frame).verdict == 1
