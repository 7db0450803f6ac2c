"""The statsd example under `fastrecv run`, told by the statsd client of PyPI: nothing that was counted is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aggregates
import pytest
from statsd.client.udp import StatsClient

from tests.kernel.supervising import ADDRESS, PORT, Service, namespace, until

EXAMPLE = Path(aggregates.__file__).parent


def rows(path: Path) -> list[dict[str, Any]]:
    """What holds of all that was written: of a metric in a write the last."""
    found = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return list({(row["series"], row["number"], row["kind"], row["name"]): row for row in found}.values())


def total(path: Path, name: str, column: str = "value") -> float:
    return sum(float(row[column]) for row in rows(path) if row["name"] == name)


def restarted(service: Service) -> None:
    service.send(signal.SIGHUP)
    service.says("all workers are new")


def killed(service: Service) -> None:
    for pid in service.pids(2):
        os.kill(pid, signal.SIGKILL)
    service.begun(4)


def drawn(seed: int) -> int:
    """How many of two samples the client sends at a rate of a half."""
    draw = random.Random(seed)
    return sum(draw.random() <= 0.5 for _ in range(2))


def tell(clients: list[StatsClient], half: int) -> int:
    """Something of every kind; how many datagrams that makes."""
    for number, client in enumerate(clients):
        for _ in range(10):
            client.incr("hits")
        client.decr("hits", 2)
        client.timing("took", 20 * number)
        client.gauge(f"level{number}", -5)
        client.gauge(f"level{number}", half + 1, delta=True)
        client.set(f"users{number}", f"user{half}")
        client.set(f"users{number}", "always")
    random.seed(half)  # of the client's own draws
    for _ in range(2):
        clients[0].incr("sampled", rate=0.5)
    return 16 * len(clients) + drawn(half)


@pytest.mark.parametrize(("change", "every"), [(restarted, "0.1"), (killed, "0.1"), (killed, "3600")])
def test_every_sample_of_a_client_is_counted_once(
    change: Callable[[Service], None], every: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    told = {"PYTHONPATH": str(EXAMPLE), "STATSD_SINK": f"jsonl:{path}", "STATSD_EVERY": every}
    policy = ("-w", 2, "--policy", "source+port")
    with (
        namespace(),
        Service(tmp_path, "aggregates:Aggregates", *policy, environment=told) as service,
        contextlib.ExitStack() as stack,
    ):
        service.begun(2)
        clients = [stack.enter_context(contextlib.closing(StatsClient(ADDRESS, PORT, prefix="app"))) for _ in range(8)]
        told_first = tell(clients, 0)
        until(lambda: sum(service.rows()["handled"]) == told_first, lambda: service.log)  # nothing is in their hands
        change(service)
        tell(clients, 1)
        assert service.stop() == 0
    assert total(path, "app.hits") == 2 * 8 * 8
    assert total(path, "app.sampled") == (drawn(0) + drawn(1)) / 0.5
    assert total(path, "app.took", "count") == 2 * 8
    assert total(path, "app.took", "sum") == 2 * sum(range(0, 160, 20))
    for number in range(8):
        assert [row["value"] for row in rows(path) if row["name"] == f"app.level{number}"][-1] == -3
        if every == "3600":  # one write, of both halves
            assert total(path, f"app.users{number}") == 3
    assert total(path, aggregates.REFUSED) == 0
