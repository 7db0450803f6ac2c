"""The example collector under `fastrecv run`, given the exports of Debian's softflowd: every flow is counted once.

softflowd sends its templates first, and then not for long: a worker that takes over has to have got them otherwise.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest

from fastrecv.netns import Namespace
from tests.kernel.exporting import captured, softflowd
from tests.kernel.supervising import ADDRESS, PORT, Service, namespace, until

if TYPE_CHECKING:
    from tests.kernel.cable import Cable

EXAMPLE = Path(__file__).parents[2] / "examples" / "collector"
FLOWS = 248  # of an exporter
OCTETS = 32  # of a flow, which is one packet: IPv4 and UDP headers, and 4 bytes
NETFLOW5, NETFLOW9, IPFIX = 5, 9, 10
COLLECTORS = """
import sys
sys.path.insert(0, {example!r})
from collector import Collector

class Forgetful(Collector):
    snapshot = restore = None
"""


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture
def folder(ns: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepared(tmp_path, monkeypatch)


def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the services, and of what they write."""
    (tmp_path / "collectors.py").write_text(COLLECTORS.format(example=str(EXAMPLE)))
    (tmp_path / "written").mkdir()
    monkeypatch.setenv("FLOWS_FOLDER", str(tmp_path / "written"))
    monkeypatch.setenv("FLOWS_EVERY", "3600")
    return tmp_path


class Exports:
    """What an exporter of a version sends, from an address of its own; and where it goes."""

    def __init__(self, folder: Path, service: Service, version: int) -> None:
        capture = folder / f"capture{version}"
        capture.write_bytes(captured(("10.0.0.1", 10_000 + number) for number in range(FLOWS)))
        self.version, self.source = version, f"127.2.0.{version}"
        self.datagrams = softflowd(capture, version, FLOWS)
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

    def __init__(self, folder: Path, service: Service, version: int, cable: Cable) -> None:
        super().__init__(folder, service, version)
        self._client = cable.client()
        self.source = self._client.getsockname()[0]

    @contextlib.contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        yield self._client


def written(folder: Path) -> dict[tuple[str, int], dict[str, int]]:
    """The sums of all files, by exporter and version."""
    found: dict[tuple[str, int], dict[str, int]] = {}
    for path in (folder / "written").iterdir():
        assert path.suffix == ".parquet"
        for row in pq.read_table(path).to_pylist():
            assert row["since"] < row["until"]
            sums = found.setdefault((row["exporter"], row["version"]), {})
            for name in ("datagrams", "flows", "octets", "packets", "lost", "unknown", "malformed"):
                sums[name] = sums.get(name, 0) + row[name]
    return found


def whole(exports: Exports, times: int = 1, **other: int) -> dict[str, int]:
    """What is counted where nothing is lost."""
    return {
        "datagrams": times * len(exports.datagrams), "flows": times * FLOWS, "octets": times * FLOWS * OCTETS,
        "packets": times * FLOWS, "lost": 0, "unknown": 0, "malformed": 0,
    } | other  # fmt: skip


@pytest.mark.parametrize("handler", ["Collector", "Forgetful"])
def test_flows_go_on_being_decoded_after_a_kill_with_the_templates_of_before_and_not_without(
    handler: str, folder: Path
) -> None:
    with Service(folder, f"collectors:{handler}", "-w", 2) as service:
        service.begun(2)
        exporters = [Exports(folder, service, version) for version in (NETFLOW5, NETFLOW9, IPFIX)]
        slots = [exports.send(exports.datagrams[:3]) for exports in exporters]
        for slot in set(slots):
            os.kill(service.pids(2)[slot], signal.SIGKILL)
        service.begun(2 + len(set(slots)))
        assert slots == [exports.send(exports.datagrams[3:]) for exports in exporters]
        assert service.stop() == 0
    found = written(folder)
    for exports in exporters:
        sums = found[exports.source, exports.version]
        if handler == "Collector":
            assert sums == whole(exports)
        elif exports.version == NETFLOW5:
            assert (sums["flows"], sums["unknown"]) == (FLOWS - 3 * 29, 0)
        else:
            assert (sums["flows"], sums["unknown"]) == (0, len(exports.datagrams) - 3)


def test_a_rolling_restart_writes_every_flow_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWS_EVERY", "0.2")
    with Service(folder, "collectors:Collector", "-w", 2) as service:
        service.begun(2)
        exporters = [Exports(folder, service, version) for version in (NETFLOW9, IPFIX)]
        for exports in exporters:
            exports.send(exports.datagrams[:3])
        until(lambda: list((folder / "written").glob("*.parquet")), lambda: service.log)
        time.sleep(0.3)  # written while nothing came, so the snapshot is older than the file
        for exports in exporters:
            exports.send(exports.datagrams[3:5])
        service.send(signal.SIGHUP)
        service.says("all workers are new")
        for exports in exporters:
            exports.send(exports.datagrams[5:])
        assert service.stop() == 0
    found = written(folder)
    assert found == {(exports.source, exports.version): whole(exports) for exports in exporters}


@pytest.mark.needs("AF_XDP in copy mode")
def test_it_runs_on_af_xdp_with_one_changed_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.kernel.cable import NEAR, laid  # needs libxdp, which few tests do

    folder = prepared(tmp_path, monkeypatch)
    xdp = ("--backend", "xdp", "--policy", "queue")
    with laid(queues=2) as cable, cable.near, Service(
        folder, "collectors:Collector", "-w", 2, *xdp, bind=f"{NEAR}:{PORT}"
    ) as service:  # fmt: skip
        service.begun(2)
        cable.net.link("set", index=1, state="up")
        exporters = [Distant(folder, service, version, cable) for version in (NETFLOW5, NETFLOW9, IPFIX)]
        slots = [exports.send(exports.datagrams[:3]) for exports in exporters]
        service.send(signal.SIGHUP)
        service.says("all workers are new")
        assert slots == [exports.send(exports.datagrams[3:5]) for exports in exporters]
        for slot in set(slots):
            os.kill(service.pids(2)[slot], signal.SIGKILL)
        service.begun(4 + len(set(slots)))
        assert slots == [exports.send(exports.datagrams[5:]) for exports in exporters]
        rows = service.rows()[:2]
        assert rows["by_ring"].sum() > 0
        assert service.stop() == 0
    found = written(folder)
    assert found == {(exports.source, exports.version): whole(exports) for exports in exporters}


def test_losses_and_nonsense_are_counted(folder: Path) -> None:
    with Service(folder, "collectors:Collector", "-w", 2) as service:
        service.begun(2)
        exporters = [Exports(folder, service, version) for version in (NETFLOW5, NETFLOW9, IPFIX)]
        for exports in exporters:
            exports.send([*exports.datagrams[:2], exports.datagrams[3]])
            exports.send([exports.datagrams[4][:-1]])
        exporters[0].send([b"", b"\0", b"nonsense", bytes(2000)])
        assert service.stop() == 0
    found = written(folder)
    for exports, lost in zip(exporters, (29, 1, 32), strict=True):
        sums = found[exports.source, exports.version]
        assert (sums["datagrams"], sums["lost"], sums["malformed"], sums["unknown"]) == (4, lost, 1, 0)
    assert found[exporters[0].source, 0]["malformed"] == 4
