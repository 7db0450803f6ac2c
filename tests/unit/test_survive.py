"""The account of the survive bench over rows made up here: what is wrong with them, it says."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from fastrecv.bench import survive, survive_account, survive_cli
from fastrecv.bench.numbered import NUMBERED
from fastrecv.bench.survive import Run
from fastrecv.bench.survive_churn import PER_MINUTE, schedule
from fastrecv.bench.survive_supervised import BATCH

SENDERS, ROUNDS = 2000, 5
QUARTER = 4
"""Of the senders, which change their slot in phase 1, from slot 0 and 1 to slot 2."""


@dataclass
class Story:
    """Three phases: five rounds at two workers, one round while a third comes, and five at three."""

    rows: NDArray[np.void] = field(init=False)
    slots: NDArray[np.int64] = field(init=False)
    sent: int = SENDERS * (2 * ROUNDS + 1)
    taken: int = sent
    in_errors: int = 0
    handled: int | None = None
    killed: int = 0
    deaths: int = 0

    def __post_init__(self) -> None:
        number, sender = np.divmod(np.arange(self.sent), SENDERS)
        self.rows = np.zeros(self.sent, NUMBERED)
        self.rows["sender"], self.rows["number"] = sender, number
        self.rows["phase"] = np.select([number < ROUNDS, number == ROUNDS], [0, 1], 2)
        new = (number > ROUNDS) | ((number == ROUNDS) & (sender > SENDERS // 2))
        self.slots = np.where(new & (sender % QUARTER == 0), 2, sender % 2).astype(np.int64)

    def keep(self, chosen: NDArray[np.bool_]) -> None:
        self.rows, self.slots = self.rows[chosen], self.slots[chosen]

    def told(self) -> list[str]:
        counters = {
            "InDatagrams": self.taken,
            "InErrors": self.in_errors,
            "RcvbufErrors": 0,
            "MemErrors": 0,
            "NoPorts": 0,
        }
        handled = len(self.rows) if self.handled is None else self.handled
        phases = survive_account.owners(self.rows, self.slots, SENDERS, 3)
        run = Run(
            "a story", 1.0, 0.0, {}, self.deaths,
            survive_account.account(self.sent, counters, self.rows, handled, 0, self.killed),
            len(survive_account.astray(self.rows, self.slots, phases)), sum(int((phase < 0).sum()) for phase in phases),
            survive_account.steps([("resize", 3, 4)], phases), [],
        )  # fmt: skip
        return survive.faults(run)


def test_a_run_in_which_all_is_well_has_no_fault() -> None:
    assert Story().told() == []


def test_a_batch_of_a_killed_worker_is_no_fault_and_a_datagram_more_is_one() -> None:
    story = Story(deaths=2, killed=100)
    story.keep(np.arange(story.sent) >= 2 * BATCH)
    assert story.told() == []
    story.keep(np.arange(len(story.rows)) >= 1)
    assert story.told() == ["513 datagrams in the hands of 2 dead workers, whose batches are 256"]


def test_what_a_killed_worker_recorded_and_had_not_counted_is_no_fault() -> None:
    story = Story(deaths=1, killed=10)
    story.handled = story.sent - 10
    assert story.told() == []


def test_a_destroyed_queue_is_told() -> None:
    story = Story()
    story.taken -= 7
    story.keep(np.arange(story.sent) >= 7)
    assert story.told() == ["7 datagrams were lost with a queue"]


def test_a_drop_is_told_even_if_the_kernel_has_counted_it() -> None:
    story = Story(in_errors=7)
    story.taken -= 7
    story.keep(np.arange(story.sent) >= 7)
    assert story.told() == ["7 datagrams were dropped, though every queue had room"]


def test_rows_that_are_there_twice_are_told() -> None:
    story = Story()
    story.rows[100:130] = story.rows[200:230]
    story.slots[100:130] = story.slots[200:230]
    assert story.told() == ["30 datagrams were recorded twice"]


def test_slots_that_are_swapped_for_a_while_are_told() -> None:
    story = Story()
    chosen = (story.rows["number"] == 2) & (story.slots < 2)
    story.slots[chosen] ^= 1
    assert story.told() == [f"{SENDERS:,} datagrams came to a worker that did not have their sender"]


def test_slots_that_are_swapped_in_a_change_are_told() -> None:
    """Who owned a sender neither before nor after must not get it while a change is in flight either."""
    story = Story()
    chosen = (story.rows["phase"] == 1) & (story.rows["sender"] % QUARTER == 1)
    story.slots[chosen] = 2
    assert story.told() == [f"{SENDERS // QUARTER:,} datagrams came to a worker that did not have their sender"]


def test_slots_that_stay_swapped_after_a_change_are_told_as_senders_that_moved() -> None:
    story = Story()
    chosen = (story.rows["phase"] == 2) & (story.slots < 2)
    story.slots[chosen] ^= 1
    assert story.told() == ["3 to 4 workers moved 2,000 senders, 500 ideally"]


def test_a_datagram_that_the_kernel_kept_for_later_may_meet_the_change_that_follows() -> None:
    story = Story()
    chosen = np.flatnonzero((story.rows["phase"] == 0) & (story.rows["sender"] % QUARTER == 0))
    story.slots[chosen[-survive_account.LATE // QUARTER :]] = 2
    assert story.told() == []
    story.slots[chosen[-survive_account.LATE // QUARTER - 1]] = 2
    assert story.told() == ["1 datagrams came to a worker that did not have their sender"]


def test_a_sender_without_a_datagram_in_a_phase_is_nobodys() -> None:
    story = Story()
    story.keep((story.rows["sender"] != 5) | (story.rows["phase"] != 2))
    phases = survive_account.owners(story.rows, story.slots, SENDERS, 3)
    assert (phases[0][5], phases[1][5]) == (1, -1)
    assert survive_account.moved(*phases) == SENDERS // QUARTER
    told = Story()
    told.keep((told.rows["sender"] != 5) | (told.rows["phase"] != 2))
    told.deaths = 1
    assert told.told() == ["1 times nobody was seen to have a sender between two changes"]


def test_a_schedule_is_the_seeds_and_has_each_action_as_often_as_it_says() -> None:
    due = schedule(list(PER_MINUTE), 60, 3)
    assert due == sorted(schedule(list(PER_MINUTE), 60, 3))
    assert due != schedule(list(PER_MINUTE), 60, 4)
    assert {action: [name for _, name in due].count(action) for action in PER_MINUTE} == PER_MINUTE
    assert all(0 < at < 60 for at, _ in due)
    assert len(schedule(["hang", "kill"], 2, 3)) == 3


def test_what_is_missing_is_excused_by_a_death_between_the_two_who_have_what_was_around_it() -> None:
    """Workers 0, 1 and 3 have slot 0, worker 2 has slot 1; two senders."""
    rows = np.zeros(20, NUMBERED)
    rows["sender"], rows["number"] = np.divmod(np.arange(20), 10)
    slots = np.array([0, 0, 1, 0])
    by = np.where(rows["sender"] == 1, 2, np.where(rows["number"] < 5, 0, 3))

    def told(missing: list[int], *died: int, by: NDArray[np.int64] = by) -> survive_account.Readers:
        kept = ~np.isin(np.arange(20), missing)
        return survive_account.readers(rows[kept], by[kept], slots, np.isin(np.arange(4), died))

    assert told([]) == (0, 0)
    assert told([4, 5]) == told([4, 5], 2) == told([4, 5], 3) == (2, 0)
    assert told([4, 5], 0) == told([4, 5], 1) == (0, 0)  # by worker 1 nothing else is known
    assert told([2], 0) == told([15], 2) == (1, 0)
    mixed = by.copy()
    mixed[6] = 0
    assert told([], 0, by=mixed) == (0, 1)


def test_what_workers_lose_that_live_and_two_who_read_are_faults() -> None:
    run = Run("a story", 1.0, 0.0, {}, 0, survive_account.Account(*[0] * 10), 0, 0, [], [])
    assert survive.faults(run._replace(readers=survive_account.Readers(2, 3))) == [
        "2 datagrams were lost by workers that have not died",
        "3 times a worker read on after its successor had begun",
    ]


@pytest.mark.parametrize("names", ["kill,sleep", "kill,kill", ""])
def test_wrong_actions_are_refused_in_a_line(names: str) -> None:
    result = CliRunner().invoke(survive_cli.command, ["--actions", names])
    assert result.exit_code == 2
    assert "choose from kill, restart, resize, hang, hand-over, each once" in result.stderr
