"""Balancers that several processes share: who makes one, who agrees, who may read it, and how it ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fastrecv import balance_life, metrics, pins
from fastrecv.balance_explain import explain
from fastrecv.cli.main import run
from fastrecv.errors import StateError
from fastrecv.policies import Policy
from tests.kernel.balancing import balanced, homes, senders, takers
from tests.kernel.privileges import CAP_BPF, CAP_CHOWN, CAP_FSETID, only
from tests.kernel.steering import UDP, Stage
from tests.kernel.test_lookup_privileges import GROUP, MEMBER, STRANGER, by

STARTERS = 4


def inside(bpffs: Path, name: str = "flows") -> Path:
    return bpffs / "fastrecv" / f"balance-{name}"


def in_child(action: Callable[[], object]) -> int:
    """A process that does something and ends; its id. What it raises is an exit code of 1."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        action()
        code = 0
    finally:
        os._exit(code)


def test_processes_that_start_at_once_agree_on_the_seed_that_one_has_drawn(bpffs: Path) -> None:
    seeds = []
    for number in range(10):
        heard, told = os.pipe()
        begin, begun = os.pipe()

        def start(name: str = f"round-{number}", begin: int = begin, begun: int = begun, told: int = told) -> None:
            os.close(begun)
            os.read(begin, 1)  # until nobody holds the other end
            with balance_life.create(name, Policy(), 3, bpffs=bpffs) as balancer:
                os.write(told, f"{balancer.policy.seed} {balancer.weights}\n".encode())

        children = [in_child(start) for _ in range(STARTERS)]
        for fd in (told, begin, begun):
            os.close(fd)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * STARTERS
        with os.fdopen(heard) as file:
            said = file.read().splitlines()
        assert len(said) == STARTERS
        assert len(set(said)) == 1, said
        seeds.append(said[0])
        assert balance_life.names(bpffs) == [f"round-{number}"]
        balance_life.destroy(f"round-{number}", bpffs=bpffs)
    assert len(set(seeds)) == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": Policy("flow", seed=7)}, "policy source, not flow"),
        ({"policy": Policy(prefix4=24, seed=7)}, "policy source, not source/24/128"),
        ({"policy": Policy(seed=8)}, "seed 7, not 8"),
        ({"policy": Policy(mapped="destination", seed=7)}, "map none, not destination"),
        ({"size": 4}, "size 3, not 4"),
        ({"empty": "next"}, "empty drop, not next"),
        ({"senders": 9}, "senders 0, not 9"),
    ],
)
def test_who_asks_for_another_is_told_both_values_and_changes_nothing(
    bpffs: Path, options: dict[str, Any], said: str
) -> None:
    with balance_life.create("flows", Policy(seed=7), 3, bpffs=bpffs):
        pass
    before = pins.read_document(inside(bpffs) / "document")
    arguments = {"policy": Policy(seed=7), "size": 3, **options}
    with (
        pytest.raises(StateError, match=f"balancer 'flows' is there with {said}: take that, or destroy it first"),
        balance_life.create("flows", bpffs=bpffs, **arguments),
    ):
        pass
    assert pins.read_document(inside(bpffs) / "document") == before
    with balance_life.create("flows", Policy(), None, bpffs=bpffs) as joined:
        assert (joined.policy.seed, joined.weights) == (7, dict.fromkeys(range(3), 1))


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "x" * 65, "ä", "a b"])
def test_a_name_that_cannot_be_is_refused_before_anything_is_touched(bpffs: Path, name: str) -> None:
    for call in (balance_life.opened, lambda name, **place: balance_life.create(name, Policy(), 1, **place)):
        with pytest.raises(ValueError, match="give 1 to 64 of the letters"), call(name, bpffs=bpffs):
            pass
    with pytest.raises(ValueError, match="give 1 to 64 of the letters"):
        balance_life.destroy(name, bpffs=bpffs)
    assert not (bpffs / "fastrecv").exists()


def test_what_was_opened_later_is_what_was_made(stage: Stage, bpffs: Path) -> None:
    policy = Policy("source+port", mapped="source", seed=5)
    with balance_life.create("flows", policy, 3, empty="next", senders=100, bpffs=bpffs) as balancer:
        members = balanced(stage, balancer, UDP, "ipv4", 3)
    asked = senders("ipv4", 300)
    with balance_life.opened("flows", bpffs=bpffs, read_only=True) as reading:
        assert (reading.policy, reading.empty, reading.senders) == (policy, "next", 100)
        found = takers(stage, asked)
        assert found == homes(reading, asked)
        assert [explain(reading, sender).taker for sender in asked[:10]] == found[:10]
        assert len(reading.sockets()) == len(members)
    with balance_life.opened("flows", bpffs=bpffs) as balancer:
        balancer.leaving.begin(1)
        balancer.drain(1)
    with balance_life.opened("flows", bpffs=bpffs, read_only=True) as reading:
        assert reading.leaving.slots() == {1}
        assert takers(stage, asked) == homes(reading, asked)


def test_a_group_keeps_its_program_and_table_when_its_balancer_is_destroyed(stage: Stage, bpffs: Path) -> None:
    with balance_life.create("flows", Policy("source+port", seed=5), 2, bpffs=bpffs) as balancer:
        balanced(stage, balancer, UDP, "ipv4", 2)
        asked = senders("ipv4", 100)
        expected = homes(balancer, asked)
    balance_life.destroy("flows", bpffs=bpffs)
    assert [*(bpffs / "fastrecv").iterdir()] == []
    assert takers(stage, asked) == expected
    with pytest.raises(StateError, match="there is no balancer 'flows': make it by `create`"):
        balance_life.destroy("flows", bpffs=bpffs)


def test_who_holds_the_lock_is_named(bpffs: Path) -> None:
    comm = Path("/proc/self/comm").read_text().strip()
    with balance_life.create("flows", Policy(), 2, bpffs=bpffs):
        for read_only in (True, False):
            with (
                pytest.raises(StateError, match=rf"is locked by process {os.getpid()} \({comm}\): wait for it to end"),
                balance_life.opened("flows", bpffs=bpffs, read_only=read_only, timeout=0),
            ):
                pass
    with (
        balance_life.opened("flows", bpffs=bpffs, read_only=True),
        balance_life.opened("flows", bpffs=bpffs, read_only=True, timeout=0) as second,
    ):
        assert second.weights == {0: 1, 1: 1}
        with pytest.raises(StateError, match="is locked by"):
            balance_life.destroy("flows", bpffs=bpffs, timeout=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"format": 99, "version": "9.9"},
            r"was made by fastrecv 9\.9 \(format 99, here 1\): use that version, or destr",
        ),
        ({"more": 1}, "the document of .* cannot be read .*: destroy it, create it anew"),
        ({"empty": "all"}, "the document of .* cannot be read .*: destroy it, create it anew"),
    ],
)
def test_the_document_of_another_version_is_refused_by_name(bpffs: Path, changes: dict[str, object], said: str) -> None:
    with balance_life.create("flows", Policy(), 2, bpffs=bpffs):
        pass
    path = inside(bpffs) / "document"
    document = msgspec.msgpack.decode(pins.read_document(path))
    pins.write_document(msgspec.msgpack.encode(document | changes), path)
    for read_only in (True, False):
        with pytest.raises(StateError, match=said), balance_life.opened("flows", bpffs=bpffs, read_only=read_only):
            pass
    balance_life.destroy("flows", bpffs=bpffs)
    assert balance_life.names(bpffs) == []


def test_another_program_is_read_and_not_changed(bpffs: Path) -> None:
    with balance_life.create("flows", Policy(), 2, bpffs=bpffs):
        pass
    path = inside(bpffs) / "document"
    document = msgspec.msgpack.decode(pins.read_document(path))
    pins.write_document(msgspec.msgpack.encode(document | {"program": "another"}), path)
    with (
        pytest.raises(StateError, match="has another program: use that version, or destroy it and create it anew"),
        balance_life.opened("flows", bpffs=bpffs),
    ):
        pass
    with balance_life.opened("flows", bpffs=bpffs, read_only=True) as reading:
        assert reading.weights == {0: 1, 1: 1}


# Privileges


@pytest.fixture
def command(stage: Stage, bpffs: Path) -> Callable[..., int]:
    def call(*words: object) -> int:
        return run(["balance", *map(str, words), "--bpffs", str(bpffs)])

    return call


def test_making_takes_one_capability_and_changing_none(command: Callable[..., int], stage: Stage, bpffs: Path) -> None:
    member = stage.serve("0", UDP, "198.51.100.1", 9000, reuseport=True)
    with only():
        assert command("create", "flows", "--size", 2) == 77
        assert balance_life.names(bpffs) == []
    with only(CAP_BPF):
        assert command("create", "flows", "--size", 2, "--map", "source", "--senders", 10) == 0
    with only():
        for words in [
            ("attach", "flows", "--fd", member.fileno()),
            ("register", "flows", 0, "--fd", member.fileno()),
            ("weight", "flows", 0, 3),
            ("place", "flows", "198.51.100.0/24", 0),
            ("unplace", "flows", "198.51.100.0/24"),
            ("drain", "flows", 1, "--by-sender", "--learn", 0, "--quiet", 0.1),
            ("unregister", "flows", 0),
            ("status", "flows"),
            ("status",),
            ("explain", "flows", "198.51.100.7"),
            ("metrics",),
            ("destroy", "flows"),
        ]:
            assert command(*words) == 0, words


@pytest.mark.parametrize(
    "words", [("status", "flows"), ("status", "flows", "--json"), ("explain", "flows", "198.51.100.7"), ("metrics",)],
    ids=" ".join,
)  # fmt: skip
def test_members_of_the_group_read_and_change_nothing_and_strangers_do_not_read(
    command: Callable[..., int], words: tuple[str, ...], tmp_path: Path
) -> None:
    said = tmp_path / "said"
    with only(CAP_BPF, CAP_CHOWN, CAP_FSETID):
        assert command("create", "flows", "--size", 2, "--group", GROUP) == 0
    assert by(MEMBER, GROUP, command, words, said) == 0, said.read_text()
    assert "slot" in said.read_text()
    assert by(STRANGER, STRANGER, command, words, said) == 77
    assert "permission denied" in said.read_text()
    assert len(said.read_text().splitlines()) == 1
    for change in (("weight", "flows", "0", "5"), ("destroy", "flows"), ("unregister", "flows", "0")):
        assert by(MEMBER, GROUP, command, change, said) == 77, said.read_text()
        assert len(said.read_text().splitlines()) == 1


def test_a_balancer_that_is_not_theirs_does_not_keep_readers_from_the_others(
    command: Callable[..., int], bpffs: Path, tmp_path: Path
) -> None:
    assert command("create", "flows", "--size", 2, "--group", GROUP) == 0
    assert command("create", "secret", "--size", 2) == 0
    said = tmp_path / "said"

    def collected(*_: object) -> int:
        print(metrics.text(metrics.BalancerCollector(bpffs)))
        return 0

    assert by(MEMBER, GROUP, collected, (), said) == 0
    assert 'fastrecv_balance_up{name="flows"} 1.0' in said.read_text()
    assert 'fastrecv_balance_up{name="secret"} 0.0' in said.read_text()
    assert by(MEMBER, GROUP, command, ("explain", "flows", "198.51.100.7"), said) == 0
    assert by(MEMBER, GROUP, command, ("explain", "secret", "198.51.100.7"), said) == 77


def test_a_socket_outlives_no_balancer_and_no_balancer_its_sockets(stage: Stage, bpffs: Path) -> None:
    with balance_life.create("flows", Policy(), 2, bpffs=bpffs) as balancer:
        members = balanced(stage, balancer, UDP, "ipv4", 2)
    for member in members:
        member.close()
    with balance_life.opened("flows", bpffs=bpffs) as balancer:
        assert balancer.sockets() == {}
        assert [slot.state for slot in balancer.slots()] == ["empty", "empty"]
        with socket.socket(socket.AF_INET, UDP) as late, pytest.raises(OSError, match="is in no group yet"):
            balancer.attach(late)
