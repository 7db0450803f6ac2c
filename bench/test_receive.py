"""The contenders of the receive bench in pytest-benchmark's tables: a socket filled before every round, emptied in it.

Run with `make compare` (root). One test runs after the other here, so that the machine's drift lies between them: take
ratios from `python -m fastrecv.bench receive`, which runs all contenders in every round.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastrecv.bench.lab import Lab, quick_grace_periods
from fastrecv.bench.receive_groups import GROUPS, Group
from fastrecv.bench.receivers import Contender, missing
from fastrecv.bench.stage import pinned

DATAGRAMS = 5000
ROUNDS = 5


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with quick_grace_periods(), Lab() as opened, pinned(max(os.sched_getaffinity(0))):
        yield opened


@pytest.mark.parametrize(
    ("group", "contender"),
    [
        pytest.param(group, contender, id=f"{group.name}-{contender.name}",
                     marks=pytest.mark.benchmark(group=f"{group.name}, {DATAGRAMS:,} datagrams"))
        for group in GROUPS.values()
        for contender in group.contenders
    ],
)  # fmt: skip
def test_drain(benchmark: BenchmarkFixture, lab: Lab, group: Group, contender: Contender) -> None:
    if library := missing(contender):
        pytest.skip(f"{library} is not installed")
    with (
        group.traffic(lab) as traffic,
        closing(traffic.open(DATAGRAMS)) as sock,
        contender.open(sock) as ready,
    ):

        def fill() -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (ready(traffic.fill(sock, DATAGRAMS)),), {}

        def drain(timed: Callable[[], int]) -> int:
            return timed()

        assert benchmark.pedantic(drain, setup=fill, rounds=ROUNDS, warmup_rounds=1) == DATAGRAMS
