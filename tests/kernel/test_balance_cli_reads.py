"""`fastrecv balance`: what is read, where the command completes names, and what is missing."""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import socket
import struct
import urllib.request
from pathlib import Path

import pytest

from fastrecv import groups
from fastrecv.netns import Namespace
from fastrecv.policies import BUCKETS
from fastrecv.steerable import cookie_of
from tests.kernel.balancing import group, senders, taker
from tests.kernel.commands import Command, one_line
from tests.kernel.privileges import only
from tests.kernel.steering import TCP, UDP, Stage

SO_ATTACH_REUSEPORT_CBPF = 51  # include/uapi/asm-generic/socket.h
HOST = "198.51.100.1"


# Status


def test_status_shows_the_slots_and_the_overview_all_balancers(flows: Command, members: list[socket.socket]) -> None:
    flows.done("create", "web", "--size", 2, "--policy", "flow", "--empty", "kernel")
    header, *table = flows.done("status").splitlines()
    assert header.split() == ["balancer", "policy", "size", "sockets", "empty", "slots"]
    assert [line.split() for line in table] == [["flows", "source+port", "3", "3", "drop"],
                                                ["web", "flow", "2", "0", "kernel"]]  # fmt: skip
    assert flows("status", "--json").json == [
        {"name": "flows", "policy": "source+port", "size": 3, "sockets": 3, "empty": "drop"},
        {"name": "web", "policy": "flow", "size": 2, "sockets": 0, "empty": "kernel"},
    ]
    first, header, *table = flows.done("status", "flows").splitlines()
    assert re.fullmatch(r"flows: by source\+port, 3 slots, empty slots: drop; program \d+", first)
    assert header.split() == ["slot", "state", "weight", "share", "socket", "process", "queue", "drops", "selected",
                              "empty", "fallback", "wrong"]  # fmt: skip
    assert len(table) == 3
    assert table[1].split()[:5] == ["1", "active", "1", "33.3", "%"]
    document = flows("status", "flows", "--json").json
    assert (document["name"], document["policy"], document["map"]) == ("flows", "source+port", None)
    assert [row["socket"] for row in document["slots"]] == [cookie_of(member) for member in members]
    assert sum(row["buckets"] for row in document["slots"]) == BUCKETS
    assert (document["complaints"], document["unassigned"], document["unreadable"]) == ([], 0, 0)


def test_status_complains_of_a_program_that_was_replaced_and_attach_puts_it_back(
    flows: Command, members: list[socket.socket]
) -> None:
    fd, cure = members[0].fileno(), "`fastrecv balance attach flows` gives it this one"
    mine = groups.program_of(members[0])
    where = "the group of udp 0.0.0.0 port 7007"
    flows.bare("balance", "detach", "--fd", fd)
    assert flows("status", "flows").err == f"{where} has no program: {cure}\n"
    flows.done("create", "other", "--size", 1)
    theirs = re.search(r"program (\d+)", flows.done("attach", "other", "--fd", fd))
    assert theirs is not None
    assert flows("status", "flows").err == f"{where} has program {theirs[1]} instead of {mine}: {cure}\n"
    assert flows("status", "flows", "--json").json["complaints"] == [
        f"{where} has program {theirs[1]} instead of {mine}: {cure}"
    ]
    assert f", in the place of program {theirs[1]}" in flows.done("attach", "flows", "--fd", fd)
    attach_classic(members[0])
    assert flows("status", "flows").err == f"{where} has a classic BPF program instead of {mine}: {cure}\n"
    assert ", in the place of a classic BPF program" in flows.done("attach", "flows", "--fd", fd)
    assert flows("status", "flows").err == ""


def attach_classic(sock: socket.socket) -> None:
    """Classic BPF that returns 0, without a word from the kernel."""
    code = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, struct.pack("@HP", 1, ctypes.addressof(code)))


def test_status_complains_of_sockets_of_several_groups_and_of_other_namespaces(flows: Command, stage: Stage) -> None:
    stranger = stage.bind(UDP, HOST, 9000, reuseport=True)
    flows.done("register", "flows", 5, "--fd", stranger.fileno())
    complaints = flows("status", "flows", "--json").json["complaints"]
    assert complaints[0] == (
        "its sockets are of 2 groups, and a program selects only those of the group that it runs for: "
        "udp 0.0.0.0 port 7007, udp 198.51.100.1 port 9000"
    )
    assert complaints[1].startswith("the group of udp 198.51.100.1 port 9000 has no program")
    path = f"/proc/self/fd/{stage.namespace.fd}"
    with contextlib.closing(Namespace()) as elsewhere, elsewhere:
        assert flows("status", "flows").err == (
            "slots 0, 1, 2, 5: their sockets are in another network namespace: say with --netns where\n"
        )
        assert flows("status", "flows", "--json", "--netns", path).json["complaints"] == complaints


# Explain


def test_explain_says_who_gets_a_sender_and_why(flows: Command, stage: Stage, members: list[socket.socket]) -> None:
    (asked,) = senders("ipv4", 1)
    found = taker(stage, UDP, asked)
    assert found is not None
    words = ("explain", "flows", f"{asked.source}:{asked.source_port}")
    cookie = cookie_of(members[found])
    assert re.fullmatch(
        rf"slot {found}: by source\+port it is in bucket \d+ of slot {found}, which has socket sk:{cookie:x}\n",
        flows.done(*words),
    )
    document = flows(*words, "--json").json
    assert (document["slot"], document["taker"], document["socket"]) == (found, found, cookie)
    flows.done("unregister", "flows", found)
    assert flows.done(*words).endswith(f"of slot {found}, which has no socket: dropped\n")
    assert flows.done(*words).startswith("no slot: ")


@pytest.mark.parametrize(
    ("policy", "words", "said"),
    [
        ("flow", ("198.51.100.7:1",), "the destination counts for this balancer: give it, too"),
        ("flow", ("198.51.100.7", "192.0.2.1:1"), "by flow the port counts: give SOURCE with its port"),
        ("flow", ("198.51.100.7:1", "192.0.2.1"), "by flow the port counts: give DESTINATION with its port"),
        ("flow", ("198.51.100.7:1", "[2001:db8::1]:1"), "source and destination are of different IP versions"),
        ("source+port", ("198.51.100.7",), "by source+port the port counts: give SOURCE with its port"),
        ("payload[0:2]", ("198.51.100.7",), "by payload[0:2] the payload counts: give --payload"),
        ("quic[2]", ("198.51.100.7", "--payload", "xy"), "--payload 'xy' is no hexadecimal text"),
        ("source", ("localhost",), "'localhost' is no IP address"),
        ("cpu", ("198.51.100.7", "--cpu", -1), "-1 is not in the range x>=0"),
        ("source", (), "Missing argument 'SOURCE'."),
    ],
)
def test_explain_says_what_it_must_know(balance: Command, policy: str, words: tuple[object, ...], said: str) -> None:
    balance.done("create", "flows", "--size", 2, "--policy", policy)
    assert said in balance.misused("explain", "flows", *words)


def test_explain_by_payload_cpu_and_chance(balance: Command) -> None:
    for name, policy in [("payload", "payload[0:2]"), ("cpu", "cpu"), ("random", "random")]:
        balance.done("create", name, "--size", 2, "--policy", policy, "--empty", "kernel")
    assert "by payload[0:2] it is in bucket" in balance.done("explain", "payload", HOST, "--payload", "ab cd")
    assert "in bucket 1 of slot 1, which has no socket: the kernel's hash decides" in balance.done(
        "explain", "cpu", HOST, "--cpu", 1
    )
    assert balance.done("explain", "cpu", HOST).startswith("nobody knows: it goes by the CPU")
    assert balance.done("explain", "random", HOST) == "nobody knows: every packet goes where chance sends it\n"


# Metrics, completion, privileges


def test_metrics_are_text_or_served(flows: Command, stage: Stage) -> None:
    found = taker(stage, UDP, senders("ipv4", 1)[0])
    said = flows.done("metrics")
    for line in [
        'fastrecv_balance_up{name="flows"} 1.0',
        f'fastrecv_balance_packets_total{{name="flows",outcome="selected",slot="{found}"}} 1.0',
        'fastrecv_balance_packets_total{name="flows",outcome="empty",slot="none"} 0.0',
        'fastrecv_balance_sockets{name="flows",slot="2"} 1.0',
    ]:
        assert f"{line}\n" in said
    buckets = re.findall(r'fastrecv_balance_buckets{name="flows",slot="\d"} ([\d.]+)', said)
    assert sum(map(float, buckets)) == BUCKETS
    with flows.process("metrics", "--listen", "127.0.0.1:0") as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().removeprefix("serving ").strip()
            with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - the one that was just said
                assert 'fastrecv_balance_up{name="flows"} 1.0' in answer.read().decode()
        finally:
            server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=10)
    assert (server.returncode, out, err) == (0, "stopped\n", "")


@pytest.mark.parametrize(("typed", "offered"), [("", ["flows", "web", "web-2"]), ("web", ["web", "web-2"]), ("x", [])])
def test_names_are_completed(balance: Command, monkeypatch: pytest.MonkeyPatch, typed: str, offered: list[str]) -> None:
    for name in ("web", "web-2", "flows"):
        balance.done("create", name, "--size", 1)
    words = ["fastrecv", "balance", "status", "--bpffs", str(balance.bpffs), typed]
    monkeypatch.setenv("_FASTRECV_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    said = balance.exits()
    assert (said.code, said.err) == (0, "")
    assert [line.removeprefix("plain,") for line in said.out.splitlines() if line] == offered


def test_without_the_privilege_to_make_one_it_says_so(balance: Command) -> None:
    with only():
        said = balance("create", "flows", "--size", 1)
    assert (said.code, said.out) == (77, "")
    assert "CAP_BPF" in one_line(said.err)
    assert [*(balance.bpffs / "fastrecv").glob("*")] == []


def test_where_there_is_no_bpf_file_system_every_command_says_so(balance: Command, tmp_path: Path) -> None:
    for words in (["create", "flows", "--size", "1"], ["status"], ["destroy", "flows"], ["metrics"]):
        said = balance.bare("balance", *words, "--bpffs", tmp_path)
        assert (said.code, said.out) == (1, "")
        assert one_line(said.err).startswith(f"{tmp_path} is no BPF file system: mount -t bpf bpf")


def test_a_tcp_listener_is_attached_and_registered_as_well(balance: Command, stage: Stage) -> None:
    listeners = group(stage, TCP, "ipv6", 2)
    balance.done("create", "flows", "--size", 2, "--policy", "source+port")
    assert "to the group of tcp :: port 7007" in balance.done("attach", "flows", "--fd", listeners[0].fileno())
    for number, listener in enumerate(listeners):
        balance.done("register", "flows", number, "--fd", listener.fileno())
    asked = senders("ipv6", 20)
    told = [balance("explain", "flows", f"[{one.source}]:{one.source_port}", "--json").json["taker"] for one in asked]
    assert [taker(stage, TCP, sender) for sender in asked] == told
