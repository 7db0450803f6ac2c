"""Workers under a flood: whoever dies, leaves or comes, no queue is lost and every datagram is handled once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fastrecv.bench.numbered import NumberedSource
from fastrecv.bench.survive_account import strays
from fastrecv.netns import Namespace
from tests.kernel.supervising import ADDRESS, BATCH, PORT, finished, namespace, recording, until

SENDERS, MANY = 1000, 4000
KILLS = 4


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


def test_workers_that_are_killed_lose_at_most_the_batch_in_their_hands(ns: Namespace, tmp_path: Path) -> None:
    with recording(tmp_path, 2) as service, NumberedSource(ns, SENDERS, ADDRESS, PORT) as source:
        for kill in range(KILLS):
            time.sleep(0.3)
            os.kill(service.pids(2)[kill % 2], signal.SIGKILL)
            service.begun(3 + kill)
        time.sleep(0.3)
        found = finished(service, source, ns)
    assert found.dropped == found.destroyed == found.failed == found.repeated == 0
    assert found.sent == found.taken > 10_000
    assert 0 <= found.taken - found.handled <= KILLS * BATCH
    assert found.killed <= found.taken - found.handled
    assert found.handled <= found.recorded <= found.taken


def test_told_to_stop_under_a_flood_what_was_queued_is_handled_and_the_rest_is_counted(
    ns: Namespace, tmp_path: Path
) -> None:
    with recording(tmp_path, 2) as service, NumberedSource(ns, SENDERS, ADDRESS, PORT) as source:
        time.sleep(0.3)
        found = finished(service, source, ns, first=True)
    assert found.destroyed == found.failed == found.killed == found.repeated == 0
    assert found.taken == found.handled == found.recorded > 10_000
    assert found.dropped == found.sent - found.taken > 0


def test_a_rolling_restart_loses_nothing(ns: Namespace, tmp_path: Path) -> None:
    with recording(tmp_path, 2) as service, NumberedSource(ns, SENDERS, ADDRESS, PORT) as source:
        before = set(service.pids(2))
        for turn in range(2):
            service.send(signal.SIGHUP)
            service.says("all workers are new", turn + 1)
        assert not before & set(service.pids(2))
        time.sleep(0.2)
        found = finished(service, source, ns)
    assert found.dropped == found.destroyed == found.failed == found.killed == found.repeated == 0
    assert found.sent == found.taken == found.handled == found.recorded > 10_000
    assert len(list(tmp_path.glob("*.rows"))) == 6


def test_a_worker_more_and_one_less_move_the_fewest_senders_and_lose_nothing(ns: Namespace, tmp_path: Path) -> None:
    with recording(tmp_path, 3) as service, NumberedSource(ns, MANY, ADDRESS, PORT) as source:
        _twice_round(source)
        with source.change():
            service.send(signal.SIGTTIN)
            service.says("workers 0, 1, 2, 3 share the senders")
        _twice_round(source)
        with source.change():
            service.send(signal.SIGTTOU)
            service.says("worker 3 has left")
        _twice_round(source)
        found = finished(service, source, ns)
    assert found.dropped == found.destroyed == found.failed == found.killed == found.repeated == 0
    assert found.sent == found.taken == found.handled == found.recorded > 5 * MANY
    taken, by = service.recorded()
    owners = [_owners(taken, by, phase) for phase in (0, 2, 4)]
    assert strays(taken, by, owners) == []
    for before, after in pairwise(owners):
        assert np.count_nonzero(before != after) <= 1.15 * MANY / 4  # a quarter of the buckets moves


def _twice_round(source: NumberedSource) -> None:
    """Until every sender has sent in this phase."""
    end = source.sent + 2 * MANY
    until(lambda: source.sent > end, lambda: f"only {source.sent} sent")


def _owners(rows: NDArray[np.void], slots: NDArray[np.int64], phase: int) -> NDArray[np.int64]:
    """Which slot had the first datagram of each sender in a phase."""
    chosen = np.flatnonzero(rows["phase"] == phase)
    chosen = chosen[np.lexsort((rows["number"][chosen], rows["sender"][chosen]))]
    senders, first = np.unique(rows["sender"][chosen], return_index=True)
    assert len(senders) == MANY
    return slots[chosen[first]]
