"""The receive bench: what is queued is what was sent, byte for byte, and every contender drains all of it."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from fastrecv import Receiver, sockets
from fastrecv.bench import decoders, receive, receive_results
from fastrecv.bench.decoders import NETFLOW, SENDERS, count_senders, netflow_totals, sum_netflow
from fastrecv.bench.floods import FIRST_SOURCE_PORT, FLOODS, Counter
from fastrecv.bench.lab import Lab, quick_grace_periods
from fastrecv.bench.prefill import Injection, Traffic, Trains, pattern
from fastrecv.bench.receive import drain
from fastrecv.bench.receive_groups import GROUPS, Group
from fastrecv.bench.receivers import Contender, missing

pytestmark = pytest.mark.alone  # expedites RCU on the whole host

BENCH = [sys.executable, "-m", "fastrecv.bench", "receive"]
CHECKSUMS = {"udp4": ("snmp", "Udp", "InCsumErrors"), "udp6": ("snmp6", "", "Udp6InCsumErrors")}


@pytest.fixture
def lab() -> Iterator[Lab]:
    with quick_grace_periods(), Lab() as opened:
        yield opened


def everything(sock: socket.socket) -> list[tuple[bytes, tuple[str, int]]]:
    found = []
    while True:
        try:
            found.append(sock.recvfrom(65535, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return found


@pytest.mark.parametrize("flood", ["udp4", "udp6"])
@pytest.mark.parametrize("size", [0, 1, 128, 1400])
def test_injected_datagrams_arrive_byte_for_byte_and_are_counted(lab: Lab, flood: str, size: int) -> None:
    payload, sources, count = pattern(size), 300, 1000
    with (
        Injection(lab, payload, sources, flood) as traffic,
        Counter(lab, CHECKSUMS[flood]) as wrong,
        closing(traffic.open(count)) as sock,
    ):
        assert traffic.fill(sock, count) == count
        found = everything(sock)
        assert wrong.read() == 0
        assert sockets.drops(sock) == 0
    assert len(found) == count
    assert {data for data, _ in found} == {payload}
    assert [(source[0], source[1] - FIRST_SOURCE_PORT) for _, source in found] == [
        (FLOODS[flood].source, index % sources) for index in range(count)
    ]


def test_twenty_thousand_large_frames_all_queue(lab: Lab) -> None:
    with Injection(lab, pattern(1400), 1000) as traffic, closing(traffic.open(20_000)) as sock:
        assert traffic.fill(sock, 20_000) == 20_000
        assert sockets.drops(sock) == 0
        assert len(everything(sock)) == 20_000


def test_a_full_queue_is_told(lab: Lab) -> None:
    receiver = next(one for one in GROUPS["payload-128"].contenders if one.name == "receiver")

    class Narrow(Injection):
        def open(self, datagrams: int) -> socket.socket:
            return super().open(datagrams // 10)

    with Narrow(lab, pattern(128), 1000) as traffic:
        done = drain(receiver, traffic, 1000)
    assert done.dropped > 0
    assert done.drained + done.dropped == done.sent


@pytest.mark.parametrize("size", [128, 1400])
@pytest.mark.parametrize("gro", [False, True])
def test_trains_arrive_byte_for_byte(lab: Lab, size: int, gro: bool) -> None:
    random = np.random.default_rng(size)
    payloads = [random.bytes(size) for _ in range(3000)]
    with Trains(lab, b"") as traffic, closing(traffic.open(3000)) as sock, Receiver(sock, gro=gro) as receiver:
        assert traffic.send(sock, payloads) == 3000
        found, calls = [], 0
        while batch := receiver.recv(0):
            found += [data for data, _ in batch.datagrams()]
            calls += 1
    assert found == payloads
    assert (calls < 10) is gro  # trains came whole


@pytest.mark.parametrize(
    ("group", "contender"),
    [(group, contender) for group in GROUPS.values() for contender in group.contenders],
    ids=lambda value: value.name,
)
def test_every_contender_drains_exactly_what_was_sent(lab: Lab, group: Group, contender: Contender) -> None:
    if library := missing(contender):
        pytest.skip(f"{library} is not installed")
    with group.traffic(lab) as traffic:
        done = drain(contender, traffic, 700)
    assert (done.sent, done.drained, done.dropped) == (700, 700, 0)
    assert done.ns > 0


def test_a_contender_that_loses_one_fails_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = receive.drain

    def losing(contender: Contender, traffic: Traffic, datagrams: int) -> receive.Drain:
        done = honest(contender, traffic, datagrams)
        lost = contender.name == "recvfrom"
        return receive.Drain(done.ns, done.sent, done.drained - lost, done.dropped)

    monkeypatch.setattr(receive, "drain", losing)
    plan = receive.Plan(groups=["gro-128"], rounds=3, datagrams=100, seed=1, cpu=max(os.sched_getaffinity(0)))
    ((group, gate),) = receive.run(plan, lambda _: None).failed_gates
    assert group.name == "gro-128"
    assert gate.detail == "round 1, recvfrom: 100 datagrams sent, 99 drained"
    assert group.row("recvfrom").ns == []
    assert [gate.name for gate in group.gates if gate.passed] == ["same bytes"]


def test_a_train_that_comes_out_different_fails_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trains, "send", lambda self, sock, payloads: self.fill(sock, len(payloads)))
    plan = receive.Plan(groups=["gro-128"], rounds=1, datagrams=100, seed=1, cpu=max(os.sched_getaffinity(0)))
    ((_, gate),) = receive.run(plan, lambda _: None).failed_gates
    assert gate.detail == "3,000 datagrams sent, 3,000 received that are not the same, gro=True"


def test_both_ways_to_decode_give_the_same(lab: Lab) -> None:
    with Injection(lab, NETFLOW.payload, 10) as traffic, closing(traffic.open(200)) as sock:
        traffic.fill(sock, 200)
        datagrams = everything(sock)
        traffic.fill(sock, 200)
        with Receiver(sock, batch_size=200) as receiver:
            batch = receiver.recv(0)
            assert netflow_totals(datagrams) == sum_netflow([batch]) == (200 * 30 * 7, 200 * 30 * 9000)
            keys, counts = count_senders([batch])
            assert counts.tolist() == [20] * 10
            address = int.from_bytes(socket.inet_aton(FLOODS["udp4"].source))
            assert keys.tolist() == [address << 16 | FIRST_SOURCE_PORT + index for index in range(10)]


def test_a_decoder_that_misreads_is_found_out() -> None:
    for task in (NETFLOW, SENDERS):
        assert {way.work([(task.payload, ("192.0.2.2", 1))] * 5) for way in task.each} == {5}
    version9 = b"\0\x09" + NETFLOW.payload[2:]
    assert {way.work([(version9, ("192.0.2.2", 1))] * 5) for way in NETFLOW.each[:2]} == {0}
    assert len(decoders.contenders(NETFLOW)) == 10


def test_a_tiny_run_through_the_command_line(tmp_path: Path) -> None:
    kept, plot = tmp_path / "out.json", tmp_path / "out.svg"
    done = subprocess.run(
        [*BENCH, "--datagrams", "500", "--rounds", "2", "--group", "payload-128", "--json", str(kept), "--plot",
         str(plot)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = receive_results.load(kept)
    (group,) = result.groups
    due = {contender.title: contender for contender in GROUPS["payload-128"].contenders}
    assert {row.title for row in group.rows} | set(group.missing) == set(due)
    for row in group.rows:
        assert row.sent == row.drained == [500, 500]
        assert len(row.ns) == 2
        assert row.title in done.stdout
    assert [sorted(order) for order in group.order] == [list(range(len(group.rows)))] * 2
    assert not result.failed_gates
    assert plot.read_text().startswith("<?xml")
    assert "Traceback" not in done.stderr


def test_a_missing_library_leaves_its_contenders_out(monkeypatch: pytest.MonkeyPatch) -> None:
    present = importlib.import_module

    def absent(name: str, package: str | None = None) -> object:
        if name == "uvloop":
            raise ModuleNotFoundError("No module named 'uvloop'", name="uvloop")
        return present(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    plan = receive.Plan(groups=["payload-0"], rounds=1, datagrams=100, seed=1, cpu=max(os.sched_getaffinity(0)))
    (group,) = receive.run(plan, lambda _: None).groups
    assert group.missing == {"uvloop": "uvloop", "adapter on uvloop": "uvloop"}
    assert {"uvloop", "adapter-uvloop"}.isdisjoint(row.name for row in group.rows)


def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run([*BENCH, "--group", "sockmap"], capture_output=True, text=True, timeout=120, check=False,
                          env={**os.environ, "PATH": str(tmp_path)})  # fmt: skip
    assert done.returncode == 77
    assert "the C loop to compare with not available: no cc in PATH" in done.stderr


@pytest.mark.usefixtures("lab")
def test_beside_another_bench_it_refuses() -> None:
    done = subprocess.run([*BENCH, "--group", "sockmap"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "another fastrecv bench is running" in done.stderr
