"""`fastrecv collect`, given the exports of Debian's softflowd and pmacctd: every flow once, as nfacctd has it, too.

softflowd sends its templates first, and then not for long: a worker that takes over has to have got them otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow.parquet as pq
import pytest

from fastrecv.collector.settings import VARIABLE, CollectorSettings
from fastrecv.netns import Namespace
from tests.kernel.exporting import Nfacctd, captured, nfprobe, softflowd
from tests.kernel.supervising import ADDRESS, PORT, Service, namespace, until
from tests.unit.flow_datagrams import Taken

if TYPE_CHECKING:
    from tests.kernel.cable import Cable

FLOWS = 248  # of an exporter
OCTETS = 32  # of a flow, which is one packet: IPv4 and UDP headers, and 4 bytes
NETFLOW5, NETFLOW9, IPFIX = 5, 9, 10
FORGETFUL = """
from fastrecv.collector.handler import Collector

class Forgetful(Collector):
    snapshot = restore = None
"""


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture
def folder(ns: Namespace, tmp_path: Path) -> Path:
    return tmp_path


class Collecting(Service):
    """The collector with two workers, which writes lines of JSON at once; or the handler that is named."""

    def __init__(
        self, folder: Path, handler: str | None = None, *options: object, bind: str = f"{ADDRESS}:{PORT}"
    ) -> None:
        given = CollectorSettings(
            sink=f"jsonl:{folder}/flows", exporters=f"jsonl:{folder}/exporters", window=3600, flush=0.02
        )
        if handler is None:
            words = ["--sink", given.sink, "--exporters", given.exporters, "--window", 3600, "--flush", 0.02, *options]
            super().__init__(folder, None, "-w", 2, *words, bind=bind)
        else:
            environment = {VARIABLE: json.dumps({name: getattr(given, name) for name in given.__struct_fields__})}
            super().__init__(folder, handler, "-w", 2, environment=environment, bind=bind)

    def flows(self) -> list[dict[str, Any]]:
        return lines(self.folder / "flows")

    def exporters(self) -> dict[tuple[str, int], Counter[str]]:
        """The sums of all windows, by exporter and version."""
        found: dict[tuple[str, int], Counter[str]] = {}
        for row in lines(self.folder / "exporters"):
            assert row.pop("since") < row.pop("until")
            sums = found.setdefault((row.pop("exporterAddress"), row.pop("exportProtocolVersion")), Counter())
            row.pop("observationDomainId")
            sums.update(row)
        return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Exports:
    """What an exporter sends, from an address of its own; and where it goes."""

    def __init__(self, service: Service, version: int, datagrams: list[bytes]) -> None:
        self.version, self.source, self.datagrams = version, f"127.2.0.{version}", datagrams
        self._service = service

    @contextlib.contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((self.source, 0))
            sock.connect((ADDRESS, PORT))
            yield sock

    def send(self, datagrams: list[bytes]) -> int:
        """Which slot has got them; all are handled."""
        before = self._service.rows()["handled"][:2].astype(int)
        with self._connected() as sock:
            for datagram in datagrams:
                sock.send(datagram)

        def handled() -> list[int]:
            return [int(count) for count in self._service.rows()["handled"][:2].astype(int) - before]

        until(lambda: sum(handled()) == len(datagrams), lambda: f"{handled()}\n{self._service.log}")
        slot = handled().index(len(datagrams))
        assert handled()[1 - slot] == 0
        return slot


class Distant(Exports):
    """From the far end of a cable, always by the same socket, which the kernel gives one of its queues."""

    def __init__(self, client: socket.socket, service: Service, version: int, datagrams: list[bytes]) -> None:
        super().__init__(service, version, datagrams)
        self._client = client
        self.source = client.getsockname()[0]

    @contextlib.contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        yield self._client


def exported(folder: Path, service: Service, *versions: int, cable: Cable | None = None) -> list[Exports]:
    """What softflowd exports of a capture, in these versions; from the far end of the cable, where there is one."""
    found: list[Exports] = []
    for version in versions:
        capture = folder / f"capture{version}"
        capture.write_bytes(captured(("10.0.0.1", 10_000 + number) for number in range(FLOWS)))
        datagrams = softflowd(capture, version, FLOWS)
        if cable is None:
            found.append(Exports(service, version, datagrams))
        else:
            found.append(Distant(cable.client(), service, version, datagrams))
    return found


def whole(exports: Exports) -> Counter[str]:
    """What is counted where nothing is lost."""
    options = int(exports.version != NETFLOW5)  # softflowd sends one record of them
    return Counter(datagrams=len(exports.datagrams), flows=FLOWS, octets=FLOWS * OCTETS, packets=FLOWS, options=options)


def by_flow(rows: Iterable[dict[str, Any]], *names: str) -> Counter[tuple[Any, ...]]:
    """Octets by these columns, the last of which has them."""
    found: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        found[tuple(row[name] for name in names[:-1])] += row[names[-1]]
    return found


@pytest.mark.parametrize("handler", [None, "forgetful:Forgetful"])
def test_flows_go_on_being_decoded_after_a_kill_with_the_templates_of_before_and_not_without(
    handler: str | None, folder: Path
) -> None:
    (folder / "forgetful.py").write_text(FORGETFUL)
    with Collecting(folder, handler) as service:
        service.begun(2)
        exporters = exported(folder, service, NETFLOW5, NETFLOW9, IPFIX)
        slots = [exports.send(exports.datagrams[:3]) for exports in exporters]
        until(lambda: len(service.flows()) == 3 * 29 + 24 + 32 + 32 + 24 + 32 + 32, lambda: str(len(service.flows())))
        for slot in set(slots):
            os.kill(service.pids(2)[slot], signal.SIGKILL)
        service.begun(2 + len(set(slots)))
        assert slots == [exports.send(exports.datagrams[3:]) for exports in exporters]
        assert service.stop() == 0
    found = service.exporters()
    written = by_flow(service.flows(), "exporterAddress", "sourceTransportPort", "packetDeltaCount")
    for exports in exporters:
        sums = found[exports.source, exports.version]
        if handler is None:
            assert sums == whole(exports)
            assert Counter({port: n for (source, port), n in written.items() if source == exports.source}) == Counter(
                range(10_000, 10_000 + FLOWS)
            )
        elif exports.version == NETFLOW5:
            assert (sums["flows"], sums["unknown"]) == (FLOWS - 3 * 29, 0)
        else:
            assert (sums["flows"], sums["unknown"]) == (0, len(exports.datagrams) - 3)


def test_a_rolling_restart_writes_every_flow_once_into_files_that_are_whole(folder: Path) -> None:
    files = folder / "files"
    with Collecting(folder, None, "--sink", f"parquet:{files}") as service:
        service.begun(2)
        exporters = exported(folder, service, NETFLOW9, IPFIX)
        for exports in exporters:
            exports.send(exports.datagrams[:4])
        service.send(signal.SIGHUP)
        service.says("all workers are new")
        for exports in exporters:
            exports.send(exports.datagrams[4:])
        assert service.stop() == 0
    assert service.exporters() == {(exports.source, exports.version): whole(exports) for exports in exporters}
    assert all(path.suffix == ".parquet" for path in files.iterdir())
    rows = [row for path in files.iterdir() for row in pq.read_table(path).to_pylist()]
    found = by_flow(rows, "exporterAddress", "exportProtocolVersion", "sourceTransportPort", "packetDeltaCount")
    assert found == Counter(
        (exports.source, exports.version, port) for exports in exporters for port in range(10_000, 10_000 + FLOWS)
    )
    query = "SELECT sourceIPv4Address, sum(octetDeltaCount) FROM read_parquet(?, union_by_name=true) GROUP BY 1"
    with contextlib.closing(duckdb.connect()) as connection:
        assert connection.execute(query, [f"{files}/*.parquet"]).fetchall() == [("10.0.0.1", 2 * FLOWS * OCTETS)]


@pytest.mark.needs("AF_XDP in copy mode")
def test_it_runs_on_af_xdp_with_one_changed_line(tmp_path: Path) -> None:
    from tests.kernel.cable import NEAR, laid  # needs libxdp, which few tests do

    xdp = ("--backend", "xdp", "--policy", "queue")
    with laid(queues=2) as cable, cable.near, Collecting(tmp_path, None, *xdp, bind=f"{NEAR}:{PORT}") as service:
        service.begun(2)
        cable.net.link("set", index=1, state="up")
        exporters = exported(tmp_path, service, NETFLOW5, NETFLOW9, IPFIX, cable=cable)
        slots = [exports.send(exports.datagrams[:3]) for exports in exporters]
        service.send(signal.SIGHUP)
        service.says("all workers are new")
        assert slots == [exports.send(exports.datagrams[3:5]) for exports in exporters]
        for slot in set(slots):
            os.kill(service.pids(2)[slot], signal.SIGKILL)
        service.begun(4 + len(set(slots)))
        assert slots == [exports.send(exports.datagrams[5:]) for exports in exporters]
        assert service.rows()[:2]["by_ring"].sum() > 0
        assert service.stop() == 0
    assert service.exporters() == {(exports.source, exports.version): whole(exports) for exports in exporters}


def test_losses_and_nonsense_are_counted(folder: Path) -> None:
    with Collecting(folder) as service:
        service.begun(2)
        exporters = exported(folder, service, NETFLOW5, NETFLOW9, IPFIX)
        for exports in exporters:
            exports.send([*exports.datagrams[:2], exports.datagrams[3]])
            exports.send([exports.datagrams[4][:-1]])
        exporters[0].send([b"", b"\0", b"nonsense", bytes(2000)])
        assert service.stop() == 0
    found = service.exporters()
    for exports, lost, kind in zip(exporters, (29, 1, 32), ("length", "set", "length"), strict=True):
        sums = found[exports.source, exports.version]
        assert (sums["datagrams"], sums["lost"], sums[f"malformed_{kind}"], sums["unknown"]) == (4, lost, 1, 0)
    nonsense = found[exporters[0].source, 0]
    assert (nonsense["malformed_header"], nonsense["malformed_version"], nonsense["datagrams"]) == (2, 2, 4)


def test_what_is_lost_of_softflowd_is_counted_to_the_flow(tmp_path: Path) -> None:
    capture = tmp_path / "capture"
    four = [("10.0.0.1", 10_000 + number) for number in range(60)]
    capture.write_bytes(captured([*four, *((f"2001:db8::{number:x}", 20_000) for number in range(1, 40))]))
    datagrams, flows = softflowd(capture, IPFIX, 99), list[int]()
    whole = Taken()
    for datagram in datagrams:
        flows.append(whole.take(datagram)["flows"] - sum(flows))
    assert (whole["lost"], whole["late"], len(set(flows)) > 2) == (0, 0, True)
    for place in range(1, len(datagrams) - 1):  # after the first and before the last, which nothing can miss
        left = Taken().take(*datagrams[:place], *datagrams[place + 1 :])
        assert (left["lost"], left["late"]) == (flows[place], 0)


def test_totals_are_those_of_nfacctd_for_softflowd_and_nfprobe_in_every_version(folder: Path) -> None:
    four = [("10.0.0.1", 10_000 + number) for number in range(60)]
    mixed = [*four, *((f"2001:db8::{number:x}", 20_000 + number) for number in range(1, 40))]
    captures = {}
    for version in (NETFLOW5, NETFLOW9, IPFIX):
        captures[version] = folder / f"capture{version}"
        captures[version].write_bytes(captured(four if version == NETFLOW5 else mixed))
    streams = {f"127.3.0.{version}": datagrams for version, datagrams in nfprobe(captures).items()}
    for version, capture in captures.items():
        streams[f"127.2.0.{version}"] = softflowd(capture, version, 60 if version == NETFLOW5 else 99)
    with Collecting(folder) as service, contextlib.ExitStack() as stack:
        reference = Nfacctd(folder / "nfacctd", ADDRESS, PORT + 1)
        stack.callback(reference.kill)
        service.begun(2)
        until(lambda: reference.ready, reference.log.read_text)
        for source, datagrams in streams.items():
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind((source, 0))
                for port in (PORT, PORT + 1):
                    for datagram in datagrams:
                        sock.sendto(datagram, (ADDRESS, port))
        expected = 2 * (len(four) + 2 * len(mixed))
        until(lambda: sum(row["packets"] for row in reference.rows()) == expected, lambda: str(len(reference.rows())))
        assert service.stop() == 0
    names = ("peer_ip_src", "ip_src", "ip_dst", "port_src", "port_dst", "ip_proto")
    rows = service.flows()
    for row in rows:
        row["ip_src"] = row.get("sourceIPv4Address") or row.get("sourceIPv6Address")
        row["ip_dst"] = row.get("destinationIPv4Address") or row.get("destinationIPv6Address")
        row["ip_proto"] = {17: "udp"}[row["protocolIdentifier"]]
        row["peer_ip_src"], row["port_src"] = row["exporterAddress"], row["sourceTransportPort"]
        row["port_dst"], row["bytes"] = row["destinationTransportPort"], row["octetDeltaCount"]
        row["packets"] = row["packetDeltaCount"]
    for counted in ("bytes", "packets"):
        found = by_flow(rows, *names, counted)
        assert found == by_flow(reference.rows(), *names, counted)
        assert len(found) == expected
    assert {(address, sums["lost"], sums["malformed_set"]) for (address, _), sums in service.exporters().items()} == {
        (address, 0, 0) for address in streams
    }


def test_flows_are_summed_up_by_keys_and_a_window_that_ends_by_itself_has_its_bounds(folder: Path) -> None:
    keys = "exporterAddress,sourceIPv4Address,destinationTransportPort"
    with Collecting(folder, None, "--aggregate", keys, "--window", 1) as service:
        service.begun(2)
        exporters = exported(folder, service, NETFLOW5, IPFIX)
        for exports in exporters:
            exports.send(exports.datagrams)
        until(lambda: sum(row["deltaFlowCount"] for row in service.flows()) == 2 * FLOWS, lambda: service.log)
        rows = service.flows()
        until(lambda: sum(sums["flows"] for sums in service.exporters().values()) == 2 * FLOWS, lambda: service.log)
        assert service.stop() == 0
    assert service.flows() == rows
    named = ("exporterAddress", "sourceIPv4Address", "destinationTransportPort", "octetDeltaCount")
    assert by_flow(rows, *named) == {(exports.source, "10.0.0.1", 53): FLOWS * OCTETS for exports in exporters}
    for row in rows:
        assert row["flowStartMilliseconds"].endswith(".000Z")
        assert row["flowStartMilliseconds"] < row["flowEndMilliseconds"]
    assert sum(row["packetDeltaCount"] for row in rows) == 2 * FLOWS
