"""Drains and weights that would drop senders unseen are refused, go on, or are taken back; one watcher at a time."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastrecv import balance_life
from fastrecv.balance import Balancer
from fastrecv.errors import StateError
from fastrecv.policies import Policy
from tests.kernel.balancing import group, senders, taker, takers
from tests.kernel.commands import COMMAND, Command
from tests.kernel.steering import UDP, Stage


@pytest.fixture
def members(stage: Stage) -> list[socket.socket]:
    return group(stage, UDP, "ipv4", 3)


@pytest.fixture
def tracked(balance: Command, members: list[socket.socket]) -> Command:
    """Three slots, of which senders may be known and prefixes placed."""
    balance.done("create", "flows", "--size", 3, "--senders", 100, "--map", "source")
    for slot, member in enumerate(members):
        balance.done("register", "flows", slot, "--fd", member.fileno())
    balance.done("attach", "flows", "--fd", members[0].fileno())
    return balance


def weights(command: Command) -> list[int]:
    return [row["weight"] for row in command("status", "flows", "--json").json["slots"]]


def test_placed_prefixes_keep_their_slot_from_being_drained(tracked: Command) -> None:
    tracked.done("place", "flows", "198.51.100.0/25", 1)
    for words in (("drain", "flows", 1, "--wait", 1), ("resize", "flows", 1)):
        assert tracked.refused(*words) == (
            "prefixes are placed there: 198.51.100.0/25 (slot 1): `place` them elsewhere, or `unplace` them"
        )
    assert weights(tracked) == [1, 1, 1]
    tracked.done("unplace", "flows", "198.51.100.0/25")
    tracked.done("drain", "flows", 1, "--wait", 1)


def test_a_slot_without_a_socket_is_given_no_more_senders(tracked: Command, members: list[socket.socket]) -> None:
    members[1].close()
    for words in (("drain", "flows", 0), ("weight", "flows", 1, 2), ("weight", "flows", 99, 1), ("resize", "flows", 2)):
        assert "no socket, so the senders that it would be given would be dropped" in tracked.refused(*words)
    assert weights(tracked) == [1, 1, 1]
    tracked.done("drain", "flows", 1)
    tracked.done("drain", "flows", 0)
    assert weights(tracked) == [0, 1]


def test_a_drain_goes_on_where_it_was_left(tracked: Command, stage: Stage, members: list[socket.socket]) -> None:
    tracked.done("drain", "flows", 2)
    said = tracked.done("drain", "flows", 2, "--wait", 1).splitlines()
    assert said == [
        "slot 2 has no buckets any more, and goes on to drain",
        "slot 2 is empty, and nothing is queued: its process can end",
    ]
    hint = tracked.done("register", "flows", 2, "--fd", members[2].fileno())
    assert hint.endswith("slot 2 has no senders yet: `fastrecv balance weight flows 2 1`, or resize\n")
    tracked.done("weight", "flows", 2, 1)
    assert set(takers(stage, senders("ipv4", 100))) == {0, 1, 2}
    assert tracked.done("create", "flows", "--size", 3, "--map", "source").startswith("flows: ")


def test_a_drain_by_sender_that_is_interrupted_while_it_learns_was_nothing(tracked: Command) -> None:
    with tracked.process("drain", "flows", 1, "--by-sender", "--learn", 60) as process:
        wait_for(tracked, leaving=True)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.strip() == "interrupted: `drain` goes on, `weight flows 1 1` takes it back"
    assert tracked("status", "flows", "--json").json["leaving"] == {}
    assert weights(tracked) == [1, 1, 1]


def wait_for(command: Command, leaving: bool) -> None:
    deadline = time.monotonic() + 20
    while bool(command("status", "flows", "--json").json["leaving"]) != leaving:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_senders_of_a_socket_that_dies_while_it_is_drained_go_by_the_table(
    tracked: Command, stage: Stage, members: list[socket.socket]
) -> None:
    asked = senders("ipv4", 60)
    with tracked.process("drain", "flows", 1, "--by-sender", "--learn", 1, "--quiet", 60) as process:
        wait_for(tracked, leaving=True)
        assert takers(stage, asked).count(1) > 5
        assert process.stdout is not None
        assert process.stdout.readline().endswith(" senders came within 1 s, and stay\n")
        assert process.stdout.readline().startswith("slot 1 drains")
        assert takers(stage, asked).count(1) > 5, "known senders stay"
        stage.servers.pop("1").close()
        assert set(takers(stage, asked)) == {0, 2}, "nobody is refused"
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (
        1, "fastrecv: the socket of slot 1 was closed: its senders go where their buckets are\n"
    )  # fmt: skip


@pytest.mark.parametrize("words", [("unregister", "flows", 1), ("drain", "flows", 1), ("weight", "flows", 1, 1)])
def test_known_senders_are_forgotten_by_what_comes_after_a_killed_drain(
    tracked: Command, words: tuple[str, str, int], stage: Stage
) -> None:
    with tracked.process("drain", "flows", 1, "--by-sender", "--learn", 0.2, "--quiet", 60) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        process.kill()
        process.communicate()
    assert tracked("status", "flows", "--json").json["leaving"] != {}
    tracked.done(*words)
    assert tracked("status", "flows", "--json").json["leaving"] == {}
    assert None not in takers(stage, senders("ipv4", 30))


def test_a_slot_that_drains_takes_nobody_in_the_place_of_an_empty_one(stage: Stage) -> None:
    members = group(stage, UDP, "ipv4", 3)
    with Balancer(Policy("source+port"), size=3, empty="next") as balancer:
        for slot, member in enumerate(members):
            balancer.register(slot, member)
        balancer.attach(members[0])
        balancer.unregister(0)
        balancer.drain(1)
        assert set(takers(stage, senders("ipv4", 60))) == {2}


def test_choices_are_told_to_one_at_a_time_and_to_nobody_when_he_was_killed(
    tracked: Command, bpffs: Path, stage: Stage
) -> None:
    watch = [*COMMAND, "watch", "--json", "--balancer", "flows", "--bpffs", str(bpffs)]

    def sampling() -> int:
        found = tracked("status", "flows", "--json").json["sampling"]
        assert isinstance(found, int)
        return found

    with subprocess.Popen([*watch, "--sample", "7"], stdout=subprocess.PIPE) as first:
        deadline = time.monotonic() + 20
        while sampling() != 7:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = subprocess.run(watch, capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert f"watched is locked by process {first.pid} ({Path(sys.executable).name[:6]}" in second.stderr
        assert sampling() == 7
        first.kill()
        first.communicate()
    assert sampling() == 7, "nobody has looked since"
    tracked.done("weight", "flows", 0, 1)
    assert sampling() == 0


def test_a_watcher_that_reads_too_slowly_is_told_how_much_it_has_missed(stage: Stage, bpffs: Path) -> None:
    members = group(stage, UDP, "ipv4", 1)
    with balance_life.create("flows", Policy("source"), 1, bpffs=bpffs) as balancer:
        balancer.register(0, members[0])
        balancer.attach(members[0])
    with balance_life.choices("flows", 1, bpffs=bpffs) as choices:
        with stage.bind(UDP, "198.51.100.9", 4242) as client:
            for _ in range(6000):  # 88 bytes each, into 256 KiB
                client.sendto(b"?", ("198.51.100.1", 7007))
        told = choices.read()
        assert [event["event"] for event in told[-1:]] == ["lost"]
        assert len(told) - 1 + told[-1]["count"] == 6000
        assert choices.read() == []
        with (
            pytest.raises(StateError, match="watched is locked by process"),
            balance_life.choices("flows", 1, bpffs=bpffs),
        ):
            pass


def test_a_choice_says_who_took_it(stage: Stage, bpffs: Path) -> None:
    members = group(stage, UDP, "ipv4", 2)
    with balance_life.create("flows", Policy("source"), 2, empty="next", bpffs=bpffs) as balancer:
        balancer.register(1, members[1])
        balancer.attach(members[1])
    with balance_life.choices("flows", 1, bpffs=bpffs) as choices:
        asked = senders("ipv4", 30)
        assert {taker(stage, UDP, one) for one in asked} == {1}
        assert {event["taken"] for event in choices.read()} == {1}
