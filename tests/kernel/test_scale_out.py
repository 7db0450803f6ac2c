"""All that can befall hosts, engine and consumers, in a few seconds: what was acknowledged is at a consumer, once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from fastrecv import Receiver
from fastrecv.bench.cli import main
from fastrecv.bench.numbered import NUMBERED
from fastrecv.bench.scale_out import processes
from fastrecv.bench.scale_out.addresses import COLLECTOR, PORT
from fastrecv.bench.scale_out.bed import Bed, Policy
from fastrecv.bench.scale_out.cli import command
from fastrecv.bench.scale_out.exporters import DATAGRAM, Exporters, numbered
from fastrecv.bench.scale_out.processes import alive, tree
from fastrecv.bench.survive_service import until
from fastrecv.sockets import grow_receive_buffer, open_datagram
from tests.programs import program

SMALL = ["--hosts", "2", "--exporters", "100", "--rate", "6000", "--seconds", "4"]


@pytest.fixture(autouse=True)
def nats_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the path, also where it is unpacked only."""
    folder = Path(program("nats-server", "nats-server")).parent
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{folder}")


def test_nothing_that_was_acknowledged_is_lost_whatever_is_killed() -> None:
    result = CliRunner().invoke(command, [*SMALL, "--json", "-"])
    assert result.exit_code == 0, result.output
    kept = json.loads(result.stdout)
    run, account = kept["run"], kept["run"]["account"]
    assert run["faults"] == []
    assert run["done"] == {
        "worker killed": 2, "engine node killed": 1, "engine node back": 1, "host killed": 1, "host back": 1,
        "consumer killed and restarted": 2, "host added": 1, "host taken away": 1,
    }  # fmt: skip
    assert account["nowhere"] == account["after"] == account["twice"] == account["strangers"] == 0
    assert account["deliveries"]["astray"] == 0
    assert account["sent"] == account["arrived"] > 24_000
    assert account["queued"] == account["kept"] + account["destroyed"] + account["in_hands"] - account["saved"]
    assert sum(host["refused"] for host in account["hosts"]) > 0  # until the router knew of the killed host
    changes = [step["what"].split()[-1] for step in run["moves"]["steps"]]
    assert changes == ["share", "killed", "back", "added", "away"]
    assert run["moves"]["spread"] == run["moves"]["unseen"] == 0
    assert [one["hosts"] for one in run["throughput"]] == [1, 2]
    assert all(one["records"] > 0 and one["messages"] > 0 for one in run["throughput"])
    assert run["held"]["pending"] == run["held"]["unacknowledged"] == 0


@pytest.mark.parametrize("policy", [0, 1])
def test_by_addresses_an_exporter_has_one_host_and_by_ports_it_has_several(policy: Policy) -> None:
    """Each goes on from another port after every eight datagrams."""
    with contextlib.ExitStack() as stack:
        bed = stack.enter_context(Bed(policy))
        socks = [stack.enter_context(_listening(bed, bed.add_host())) for _ in range(3)]
        bed.route([1, 2, 3])
        with Exporters(bed.exporters, 100) as source:
            source.allow(2000)
            until(lambda: source.sent == 2000, lambda: f"{source.sent} sent")
            assert source.stop() == 2000
        assert sum(map(bed.arrived, bed.hosts)) == 2000
        at = [set(rows["sender"].tolist()) for rows in map(_received, socks)]
        assert all(at)
        places = sum(map(len, at))
        assert places == 100 if policy == 0 else places > 150
        before = [bed.arrived(number) for number in bed.hosts]
        bed.route([2])
        with Exporters(bed.exporters, 100) as source:
            source.allow(500)
            until(lambda: source.sent == 500, lambda: f"{source.sent} sent")
        assert [bed.arrived(number) for number in bed.hosts] == [before[0], before[1] + 500, before[2]]


def _listening(bed: Bed, number: int) -> socket.socket:
    with bed.hosts[number]:
        sock = open_datagram((COLLECTOR, PORT))
    grow_receive_buffer(sock, 16 << 20)
    return sock


def _received(sock: socket.socket) -> NDArray[np.void]:
    """The records of all that is in its queue."""
    found = [np.zeros(0, NUMBERED)]
    with Receiver(sock, batch_size=1024) as receiver:
        while len(batch := receiver.recv_nowait()):
            found.append(numbered(batch.records(DATAGRAM)))
    return np.concatenate(found)


def test_without_the_engine_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(processes, "SBIN", str(tmp_path))
    assert main(["scale-out"]) == 77
    assert capsys.readouterr().err == (
        "fastrecv.bench: the test bed not available: install it (Debian: nats-server) (needs nats-server)\n"
    )


@pytest.mark.proof
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_bench_that_is_ended_leaves_no_process(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "fastrecv.bench", "scale-out", *SMALL], stderr=subprocess.PIPE, text=True
    ) as bench:
        assert bench.stderr is not None
        until(
            lambda: "2 of the hosts" in (bench.stderr.readline() if bench.stderr else ""), lambda: "it does not begin"
        )
        started = tree(bench.pid)
        assert len(started) > 10
        bench.send_signal(number)
    until(lambda: not any(map(alive, started)), lambda: f"left: {[*filter(alive, started)]}", 40)
