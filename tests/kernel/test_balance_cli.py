"""`fastrecv balance`: what every command says, and what is said to whom it is refused."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fastrecv.balance import SLOTS
from fastrecv.netns import Namespace
from fastrecv.steerable import cookie_of
from tests.kernel.balancing import senders, taker, within
from tests.kernel.commands import Command, one_line
from tests.kernel.steering import PORT, UDP, Stage

SO_ATTACH_REUSEPORT_CBPF = 51  # include/uapi/asm-generic/socket.h
HOST = "198.51.100.1"


@contextlib.contextmanager
def daemon(count: int = 1, port: int = PORT) -> Iterator[subprocess.Popen[str]]:
    """A process that knows nothing of balancers, with members of a group."""
    text = f"""
import socket
made = []
for _ in range({count}):
    made.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    made[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made[-1].bind(("{HOST}", {port}))
print(flush=True)
input()
"""
    command = [sys.executable, "-c", text]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "\n"
            yield process
        finally:
            process.kill()


def slot(balance: Command, number: int) -> dict[str, object]:
    (found,) = (row for row in balance("status", "flows", "--json").json["slots"] if row["slot"] == number)
    assert isinstance(found, dict)
    return found


# Create and destroy


def test_create_says_what_was_made_or_is_there_and_destroy_that_it_is_gone(balance: Command) -> None:
    words = ("create", "flows", "--policy", "source/24/64", "--size", 3, "--seed", 7)
    assert balance.done(*words) == "flows: by source/24/64, 3 slots, empty slots: drop\n"
    assert balance.done(*words) == "flows: by source/24/64, 3 slots, empty slots: drop\n"
    options = ("--policy", "flow", "--size", 2, "--map", "source", "--empty", "next", "--senders", 5000)
    assert balance.done("create", "web", *options) == (
        "web: by source prefixes, else flow, 2 slots, empty slots: next, 5,000 senders may be known\n"
    )
    assert balance.done("destroy", "web") == "destroyed web\n"
    assert balance.refused("destroy", "web") == "there is no balancer 'web', only flows: make it by `create`"
    assert balance.done("destroy", "flows") == "destroyed flows\n"
    assert balance.refused("destroy", "flows") == "there is no balancer 'flows': make it by `create`"
    assert [*(balance.bpffs / "fastrecv").iterdir()] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--policy", "flow"), "policy source, not flow"),
        (("--seed", 8), "seed 7, not 8"),
        (("--size", 4), "size 3, not 4"),
        (("--empty", "next"), "empty drop, not next"),
        (("--map", "source"), "map none, not source"),
        (("--senders", 10), "senders 0, not 10"),
    ],
)
def test_what_is_there_is_not_made_otherwise(balance: Command, words: tuple[object, ...], said: str) -> None:
    balance.done("create", "flows", "--size", 3, "--seed", 7)
    expected = f"balancer 'flows' is there with {said}: take that, or destroy it first"
    assert balance.refused("create", "flows", *words) == expected
    assert balance.done("create", "flows").startswith("flows: by source, 3 slots")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("a.b",), "name 'a.b': give 1 to 64 of the letters A to Z, a to z, digits, - and _"),
        (("x" * 65,), "give 1 to 64 of the letters"),
        ((), "Missing argument 'NAME'."),
        (("x", "--policy", "sauce"), "policy 'sauce': give source[/BITS4[/BITS6]], source+port, flow"),
        (("x", "--policy", "payload[4:21]"), "key 'payload' of 21 bytes: give a length of 1 to 20"),
        (("x", "--policy", "rxhash", "--size", 1), "key 'rxhash' is for classic BPF only"),
        (("x", "--policy", "cpu", "--size", 1, "--senders", 5), "key 'cpu' knows no senders: leave senders out"),
        (("x", "--size", 0), "0 is not in the range 1<=x<=128"),
        (("x", "--size", 129), "129 is not in the range 1<=x<=128"),
        (("x", "--map", "port"), "'port' is not one of 'source', 'destination'"),
        (("x", "--empty", "pass"), "'pass' is not one of 'drop', 'kernel', 'next'"),
        (("x", "--seed", 1 << 64), "is not in the range 0<=x<=18446744073709551615"),
        (("x", "--group", "no-such-group"), "there is no group 'no-such-group'"),
    ],
)
def test_wrong_words_for_create_are_usage_errors(balance: Command, words: tuple[object, ...], said: str) -> None:
    assert said in balance.misused("create", *words)
    assert not [*(balance.bpffs / "fastrecv").glob("*")]


def test_the_first_says_the_size(balance: Command) -> None:
    assert balance.refused("create", "flows") == "flows is not there yet: give it a size (--size)"
    assert balance.refused("status") == "there is no balancer: `fastrecv balance create`"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("status", ()),
        ("explain", ("198.51.100.7",)),
        ("weight", (0, 1)),
        ("resize", (2,)),
        ("drain", (0,)),
        ("unregister", (0,)),
        ("place", ("198.51.100.0/24", 0)),
        ("unplace", ("198.51.100.0/24",)),
    ],
)
def test_a_balancer_that_is_not_there_is_named(balance: Command, name: str, arguments: tuple[object, ...]) -> None:
    assert balance.refused(name, "flows", *arguments) == "there is no balancer 'flows': make it by `create`"


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("attach", ("flows",), "which socket? give PID PROTOCOL ADDRESS PORT, or --fd"),
        ("attach", ("flows", 1, "udp", HOST), "which socket? give PID PROTOCOL ADDRESS PORT, or --fd"),
        ("attach", ("flows", 1, "udp", HOST, 53, "--fd", 3), "give either PID PROTOCOL ADDRESS PORT or --fd"),
        ("attach", ("flows", 1, "icmp", HOST, 53), "'icmp' is not one of 'tcp', 'udp'"),
        ("attach", ("flows", "nobody", "udp", HOST, 53), "'nobody' is no process id, nor a file that holds one"),
        ("register", ("flows", SLOTS, "--fd", 3), f"{SLOTS} is not in the range 0<=x<=127"),
        ("register", ("flows", 0), "no socket: give --fd, or run as a systemd service with a .socket unit"),
        ("register-pid", ("flows", 0, 1, "udp", "localhost", 53), "'localhost' is no IP address"),
        ("weight", ("flows", 0, 1001), "1001 is not in the range 0<=x<=1000"),
        ("resize", ("flows", 0), "0 is not in the range 1<=x<=128"),
        ("drain", ("flows", 0, "--quiet", 0), "0.0 is not in the range 0.1<=x<=inf"),
        ("place", ("flows", "198.51.100.1/24", 0), "has bits below its prefix: 198.51.100.0/24 is the prefix"),
    ],
)
def test_wrong_words_are_usage_errors_that_say_what_would_be_right(
    balance: Command, name: str, arguments: tuple[object, ...], said: str
) -> None:
    assert said in balance.misused(name, *arguments)


# Sockets


def test_a_group_is_attached_registered_and_detached(
    balance: Command, stage: Stage, members: list[socket.socket]
) -> None:
    balance.done("create", "flows", "--policy", "source+port", "--size", 2)
    fds = [member.fileno() for member in members]
    program = balance("status", "flows", "--json").json["program"]
    first = f"slot 0: udp 0.0.0.0 port 7007, sk:{cookie_of(members[0]):x}\n"
    hint = "its group does not have flows's program: `fastrecv balance attach flows`\n"
    assert balance.done("register", "flows", 0, "--fd", fds[0]) == first + hint
    said = f"attached flows (program {program}) to the group of udp 0.0.0.0 port 7007"
    bare = "slot 1 has no socket yet: senders there are dropped until one is registered\n"
    assert balance.done("attach", "flows", "--fd", fds[1]) == f"{said}\n{bare}"
    assert balance.done("attach", "flows", "--fd", fds[1]) == f"{said}\n{bare}"
    assert balance.done("register", "flows", 0, "--fd", fds[0]) == first
    assert balance.refused("register", "flows", 0, "--fd", fds[1]) == (
        f"slot 0 has socket sk:{cookie_of(members[0]):x}: unregister that, or take it over"
    )
    assert f"sk:{cookie_of(members[1]):x}" in balance.done("register", "flows", 0, "--fd", fds[1], "--take-over")
    assert balance.refused("register", "flows", 1, "--fd", fds[1]) == (
        "udp 0.0.0.0 port 7007 has slot 0: unregister it there first"
    )
    assert balance.refused("register", "flows", 1, "--fd", 999) == "descriptor 999 is not open"
    assert balance.done("unregister", "flows", 0) == (
        "slot 0 is empty; it still has senders: `drain` would give them away\n"
    )
    assert balance.refused("unregister", "flows", 0) == "slot 0 has no socket"
    detached = balance.bare("balance", "detach", "--fd", fds[2])
    assert (detached.code, detached.out) == (0, "detached from the group of udp 0.0.0.0 port 7007\n")
    again = balance.bare("balance", "detach", "--fd", fds[2])
    assert (again.code, one_line(again.err)) == (1, "the group of udp 0.0.0.0 port 7007 has no program")


def test_the_socket_of_a_process_that_ends_leaves_its_slot_empty(balance: Command, stage: Stage) -> None:
    """So no copy of it is left with the command, which has run in this very process."""
    balance.done("create", "flows", "--size", 2, "--policy", "source+port")
    with daemon() as one, daemon() as other:
        where = ("udp", HOST, PORT)
        assert "to the group of udp 198.51.100.1 port 7007" in balance.done("attach", "flows", one.pid, *where)
        for number, process in enumerate((one, other)):
            balance.done("register-pid", "flows", number, process.pid, *where)
        assert [slot(balance, number)["pids"] for number in (0, 1)] == [[one.pid], [other.pid]]
        assert balance.refused("register-pid", "flows", 1, one.pid, *where) == (
            "udp 198.51.100.1 port 7007 has slot 0: unregister it there first"
        )
        one.kill()
        one.wait()
        assert within(5, lambda: slot(balance, 0)["socket"] is None)
        assert slot(balance, 0)["state"] == "empty"
        assert slot(balance, 1)["pids"] == [other.pid]


def test_a_process_with_several_members_gets_as_many_slots_or_none(balance: Command, stage: Stage) -> None:
    balance.done("create", "flows", "--size", 4)
    where = ("udp", HOST, PORT)
    with daemon(2) as two, daemon() as one:
        assert balance.refused("register-pid", "flows", 127, two.pid, *where) == (
            "2 sockets from slot 127 on: there are slots 0 to 127"
        )
        balance.done("register-pid", "flows", 2, one.pid, *where)
        assert balance.refused("register-pid", "flows", 1, two.pid, *where).startswith("slot 2 has socket sk:")
        assert [row["slot"] for row in balance("status", "flows", "--json").json["slots"] if row["socket"]] == [2]
        said = balance.done("register-pid", "flows", 0, two.pid, *where).splitlines()
        assert [line.split(":")[0] for line in said] == ["slot 0", "slot 1", "its group does not have flows's program"]
        refused = balance.refused("register-pid", "flows", 0, two.pid, "udp", HOST, 9)
        assert (
            f"process {two.pid} has no udp socket on 198.51.100.1 port 9; it has udp 198.51.100.1 port 7007" in refused
        )


# Shares


def test_weights_and_sizes_say_how_many_senders_move(flows: Command, members: list[socket.socket]) -> None:
    assert flows.done("weight", "flows", 0, 2) == (
        "slot 0 has weight 2, 682 of 4,096 buckets moved (16.7 % of the senders)\n"
    )
    assert flows.done("weight", "flows", 2, 0).startswith("slot 2 has weight 0, 1,024 of 4,096 buckets moved (25.0 %")
    assert flows.refused("weight", "flows", 2, 0) == "slot 2 has no senders"
    assert flows.done("resize", "flows", 1).startswith("3 slots before, 1 now, 1,36")
    assert flows.refused("drain", "flows", 0) == "slot 0 is the only one that has senders: nobody could take them"
    assert flows.refused("resize", "flows", 5) == (
        "slots 3, 4 have no socket, so the senders that it would be given would be dropped: register there first, "
        "or drain it, too"
    )
    assert flows.done("resize", "flows", 3).startswith("1 slots before, 3 now")
    assert [row["weight"] for row in flows("status", "flows", "--json").json["slots"]] == [2, 1, 1]


def test_prefixes_are_placed_shown_and_unplaced(balance: Command) -> None:
    balance.done("create", "flows", "--size", 2, "--map", "source")
    assert (
        balance.done("place", "flows", "198.51.100.0/24", 1)
        == "source 198.51.100.0/24: slot 1, which has no socket yet\n"
    )
    assert (
        balance.done("place", "flows", "2001:db8::/32", 0) == "source 2001:db8::/32: slot 0, which has no socket yet\n"
    )
    assert "source 198.51.100.0/24: slot 1\n" in balance.done("status", "flows")
    assert balance("status", "flows", "--json").json["places"] == {"198.51.100.0/24": 1, "2001:db8::/32": 0}
    assert balance.done("unplace", "flows", "198.51.100.0/24") == "198.51.100.0/24: by source\n"
    assert balance.refused("unplace", "flows", "198.51.100.0/24") == "198.51.100.0/24 has no slot of its own"
    balance.done("create", "plain", "--size", 2)
    assert balance.refused("place", "plain", "::/0", 1).startswith("this balancer maps no prefixes: create it with")


# Drain


def test_drain_waits_until_the_queue_is_read_and_empties_the_slot(
    flows: Command, stage: Stage, members: list[socket.socket]
) -> None:
    for sender in senders("ipv4", 30):
        with stage.bind(UDP, str(sender.source), sender.source_port) as client:
            client.sendto(b"?", (HOST, PORT))
    said = flows("drain", "flows", 1, "--wait", 0.2)
    assert said.code == 1
    assert said.out.startswith("slot 1 drains, 1,36")
    assert re.fullmatch(
        r"slot 1 still has [\d,]+ queued after 0.2 s: its process does not read. `drain` waits on", one_line(said.err)
    )
    assert slot(flows, 1)["state"] == "draining"
    assert flows.done("drain", "flows", 1) == "slot 1 has no buckets any more, and goes on to drain\n"
    with contextlib.suppress(BlockingIOError):
        while members[2].recv(9):
            pass
    assert flows.done("drain", "flows", 2, "--wait", 5).splitlines()[1:] == [
        "slot 2 is empty, and nothing is queued: its process can end"
    ]
    assert slot(flows, 2)["socket"] is None


def test_drain_by_sender_ends_when_none_has_come_for_a_while(balance: Command, members: list[socket.socket]) -> None:
    balance.done("create", "flows", "--size", 2, "--senders", 100)
    balance.done("register", "flows", 0, "--fd", members[0].fileno())
    assert balance.refused("drain", "flows", 0, "--by-sender") == (
        "slot 1 has no socket, so the senders that it would be given would be dropped: register there first, or drain "
        "it, too"
    )
    assert balance("status", "flows", "--json").json["leaving"] == {}
    balance.done("register", "flows", 1, "--fd", members[1].fileno())
    said = balance.done("drain", "flows", 0, "--by-sender", "--learn", 0.1, "--quiet", 0.1, "--wait", 1).splitlines()
    assert said == [
        "0 senders came within 0.1 s, and stay",
        "slot 0 drains, 2,048 of 4,096 buckets moved (50.0 % of the senders)",
        "slot 0 has no known sender: it has none any more",
        "slot 0 is empty, and nothing is queued: its process can end",
    ]


def test_a_drain_by_sender_that_cannot_be_learns_nothing(balance: Command) -> None:
    balance.done("create", "plain", "--size", 2)
    assert balance.refused("drain", "plain", 0, "--by-sender") == (
        "this balancer knows no senders: create it with --senders, or drain by table"
    )
    balance.done("create", "flows", "--size", 1, "--senders", 100)
    assert "is the only one that has senders" in balance.refused("drain", "flows", 0, "--by-sender")
    assert balance.refused("drain", "flows", 1, "--by-sender") == "slot 1 has no senders"
    assert balance("status", "flows", "--json").json["leaving"] == {}


def test_a_drain_by_sender_is_shown_while_senders_come(
    balance: Command, stage: Stage, members: list[socket.socket]
) -> None:
    balance.done("create", "flows", "--size", 2, "--senders", 100, "--policy", "source+port")
    balance.done("attach", "flows", "--fd", members[0].fileno())
    for number in (0, 1):
        balance.done("register", "flows", number, "--fd", members[number].fileno())
    with balance.process("drain", "flows", 0, "--by-sender", "--learn", 1, "--quiet", 2) as draining:
        assert within(5, lambda: "0" in balance("status", "flows", "--json").json["leaving"])
        asked = senders("ipv4", 30)
        before = [taker(stage, UDP, sender) for sender in asked]

        def draining_while_they_come() -> bool:
            assert [taker(stage, UDP, sender) for sender in asked] == before
            return slot(balance, 0)["state"] == "draining"

        assert within(5, draining_while_they_come)
        assert [taker(stage, UDP, sender) for sender in asked] == before
        known = balance("status", "flows", "--json").json["leaving"]["0"]["senders"]
        assert known == before.count(0)
        assert f"slot 0 is drained by sender: {known} are known, the last came 0 s ago" in balance.done(
            "status", "flows"
        )
        out, err = draining.communicate(timeout=20)
    assert (draining.returncode, err) == (0, "")
    assert out.splitlines()[0] == f"{known} senders came within 1 s, and stay"
    assert [taker(stage, UDP, sender) for sender in asked] == [1] * 30


def test_the_queue_of_a_socket_in_another_namespace_is_not_taken_for_empty(
    flows: Command, members: list[socket.socket]
) -> None:
    with contextlib.closing(Namespace()) as elsewhere, elsewhere:
        said = flows("drain", "flows", 1, "--wait", 1)
    assert said.code == 1
    assert one_line(said.err).startswith("the socket of slot 1 is in another network namespace")
    assert slot(flows, 1)["socket"] == cookie_of(members[1])
