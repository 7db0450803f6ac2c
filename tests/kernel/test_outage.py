"""The engine of a service is taken away and nothing is lost; and the bench that says so would say otherwise, too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fastrecv.bench import outage
from fastrecv.bench.numbered import NUMBERED
from fastrecv.bench.outage import Account, Plan, Run, faults
from fastrecv.bench.outage_cli import command, described
from fastrecv.bench.outage_engine import Consumed
from tests.programs import program

SOUND = Run(Plan(1, 100, 100, 1), 5, 100, Account(9, 9, 0, 0, 9, 0, 0, 0, 0), 1, 1, 0.5, 9, 0, 0, 0, 1)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "_STEADY", 0.3)
    monkeypatch.setenv("PATH", str(Path(program("nats-server", "nats-server")).parent), prepend=":")


def test_an_engine_that_is_away_for_a_second_costs_nothing() -> None:
    result = CliRunner().invoke(command, ["--away", "1", "--rate", "10000", "--senders", "100", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    account = found["account"]
    assert found["faults"] == []
    assert account["sent"] == account["taken"] == account["consumed"] > 10_000
    assert not any(account[name] for name in ("full", "refused", "missing", "twice", "disordered", "astray"))
    assert found["full_messages"] > 100
    assert found["reconnects"] >= 1
    assert found["drained"] is not None


def test_what_a_consumer_found_is_held_against_what_was_sent() -> None:
    rows = np.zeros(6, NUMBERED)
    rows["sender"] = [1, 2, 1, 1, 1, 2]
    rows["number"] = [0, 0, 2, 1, 2, 1]
    counters = {"InDatagrams": 7, "RcvbufErrors": 1, "MemErrors": 0, "InErrors": 3, "NoPorts": 4}
    shards = np.array([5, 6, 5, 5, 5, 7])
    account = outage._account(9, counters, Consumed(rows, shards, 3, 1))
    assert account == Account(
        sent=9, taken=7, full=1, refused=6, consumed=6, missing=4, twice=1, disordered=1, astray=1
    )


@pytest.mark.parametrize(("found", "said"), [
    (SOUND, []),
    (SOUND._replace(account=SOUND.account._replace(full=2)), ["2 datagrams were dropped by the kernel"]),
    (SOUND._replace(account=SOUND.account._replace(missing=2)), ["2 datagrams are missing"]),
    (SOUND._replace(account=SOUND.account._replace(taken=8)), ["9 datagrams were sent and 8 received"]),
    (SOUND._replace(dropped=3), ["3 messages were given up"]),
    (SOUND._replace(drained=None), ["the spool was not drained"]),
    (SOUND._replace(reconnects=0), ["nothing has waited for the engine: it was not away"]),
])  # fmt: skip
def test_what_is_not_as_it_must_be_is_said(found: Run, said: list[str]) -> None:
    assert faults(found) == said
    assert [line for line in described(found).splitlines() if "FAULT" in line] == [f"  FAULT: {one}" for one in said]
