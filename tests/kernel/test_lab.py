"""The lab: private, unreachable from it whatever is outside, and gone afterwards."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from fastrecv.bench.cli import bench
from fastrecv.bench.floods import FLOODS
from fastrecv.bench.lab import FAR_IP4, FAR_IP6, HOST_IP4, HOST_IP6, BenchBusyError, Lab, quick_grace_periods
from fastrecv.netns import Namespace

pytestmark = pytest.mark.alone  # expedites RCU on the whole host

RCU = Path("/sys/kernel/rcu_expedited")
DOCUMENTATION = [ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")]  # RFC 5737, RFC 3849


def test_a_namespace_is_entered_and_left_by_the_thread_that_asks() -> None:
    home = Path("/proc/thread-self/ns/net").readlink()
    namespace = Namespace()
    with namespace:
        assert Path("/proc/thread-self/ns/net").readlink().name == f"net:[{namespace.inode}]"
        with namespace:
            assert [name for _, name in socket.if_nameindex()] == ["lo"]
        assert Path("/proc/thread-self/ns/net").readlink() != home
    assert Path("/proc/thread-self/ns/net").readlink() == home
    namespace.close()
    namespace.close()


def test_the_lab_has_its_veth_and_no_way_out() -> None:
    with Lab() as lab:
        for namespace, name in ((lab.host, "host0"), (lab.far, "far0")):
            with namespace:
                assert {device for _, device in socket.if_nameindex()} == {"lo", name}
                for family, outside in ((socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8:ffff::1")):
                    with socket.socket(family, socket.SOCK_DGRAM) as sock:
                        assert sock.connect_ex((outside, 9)) in (errno.ENETUNREACH, errno.EADDRNOTAVAIL)
                assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == "0\n"


def test_the_source_takes_no_address_from_anybody() -> None:
    """Every address that can stand in a frame is a documentation address of the lab; no option names another."""
    with Lab() as lab:
        for flood in FLOODS.values():
            frame, *_ = flood.frame(lab)
            size = 4 if flood.family == socket.AF_INET else 16
            start = 14 + (12 if size == 4 else 8)
            for at in (start, start + size):
                address = ip_address(frame[at : at + size])
                assert any(address in network for network in DOCUMENTATION if network.version == address.version)
            assert frame[:12] == lab.host_mac + lab.far_mac
    names = {option for command in (bench, *bench.commands.values()) for parameter in command.params
             for option in parameter.opts}  # fmt: skip
    assert names == {
        "--flood", "--mode", "--program", "--entries", "--seconds", "--no-profile", "--sources", "--seed", "--cpu",
        "--json", "--report", "--plot", "first", "second", "file", "--group", "--rounds", "--datagrams", "--senders",
        "--compare", "--actions", "--workers", "--minutes", "--setups", "--rates", "--source-cpu",
        "--hosts", "--exporters", "--rate", "--policy", "--away",
    }  # fmt: skip


def test_a_failure_while_the_lab_is_set_up_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise RuntimeError(name)

    monkeypatch.setattr("fastrecv.bench.lab.packaged", refuse)
    with pytest.raises(RuntimeError, match="swallow"):
        Lab()


def test_grace_periods_are_put_back_and_one_bench_runs_at_a_time() -> None:
    before = RCU.read_text()
    with quick_grace_periods():
        assert RCU.read_text() == "1\n"
        with pytest.raises(BenchBusyError, match="another fastrecv bench"), quick_grace_periods():
            pass
    assert RCU.read_text() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_grace_periods_are_put_back_when_the_process_is_killed(number: signal.Signals) -> None:
    before = RCU.read_text()
    program = "import time; from fastrecv.bench.lab import quick_grace_periods\n" \
              "with quick_grace_periods(): print('ready', flush=True); time.sleep(60)"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert RCU.read_text() == "1\n"
        os.kill(child.pid, number)
    deadline = time.monotonic() + 10
    while RCU.read_text() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert RCU.read_text() == before


def test_the_flood_constants_are_of_the_lab() -> None:
    assert {flood.destination for flood in FLOODS.values()} == {HOST_IP4, HOST_IP6}
    assert {flood.source for flood in FLOODS.values()} == {FAR_IP4, FAR_IP6}
