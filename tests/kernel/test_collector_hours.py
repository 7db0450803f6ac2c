"""Four hours of exports, time compressed: memory stays flat, and files are whole, complete, and readable by others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import duckdb
import pyarrow.parquet as pq
import pytest

from fastrecv.bench.collect import drained, send
from fastrecv.bench.collect_contenders import CONTENDERS
from fastrecv.bench.collect_traffic import EXPORTERS, STREAMS, exported
from fastrecv.netns import Namespace
from tests.kernel.supervising import Service, namespace, until

ALL, EVERY = 4 * 3600, 10  # seconds, and how many of them are sent at once
FLOWS_A_SECOND = 10_000


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


def resident(pid: int) -> int:
    """MiB of memory."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) >> 10


def handled(service: Service, sent: int) -> None:
    """Wait until so many datagrams are."""
    until(lambda: int(service.rows()["handled"][0]) == sent, lambda: f"{sent} sent\n{service.log}")


@pytest.mark.proof
def test_four_hours_of_ten_thousand_flows_a_second(ns: Namespace, tmp_path: Path) -> None:
    files, sent, flows, octets, seen = tmp_path / "files", 0, 0, 0, []
    options = ("-w", 1, "--receive-buffer", 256 << 20, "--flush", 0.05, "--window", 3600)
    with Service(tmp_path, None, *options, "--sink", f"parquet:{files}?rotate=2s") as service:
        service.begun(1)
        (pid,) = service.pids(1)
        begun = dict.fromkeys(STREAMS, 0)
        for step in range(ALL // EVERY):
            name = list(STREAMS)[step % len(STREAMS)]
            export = exported(name, EVERY * FLOWS_A_SECOND // STREAMS[name].flows, first=begun[name])
            begun[name] += len(export.datagrams[0])
            if step < len(STREAMS) and export.templates:
                send([[one] for one in export.templates])
                sent += EXPORTERS
            send(export.datagrams)
            sent += sum(map(len, export.datagrams))
            flows, octets = flows + export.flows, octets + export.octets
            handled(service, sent)
            seen.append(resident(pid))
        assert service.stop() == 0
    early, late = median(seen[: len(seen) // 2]), median(seen[len(seen) // 2 :])  # it goes up and down with each file
    print(f"{flows:,} flows; MiB: {early:g} in the first half, {late:g} in the second, at most {max(seen)}")
    assert late <= 1.2 * early
    paths = sorted(files.iterdir())
    assert all(path.suffix == ".parquet" for path in paths)
    assert sum(pq.read_metadata(path).num_rows for path in paths) == flows
    with contextlib.closing(duckdb.connect()) as connection:
        query = "SELECT count(*), sum(octetDeltaCount) FROM read_parquet(?, union_by_name=true)"
        assert connection.execute(query, [f"{files}/*.parquet"]).fetchall() == [(flows, octets)]


def test_the_bench_finds_every_flow_that_it_has_sent(ns: Namespace) -> None:
    for name in ("sums", "netflow"):
        taken, said = drained(
            CONTENDERS[name], max(os.sched_getaffinity(0)), exported("v9", 80), exported("v9", 400, 10)
        )
        assert said == ""
        assert taken > 0
