"""What a watcher is told, against what was done to real sockets."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from fastrecv import bpf, features
from fastrecv.bpf import Map
from fastrecv.cli.watch import line
from fastrecv.groups import Groups, owners
from fastrecv.netns import Namespace
from fastrecv.policies import BUCKETS, Policy
from fastrecv.sockets import drop_everything, drops
from fastrecv.steerable import cookie_of
from fastrecv.watching import CpuShares, Document, Watch, group_documents, sampled
from tests.kernel.privileges import CAP_BPF, CAP_PERFMON, only
from tests.kernel.steering import PORT, SO_ATTACH_REUSEPORT_EBPF, TCP, UDP, Stage, kinds, nets

HOST, OTHER = "198.51.100.1", "198.51.100.2"
RING, RECORD = 1 << 20, 8 + 80  # bytes of bpf/watch.bpf.c's ring; of an event with its header


@pytest.fixture
def watching(stage: Stage) -> Iterator[Watch]:
    with Watch() as opened:
        yield opened


def told(watch: Watch, event: str, **wanted: object) -> list[Document]:
    """The events that have come since the last time, of this kind and with these fields."""
    return [
        found for found in watch.read() if found["event"] == event and all(found[key] == wanted[key] for key in wanted)
    ]


@nets
def test_every_state_of_a_connection_is_told(stage: Stage, watching: Watch, net: str) -> None:
    listener = stage.serve("listener", TCP, net.format(1), PORT)
    client = stage.bind(TCP, net.format(2), 4242)
    client.connect((net.format(1), PORT))
    accepted = listener.accept()[0]
    cookies = cookie_of(listener), cookie_of(client), cookie_of(accepted)
    client.close()
    assert accepted.recv(1) == b""
    accepted.close()
    listener.close()
    assert select.select([watching], [], [], 5)[0] == [watching]
    events = told(watching, "state")
    steps = {
        cookie: [(one["old"], one["new"], one["pid"] is not None) for one in events if one["cookie"] == cookie]
        for cookie in cookies
    }
    assert list(steps.values()) == [
        [("CLOSE", "LISTEN", True), ("LISTEN", "CLOSE", True)],
        [("CLOSE", "SYN_SENT", True), ("SYN_SENT", "ESTABLISHED", False), ("ESTABLISHED", "FIN_WAIT1", True),
         ("FIN_WAIT1", "FIN_WAIT2", False), ("FIN_WAIT2", "CLOSE", False)],
        [("LISTEN", "SYN_RECV", False), ("SYN_RECV", "ESTABLISHED", False), ("ESTABLISHED", "CLOSE_WAIT", False),
         ("CLOSE_WAIT", "LAST_ACK", True), ("LAST_ACK", "CLOSE", False)],
    ]  # fmt: skip
    assert len(events) == sum(map(len, steps.values()))
    ends = {
        one["cookie"]: (one["source"], one["source_port"], one["destination"], one["destination_port"])
        for one in events
    }
    assert ends[cookies[0]][:2] == (net.format(1), PORT)
    assert ends[cookies[0]][3] is None
    assert ends[cookies[1]] == (net.format(2), 4242, net.format(1), PORT)
    assert ends[cookies[2]] == (net.format(1), PORT, net.format(2), 4242)
    command = Path("/proc/thread-self/comm").read_text().strip()
    for one in events:
        assert (one["pid"], one["command"]) in [(os.getpid(), command), (None, None)]
        assert one["protocol"] == "tcp"
    assert [one["time"] for one in events] == sorted(one["time"] for one in events)


def overflowing(stage: Stage, count: int) -> tuple[socket.socket, socket.socket]:
    """A server whose queue is full, and the client of whose datagrams it has lost so many."""
    server = stage.bind(UDP, HOST, PORT)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client = stage.bind(UDP, OTHER, 4242)
    while drops(server) < count:
        client.sendto(bytes(500), (HOST, PORT))
    return server, client


def test_a_datagram_lost_to_a_full_queue_is_told_of_socket_and_packet(stage: Stage, watching: Watch) -> None:
    server, _ = overflowing(stage, 5)
    events = watching.read()
    assert [one["event"] for one in events] == ["overflow", "drop"] * 5
    for overflow, drop in zip(events[::2], events[1::2], strict=True):
        assert (overflow["cookie"], overflow["error"], overflow["protocol"]) == (cookie_of(server), "ENOMEM", "udp")
        assert (overflow["source"], overflow["source_port"], overflow["destination_port"]) == (HOST, PORT, None)
        assert (drop["source"], drop["source_port"]) == (OTHER, 4242)
        assert (drop["destination"], drop["destination_port"]) == (HOST, PORT)
        assert (drop["reason"], drop["protocol"], drop["cookie"]) == ("SOCKET_RCVBUFF", "udp", cookie_of(server))


def test_a_kernel_that_does_not_say_for_whom_a_packet_was_tells_less(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "kernel_version", lambda: (6, 1))
    with Watch() as watch:
        server, client = overflowing(stage, 5)
        events = watch.read()
        assert [(one["event"], one["cookie"]) for one in events] == [("overflow", cookie_of(server))] * 5
        told_alone = f"  udp  {HOST}:{PORT}  refused: ENOMEM (the socket's queue is full)  sk:{cookie_of(server):x}"
        assert line(events[0]).endswith(told_alone)
        drop_everything(server)
        client.sendto(b"x", (HOST, PORT))
        client.sendto(b"x", (HOST, PORT + 1))
        filtered, nobody = watch.read()
    assert line(filtered).endswith(
        f"  udp  {OTHER}:4242 -> {HOST}:{PORT}  dropped: SOCKET_FILTER (the socket's filter refused it)"
    )
    assert (filtered["reason"], filtered["destination_port"]) == ("SOCKET_FILTER", PORT)
    assert (nobody["reason"], nobody["destination_port"]) == ("NO_SOCKET", PORT + 1)
    assert filtered["cookie"] is nobody["cookie"] is None


@kinds
@nets
def test_packets_to_nobody_are_told(stage: Stage, watching: Watch, kind: int, net: str) -> None:
    assert stage.ask(kind, net.format(1)) == "refused"
    (drop,) = told(watching, "drop")
    assert (drop["reason"], drop["cookie"], drop["protocol"]) == ("NO_SOCKET", None, "tcp" if kind == TCP else "udp")
    assert (drop["destination"], drop["destination_port"]) == (net.format(1), PORT)
    assert drop["source_port"] not in (None, PORT)


def test_what_a_filter_refuses_is_told(stage: Stage, watching: Watch) -> None:
    server, client = stage.bind(UDP, HOST, PORT), stage.bind(UDP, OTHER, 0)
    drop_everything(server)
    client.sendto(b"x", (HOST, PORT))
    (drop,) = told(watching, "drop")
    assert (drop["reason"], drop["cookie"]) == ("SOCKET_FILTER", cookie_of(server))


def test_only_the_port_that_was_asked_for_is_told(stage: Stage) -> None:
    with Watch(PORT) as watch:
        for port in (PORT, PORT + 1):
            assert stage.ask(TCP, HOST, port) == "refused"
            assert stage.ask(UDP, HOST, port) == "refused"
        events = watch.read()
    assert {one["destination_port"] for one in events} == {PORT}
    assert [one["protocol"] for one in events if one["event"] == "drop"] == ["tcp", "udp"]
    for port in (-1, 65536):
        with pytest.raises(ValueError, match=f"port {port}: give 1 to 65535, or 0 for all"):
            Watch(port)


def test_other_namespaces_are_not_told_of(stage: Stage, watching: Watch) -> None:
    with closing(Namespace()) as other, other, Watch() as there:
        with closing(socket.socket(socket.AF_INET, TCP)) as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            cookie = cookie_of(listener)
        assert watching.read() == []
        assert [(one["old"], one["new"]) for one in told(there, "state", cookie=cookie)] == [
            ("CLOSE", "LISTEN"), ("LISTEN", "CLOSE"),
        ]  # fmt: skip


def test_what_does_not_fit_into_the_ring_is_counted(stage: Stage, watching: Watch) -> None:
    client = stage.bind(UDP, OTHER, 0)
    sent = RING // RECORD + 500
    for _ in range(sent):
        client.sendto(b"x", (HOST, PORT))
    events = watching.read()
    assert [one["event"] for one in events] == ["drop"] * (RING // RECORD) + ["lost"]
    assert events[-1]["count"] == sent - RING // RECORD == 500
    assert line(events[-1]).endswith(
        "  500 events were lost: they come faster than they are read (--port tells of fewer)"
    )
    assert watching.read() == []
    client.sendto(b"x", (HOST, PORT))
    assert len(told(watching, "drop", reason="NO_SOCKET")) == 1


def test_watching_takes_cap_bpf_and_cap_perfmon_and_no_more(stage: Stage) -> None:
    with only(CAP_BPF, CAP_PERFMON), Watch() as watch:
        assert stage.ask(UDP, HOST) == "refused"
        assert len(told(watch, "drop")) == 1
    for held in (CAP_BPF, CAP_PERFMON):
        with only(held), pytest.raises(PermissionError, match="watching sockets needs CAP_BPF and CAP_PERFMON"):
            Watch()


def test_a_closed_watch_tells_nothing(stage: Stage, watching: Watch) -> None:
    watching.close()
    watching.close()
    with pytest.raises(ValueError, match="is closed"):
        watching.read()
    with pytest.raises(ValueError, match="is closed"):
        watching.fileno()


def test_the_choices_of_a_balancer_are_told_while_somebody_reads(stage: Stage) -> None:
    members = [stage.bind(UDP, HOST, PORT, reuseport=True) for _ in range(2)]
    client = stage.bind(UDP, OTHER, 4242)
    with bpf.packaged("balance") as balance, closing(Map.array("table", np.uint32, BUCKETS)) as table:
        balance.set(**Policy("source", seed=7).settings())
        maps = balance.load().maps
        table.update(np.arange(BUCKETS, dtype=np.uint32), np.full(BUCKETS, 1, np.uint32))
        maps["tables"].update([0], np.array([table.fileno()], np.uint32).view(maps["tables"].value_dtype))
        maps["slots"].update([1], [members[1].fileno()])
        members[0].setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, balance.programs["balance"].fileno())

        def send() -> None:
            client.sendto(b"x", (HOST, PORT))

        send()
        with sampled(maps, 1) as choices:
            assert choices.read() == []
            send()
            assert select.select([choices], [], [], 5)[0] == [choices]
            (chosen,) = choices.read()
            maps["slots"].delete([1])
            send()
            (missed,) = choices.read()
            table.update([chosen["bucket"]], [0xFFFF])
            send()
            (nobody,) = choices.read()
        send()
        assert maps["sampling"][0] == 0
        with sampled(maps, 5) as choices:
            assert choices.read() == []
            assert maps["sampling"][0] == 5
        assert maps["sampling"][0] == 0
        with (
            pytest.raises(ValueError, match="one choice in 0 cannot be told"),
            sampled(maps, 0),
        ):
            pass
    flow = {"source": OTHER, "source_port": 4242, "destination": HOST, "destination_port": PORT}
    way, bucket = f"balancer  {OTHER}:4242 -> {HOST}:{PORT}", f"bucket {chosen['bucket']}"
    assert line(chosen).endswith(f"  {way}  {bucket}, slot 1  sk:{cookie_of(members[1]):x}")
    assert line(missed).endswith(f"  {way}  {bucket}, slot 1: ENOENT (no socket is in it)")
    assert line(nobody).endswith(f"  {way}  {bucket}, no slot")
    for one, slot, outcome in ((chosen, 1, "selected"), (missed, 1, "ENOENT"), (nobody, None, "ENOENT")):
        assert {key: one[key] for key in flow} == flow
        assert (one["event"], one["slot"], one["outcome"]) == ("choice", slot, outcome)
        assert one["bucket"] == chosen["bucket"] < BUCKETS


def test_groups_are_told_with_members_queues_and_processes(stage: Stage) -> None:
    members = stage.group(UDP, HOST, PORT, 1)
    single = stage.serve("single", TCP, "2001:db8:7::1", PORT, reuseport=True)
    client = stage.bind(UDP, OTHER, 0)
    client.sendto(bytes(100), (HOST, PORT))
    shares = CpuShares()
    with Groups() as groups:
        seen = groups.members()
        documents = group_documents(seen, owners(one.inode for one in seen), shares.of([os.getpid()]))
    alone, pair = documents
    assert (alone["protocol"], alone["address"], alone["port"]) == ("tcp", "2001:db8:7::1", PORT)
    assert (alone["program"], alone["classic"], alone["size"], alone["room"]) == (None, False, 1, 128)
    assert [(one["cookie"], one["state"]) for one in alone["members"]] == [(cookie_of(single), "LISTEN")]
    assert (pair["protocol"], pair["address"], pair["group"]) == ("udp", HOST, cookie_of(members[0]))
    assert pair["program"] == seen[-1].program is not None
    assert [one["index"] for one in pair["members"]] == [0, 1]
    assert [one["cookie"] for one in pair["members"]] == [cookie_of(sock) for sock in members]
    assert pair["members"][0]["queue"] == 0 < pair["members"][1]["queue"]
    for one in pair["members"]:
        (process,) = one["processes"]
        assert (process["pid"], process["cpu_percent"]) == (os.getpid(), None)


def test_cpu_shares_are_of_the_time_since_the_last_look() -> None:
    shares = CpuShares()
    spinning = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with (
        subprocess.Popen(spinning, stdout=subprocess.PIPE) as busy,
        subprocess.Popen(["sleep", "60"]) as idle,
    ):
        try:
            assert busy.stdout is not None
            busy.stdout.readline()
            assert shares.of([busy.pid, idle.pid]) == {busy.pid: None, idle.pid: None}
            found: dict[int, float | None] = {}
            deadline = time.monotonic() + 10
            while not found.get(busy.pid) and time.monotonic() < deadline:
                time.sleep(0.2)
                found = shares.of([busy.pid, idle.pid])
            assert found[busy.pid]
            assert found[idle.pid] == 0
        finally:
            busy.kill()
            idle.kill()
    assert shares.of([busy.pid]) == {}
