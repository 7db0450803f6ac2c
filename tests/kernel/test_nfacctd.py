"""Debian's nfacctd, unmodified, three of them on one port: whose templates are lost by hash, and none by source.

Flows come from Debian's softflowd. It sends its template once, before most of its data, and a collector that has not
got it discards the data. Exporters behind a NAT whose mappings expire change their port in between: here a relay in the
exporters' namespace stands in for that NAT, and sends every datagram of softflowd's on from a port of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from fastrecv.netns import Namespace
from tests.kernel.commands import Command
from tests.kernel.exporting import Flow, Nfacctd, captured, softflowd

COLLECTOR, PORT = "192.0.2.1", 2055
SERVICE = ("udp", COLLECTOR, PORT)
SITES = "198.51.100.0/24"
NETFLOW9, IPFIX = 9, 10
DATAGRAMS, FLOWS_EACH, FLOWS_FIRST = 8, 32, 24  # of an exporter; the first has the templates, too
FLOWS = FLOWS_FIRST + (DATAGRAMS - 1) * FLOWS_EACH
SEED = 3  # the exporters below are spread evenly
Balance = Callable[..., Any]


class Lab:
    """The collectors, in order of their start, in the namespace that the test runs in; the exporters' namespace."""

    def __init__(self, folder: Path, exporters: Namespace) -> None:
        self.folder, self.exporters = folder, exporters
        self.collectors: list[Nfacctd] = []
        self._observed = IPv4Address("10.0.0.0")  # whose flows were exported last

    def start(self) -> Nfacctd:
        started = Nfacctd(self.folder / f"nfacctd{len(self.collectors)}", COLLECTOR, PORT)
        self.collectors.append(started)
        wait_for(lambda: started.ready)
        return started

    def export(self, exporters: Iterable[str], change_ports: bool) -> set[Flow]:
        """Let softflowd export from each of these addresses as many flows as FLOWS says, none seen before."""
        flows: set[Flow] = set()
        for exporter, version in zip(exporters, itertools.cycle((NETFLOW9, IPFIX)), strict=False):
            self._observed += 1
            mine = [Flow(exporter, str(self._observed), 10_000 + number) for number in range(FLOWS)]
            capture = self.folder / "capture"
            capture.write_bytes(captured((flow.source, flow.port) for flow in mine))
            with self.exporters:
                datagrams = softflowd(capture, version, FLOWS)
                assert len(datagrams) == DATAGRAMS
                relay(exporter, datagrams, change_ports)
            flows.update(mine)
        return flows

    def settled(self, flows: set[Flow]) -> tuple[list[Counter[Flow]], int]:
        """What each collector has decoded of these flows, and all have discarded, when every flow is accounted for."""

        def found() -> tuple[list[Counter[Flow]], int]:
            return [one.decoded(flows) for one in self.collectors], sum(one.discarded(flows) for one in self.collectors)

        def accounted() -> bool:
            decoded, discarded = found()
            return sum(map(Counter.total, decoded)) + FLOWS_EACH * discarded >= len(flows)

        wait_for(accounted)
        return found()


def relay(exporter: str, datagrams: list[bytes], change_ports: bool) -> None:
    """Send them on from the exporter's address, unchanged: from one port, or each from another."""
    with contextlib.ExitStack() as stack:
        far: socket.socket | None = None
        for datagram in datagrams:
            if far is None or change_ports:  # all stay open: no port comes twice
                far = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                far.bind((exporter, 0))
            far.sendto(datagram, (COLLECTOR, PORT))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with (
        contextlib.closing(Namespace()) as collecting,
        contextlib.closing(Namespace()) as exporting,
        collecting,
        IPRoute() as net,
    ):
        net.link("add", ifname="collectors", kind="veth", peer={"ifname": "exporters", "net_ns_fd": exporting.fd})
        up(net, "collectors", COLLECTOR)
        net.route("add", dst=SITES, oif=net.link_lookup(ifname="collectors")[0])
        with exporting, IPRoute() as far:
            up(far, "exporters", "192.0.2.2")
            here = {"type": "local", "table": 255, "scope": 254}  # ip-route(8): local, table local
            far.route("add", dst=SITES, oif=1, **here)
        made = Lab(tmp_path, exporting)
        try:
            for _ in range(3):
                made.start()
            yield made
        finally:
            for collector in made.collectors:
                if collector.process.returncode is None:
                    collector.kill()


def up(net: IPRoute, device: str, address: str) -> None:
    (index,) = net.link_lookup(ifname=device)
    net.addr("add", index=index, address=address, prefixlen=24)
    for number in (1, index):
        net.link("set", index=number, state="up")


@pytest.fixture
def balance(bpffs: Path, capsys: pytest.CaptureFixture[str]) -> Balance:
    """`fastrecv balance`, which must succeed; what it says, parsed where it is JSON."""
    command = Command(bpffs, capsys)

    def done(*words: object) -> Any:
        said = command.bare("balance", *words, "--bpffs", bpffs)
        assert said.err == ""
        assert said.code == 0
        return said.json if "--json" in words else said.out

    return done


def test_templates_are_lost_by_the_kernels_hash_when_exporters_change_ports(lab: Lab) -> None:
    kept = lab.export(sites(1, 6), change_ports=False)
    decoded, discarded = lab.settled(kept)
    assert sum(decoded, Counter()) == Counter(kept)
    assert discarded == 0, "from one port templates and data come to one collector"

    # Each of 6 x 7 data sets meets the collector that its templates went to one time in three: 3**-42 that all do.
    changing = lab.export(sites(11, 6), change_ports=True)
    decoded, discarded = lab.settled(changing)
    assert discarded > 0
    assert sum(decoded, Counter()).total() == len(changing) - FLOWS_EACH * discarded
    assert max(sum(decoded, Counter()).values()) == 1


def test_every_flow_is_decoded_when_running_collectors_are_balanced_by_source(lab: Lab, balance: Balance) -> None:
    balance("create", "flows", "--policy", "source", "--size", 3, "--seed", SEED)
    balance("attach", "flows", lab.collectors[0].pid_file, *SERVICE)
    for slot, collector in enumerate(lab.collectors):
        balance("register-pid", "flows", slot, collector.pid_file, *SERVICE)
    exporters = sites(21, 12)
    takers = {exporter: balance("explain", "flows", exporter, "--json")["taker"] for exporter in exporters}
    shares = Counter(takers.values())
    assert set(shares) == {0, 1, 2}

    assert_decoded(lab, lab.export(exporters, change_ports=True), takers)
    slots = balance("status", "flows", "--json")["slots"]
    assert [(slot["pids"], slot["selected"]) for slot in slots] == [
        ([collector.process.pid], DATAGRAMS * shares[number]) for number, collector in enumerate(lab.collectors)
    ]

    lab.collectors[1].kill()
    slots = balance("status", "flows", "--json")["slots"]
    assert [(slot["state"], slot["pids"] != []) for slot in slots] == [
        ("active", True), ("empty", False), ("active", True)]  # fmt: skip
    flows = lab.export(exporters, change_ports=True)
    orphans = {flow for flow in flows if takers[flow.exporter] == 1}
    assert_decoded(lab, flows - orphans, takers)
    assert balance("status", "flows", "--json")["slots"][1]["empty"] == DATAGRAMS * shares[1]
    assert not any(collector.decoded(orphans) for collector in lab.collectors)

    started = lab.start()
    balance("register-pid", "flows", 1, started.pid_file, *SERVICE)
    takers = {exporter: 3 if slot == 1 else slot for exporter, slot in takers.items()}
    assert_decoded(lab, lab.export(exporters, change_ports=True), takers)
    again = balance("status", "flows", "--json")["slots"][1]
    assert (again["state"], again["pids"]) == ("active", [started.process.pid])


def sites(first: int, count: int) -> list[str]:
    return [f"198.51.100.{host}" for host in range(first, first + count)]


def assert_decoded(lab: Lab, flows: set[Flow], takers: dict[str, int]) -> None:
    """Each flow once, by the collector that takes its exporter, and nothing discarded."""
    decoded, discarded = lab.settled(flows)
    assert discarded == 0
    for number, found in enumerate(decoded):
        assert found == Counter(flow for flow in flows if takers[flow.exporter] == number)
