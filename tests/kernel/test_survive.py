"""A supervised service survives all that befalls it; and the bench that says so would say otherwise, too."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastrecv.bench import soak, survive, survive_cli, workers
from fastrecv.bench.survive import Plan
from fastrecv.bench.survive_baselines import Kind
from fastrecv.bench.survive_churn import Due, Pattern
from fastrecv.bench.survive_service import ADDRESS, PORT
from fastrecv.bench.survive_supervised import BATCH
from fastrecv.sockets import grow_receive_buffer, open_datagram
from tests.kernel.supervising import Service, app, namespace

QUIET: list[Due] = [(0.1, "kill"), (0.4, "kill")]


def test_kills_restarts_resizes_and_a_hung_handler_lose_nothing() -> None:
    due: list[Due] = [(0.1, "kill"), (0.2, "resize"), (0.5, "restart"), (0.6, "kill"), (0.7, "hang"), (0.8, "kill")]
    run = survive.supervised(Plan(3, 1000, 1, seed=3), lambda _now, _pattern: None, due=due)
    assert run.faults == []
    assert run.done == {"kill": 3, "resize": 1, "restart": 1, "hang": 1}
    assert run.deaths in {3, 4}  # who hung may have been killed before its time was over
    account = run.account
    assert account.sent == account.taken == account.handled + account.in_hands > 10_000
    assert account.dropped == account.destroyed == account.repeated == run.misdirected == 0
    assert 0 < account.in_hands <= BATCH * run.deaths
    (step,) = run.steps
    assert 0 < step.moved <= 1.2 * step.ideal + 60


def test_a_queue_that_is_destroyed_is_told() -> None:
    """A socket that nobody reads takes what one sender sends, being connected to it, and is closed."""
    stolen = 0

    def steal(now: float, _pattern: Pattern) -> None:
        nonlocal stolen
        if now < 0.1 or stolen:
            return
        with open_datagram((ADDRESS, PORT), reuse_port=True) as thief:
            grow_receive_buffer(thief, 1 << 20)
            thief.connect(("127.1.0.7", 4242))
            time.sleep(0.2)
            stolen = len(thief.recv(99))  # that one is counted

    run = survive.supervised(Plan(2, 100, 1, seed=3), steal, due=QUIET)
    assert stolen
    assert run.account.destroyed > 0
    assert f"{run.account.destroyed:,} datagrams were lost with a queue" in run.faults


@pytest.mark.parametrize("kind", ["recvfrom", "asyncio"])
def test_what_services_usually_are_loses_queues_and_is_accounted_for(kind: Kind) -> None:
    plan = Plan(3, 1000, 0.5, seed=1, actions=("kill", "restart", "resize"))
    run = survive.usual(kind, plan, 20_000, lambda _now, _pattern: None)
    account = run.account
    assert run.done == {"kill": 1, "restart": 1}
    assert account.sent == account.taken + account.dropped + account.destroyed
    assert account.recorded == account.handled <= account.taken
    assert account.repeated == account.full == account.filtered == 0
    assert 0 <= account.in_hands <= 4  # of the killed one, and of those that were told to stop
    assert sorted(step.what for step in run.steps) == ["kill", "restart"]
    if kind == "asyncio":
        assert account.refused > 0  # nobody had the port
        assert not any(step.moved for step in run.steps)
    else:
        assert account.refused == 0
        assert any(step.moved > 100 for step in run.steps)


@pytest.mark.proof
def test_a_minute_of_it() -> None:
    result = CliRunner().invoke(survive_cli.command, ["--json"])
    assert result.exit_code == 0, result.output
    (run,) = json.loads(result.stdout)["runs"]
    assert run["faults"] == []
    assert run["done"]["kill"] >= 50
    assert min(run["done"]["restart"], run["done"]["resize"]) >= 10
    assert run["account"]["sent"] > 1_000_000
    print(f"\n{json.dumps(run)}")


def test_a_soak_leaves_nothing_behind() -> None:
    found = soak.run(Plan(2, 200, 1.5, seed=1, actions=("kill", "resize")), lambda _now, _pattern: None)
    assert found.faults == []
    assert found.run.account.sent == pytest.approx(soak.RATE * found.run.seconds, rel=0.2)
    assert len(found.samples) >= 2
    last = found.samples[-1]
    assert last.objects > 0
    assert last.resident > last.worker_resident > 10 << 20


def test_a_worker_and_a_bare_loop_drain_what_they_are_given() -> None:
    result = workers.measure(workers.Plan(2000, setups=1, rounds=2, seed=1), lambda: None)
    assert {row: len(ns) for row, ns in result.ns.items()} == {"bare": 2, "again": 2, "one": 2, "two": 2}
    assert all(ns > 0 for row in result.ns.values() for ns in row)
    assert [(ratio.row, ratio.reference) for ratio in result.ratios] == list(workers.PAIRS.items())
    assert all(ratio.low <= ratio.estimate <= ratio.high for ratio in result.ratios)


def test_a_rolling_restart_whose_last_worker_leaves_instead_says_that_it_is_over(tmp_path: Path) -> None:
    with namespace(), Service(tmp_path, f"{app(tmp_path)}:handle", "-w", 2) as service:
        service.begun(2)
        service.send(signal.SIGHUP)
        service.send(signal.SIGTTOU)
        service.says("worker 1 has left")
        service.says("all workers are new")
        assert service.stop() == 0


@pytest.mark.proof
def test_deaths_at_once_count_only_where_no_worker_has_lasted_meanwhile(tmp_path: Path) -> None:
    with namespace(), Service(tmp_path, f"{app(tmp_path)}:handle") as service:
        for begun in (1, 2, 3, 5, 6):
            service.begun(begun)
            if begun == 3:
                time.sleep(1.1)
                service.send(signal.SIGHUP)  # a fourth
                service.begun(4)
            os.kill(service.pids(1)[0], signal.SIGKILL)
        service.begun(7)
        assert "is given up" not in service.log
        assert service.stop() == 0
