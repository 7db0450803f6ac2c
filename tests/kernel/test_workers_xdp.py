"""`fastrecv run --backend xdp` on a veth of two queues: what comes by rings and by sockets, and what a kill costs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastrecv import XdpReceiver
from fastrecv.bench.numbered import NUMBERED
from fastrecv.bench.survive_recorder import FOLDER, HANDLER, HANG
from fastrecv.bpf import packaged
from fastrecv.cli.main import run
from fastrecv.interfaces import Interface
from fastrecv.redirect import Redirect
from fastrecv.workers.requests import Status, ask
from fastrecv.workers.status import Service as Standing
from tests.kernel.cable import NEAR, PORT, Cable, laid
from tests.kernel.commands import one_line
from tests.kernel.privileges import need_open_root
from tests.kernel.supervising import POWERLESS, Service, app, app_for_all, until
from tests.kernel.test_workers_cli import refused

pytestmark = pytest.mark.needs("AF_XDP in copy mode")

BIND = f"{NEAR}:{PORT}"
XDP = ("--backend", "xdp", "-w", 2, "--policy", "queue")
SENDERS = 16  # sockets: the kernel puts a flow into one of the veth's queues by its hash
ROUND = 0.003  # seconds between two datagrams of a sender


@pytest.fixture
def wide() -> Iterator[Cable]:
    """Of two queues; the test is in the near namespace."""
    with laid(queues=2) as made, made.near:
        yield made


class Senders:
    """Numbered datagrams from the far end, one of each sender in turn, until it is stopped; a context manager."""

    def __init__(self, cable: Cable) -> None:
        self._clients = [cable.client() for _ in range(SENDERS)]
        self.sent = 0  # by each
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send)

    def round(self) -> None:
        """One of each."""
        for number, client in enumerate(self._clients):
            client.send(np.array([(number, self.sent, 0)], NUMBERED).tobytes())
        self.sent += 1

    def go_on(self, rounds: int) -> None:
        """Wait until so many more are sent."""
        wanted = self.sent + rounds
        until(lambda: self.sent >= wanted, lambda: f"{self.sent} of {wanted} rounds are sent")

    def _send(self) -> None:
        while not self._stop.wait(ROUND):
            self.round()

    def __enter__(self) -> Senders:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[Service]:
    """A service of two recorders that has begun, whose sockets have room."""
    room = ("--receive-buffer", 16 << 20)
    with Service(folder, HANDLER, *XDP, *room, bind=BIND, environment={FOLDER: str(folder)}) as service:
        service.begun(2)
        yield service


def standing(service: Service) -> Standing:
    return ask(service.folder / f"{PORT}.sock", Status())


def handled(service: Service, datagrams: int) -> None:
    """Wait until so many are."""
    until(lambda: int(service.rows()["handled"].sum()) >= datagrams, lambda: f"{service.rows()[:2]}\n{service.log}")


def in_order(service: Service) -> dict[tuple[int, int], int]:
    """How often each (sender, number) was recorded; the numbers of a sender rise, and are all of one slot."""
    slots, owners, last = service.slots(), dict[int, int](), dict[int, int]()
    for pid, rows in sorted(service.by_process().items(), key=lambda found: list(slots).index(found[0])):
        for sender, number, _ in rows.tolist():
            assert owners.setdefault(sender, slots[pid]) == slots[pid]
            assert number > last.get(sender, -1)
            last[sender] = number
    assert set(owners.values()) == {0, 1}
    rows, _ = service.recorded()
    keys, times = np.unique(rows[["sender", "number"]], return_counts=True)
    return {(int(key["sender"]), int(key["number"])): int(count) for key, count in zip(keys, times, strict=True)}


def test_restarts_lose_nothing_and_each_sender_stays_with_his_worker(wide: Cable, tmp_path: Path) -> None:
    with recorded(tmp_path) as service:
        with Senders(wide) as senders:
            for turn in (1, 2):
                senders.go_on(50)
                service.send(signal.SIGHUP)
                service.says("all workers are new", turn)
            senders.go_on(50)
        handled(service, senders.sent * SENDERS)
        state = standing(service)
        assert (state.interface, state.chooser, state.in_rings) == ("near0, in copy mode", "classic", 0)
        by_ring = int(service.rows()["by_ring"].sum())
        assert service.stop() == 0
    assert in_order(service) == {(one, n): 1 for one in range(SENDERS) for n in range(senders.sent)}
    assert state.total.handled == senders.sent * SENDERS
    assert state.total.kernel_drops == 0
    assert 0 < by_ring < state.total.handled  # some came by sockets, while nobody had the rings
    assert " lost " not in service.log


def test_a_kill_costs_what_was_in_the_rings_and_what_comes_later_arrives(wide: Cable, tmp_path: Path) -> None:
    with recorded(tmp_path) as service:
        senders = Senders(wide)
        senders.round()
        handled(service, SENDERS)
        (tmp_path / HANG).touch()
        senders.round()
        until(lambda: not (tmp_path / HANG).exists(), lambda: service.log)  # a worker has a batch and hangs
        for _ in range(9):
            senders.round()
        until(lambda: int(service.rows()["datagrams"][:2].max()) >= 11, lambda: f"{service.rows()[:2]}")
        rows = service.rows()[:2]
        slot = int(np.argmax(rows["datagrams"] - rows["handled"]))
        other = 1 - slot
        until(lambda: int(service.rows()["handled"][other]) % 11 == 0, lambda: f"{service.rows()[:2]}")
        before = standing(service)
        in_hands = before.workers[slot].datagrams - before.workers[slot].handled
        assert in_hands > 0
        assert before.in_rings > 0
        os.kill(service.pids(2)[slot], signal.SIGKILL)
        service.says(rf"worker {slot} \[\d+\] has died")
        for _ in range(20):
            senders.round()  # to the socket, until the next worker has its ring
        service.begun(3)
        for _ in range(20):
            senders.round()
        missing = in_hands + before.in_rings
        handled(service, senders.sent * SENDERS - missing)
        after = standing(service)
        assert (after.total.killed, after.in_rings) == (in_hands, before.in_rings)
        assert service.stop() == 0
    found = in_order(service)
    assert set(found.values()) == {1}
    lost = {(one, n) for one in range(SENDERS) for n in range(senders.sent)} - found.keys()
    assert len(lost) == missing
    assert all(1 <= number <= 10 for _, number in lost)
    assert f"{before.in_rings} datagrams are lost that were in rings of workers that died" in service.log


def test_what_a_killed_worker_has_received_is_not_counted_as_lost_in_its_rings(wide: Cable, tmp_path: Path) -> None:
    """Though it never had an empty batch, on which all is counted anew."""
    (tmp_path / "brief.py").write_text("import time\ndef handle(batch):\n    time.sleep(0.001)\n")
    with Service(tmp_path, "brief:handle", *XDP, "--receive-buffer", 16 << 20, bind=BIND) as service:
        service.begun(2)
        senders = Senders(wide)
        for kill in range(4):
            for _ in range(200):
                senders.round()
            os.kill(service.pids(2)[kill % 2], signal.SIGKILL)
            service.begun(3 + kill)

        counted = -1
        while (state := standing(service)).total.handled != counted:
            counted = state.total.handled
            time.sleep(0.1)
        missing = senders.sent * SENDERS - state.total.handled - state.total.killed - state.total.kernel_drops
        assert missing == state.in_rings
        assert service.stop() == 0


def test_a_service_outlives_its_interface_by_its_sockets(wide: Cable, tmp_path: Path) -> None:
    wide.net.link("set", index=1, state="up")
    app(tmp_path)
    with Service(tmp_path, "app:handle", *XDP, bind=BIND) as service:
        service.begun(2)
        before = service.pids(2)
        for client in [wide.client() for _ in range(SENDERS)]:
            client.send(b"by cable")
        by_cable = ["by cable"] * SENDERS
        service.noted(*by_cable)
        assert all(service.rows()["handled"][:2])  # they have opened their rings, if they could
        wide.net.link("del", index=wide.index)
        service.says("the interface near0 is gone: .*: datagrams come by sockets alone until", 2)
        wide.net.addr("add", index=1, address=NEAR, prefixlen=32)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"by loopback", (NEAR, PORT))
            service.noted(*by_cable, "by loopback")
            assert service.pids(2) == before
            service.send(signal.SIGHUP)
            service.says("all workers are new")
            service.says("no interface 'near0' here: choose from lo: datagrams come by sockets alone", 2)
            sock.sendto(b"by loopback, too", (NEAR, PORT))
            service.noted(*by_cable, "by loopback", "by loopback, too")
        assert service.stop() == 0
        assert "Traceback" not in service.log


@pytest.mark.proof
def test_kills_and_restarts_under_load_account_for_every_datagram(wide: Cable, tmp_path: Path) -> None:
    kills = 40
    with recorded(tmp_path) as service:
        begun = 2
        with Senders(wide) as senders:
            for turn in range(kills):
                senders.go_on(100)
                os.kill(service.pids(2)[turn % 2], signal.SIGKILL)
                begun += 1
                service.begun(begun)
                service.send(signal.SIGHUP)
                service.says("all workers are new", turn + 1)
                begun += 2
            senders.go_on(100)
        sent = senders.sent * SENDERS

        def missing() -> int:
            state = standing(service)
            total = state.total
            return sent - total.handled - total.killed - total.kernel_drops - state.in_rings

        until(lambda: missing() == 0, lambda: f"{missing()}\n{service.log}")
        state = standing(service)
        assert state.total.deaths == kills
        assert service.stop() == 0
    found = in_order(service)
    assert set(found.values()) == {1}
    assert len(found) == state.total.handled


@pytest.mark.parametrize("end", ["SIGTERM", "SIGQUIT", "SIGKILL"])
def test_the_interface_is_without_a_program_afterwards(wide: Cable, tmp_path: Path, end: str) -> None:
    need_open_root()
    app_for_all(tmp_path)
    with Service(tmp_path, "app:handle", *XDP, "--user", "nobody", bind=BIND) as service:
        service.begun(2)
        assert Interface.named("near0").program
        client = wide.client()
        client.send(b"before")
        service.noted("before")
        workers = service.pids(2)
        assert service.stop(signal.Signals[end]) == (-signal.SIGKILL if end == "SIGKILL" else 0)
        until(lambda: not Interface.named("near0").program, lambda: "the program is attached")
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), lambda: service.log)
    with XdpReceiver("near0", PORT) as receiver:  # nothing is in the way
        client.send(b"next")
        assert bytes(receiver.recv(2)[0]) == b"next"


def test_the_next_supervisor_inherits_the_program_and_the_number_of_workers_stays(
    wide: Cable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    with recorded(tmp_path) as service:
        program = Interface.named("near0").program
        with Senders(wide) as senders:
            service.send(signal.SIGUSR2)
            service.says("took over from the program before")
            assert Interface.named("near0").program == program
            service.send(signal.SIGTTIN)
            service.says("with AF_XDP the number of workers stays: stop the service")
            service.send(signal.SIGHUP)
            service.says("all workers are new")
        handled(service, senders.sent * SENDERS)
        assert run(["workers", "status"]) == 0
        assert run(["workers", "scale", "1"]) == 1
        assert run(["workers", "scale", "2"]) == 0
        said, error = capsys.readouterr()
        assert one_line(error).startswith("with AF_XDP the number of workers stays: stop the service")
        assert "AF_XDP on near0, in copy mode; 0 datagrams wait in rings, or were lost in them" in said
        assert service.stop() == 0
    assert in_order(service) == {(one, n): 1 for one in range(SENDERS) for n in range(senders.sent)}


def test_one_worker_has_all_queues_and_reads_its_socket_too(wide: Cable, tmp_path: Path) -> None:
    wide.net.link("set", index=1, state="up")
    app(tmp_path)
    with Service(tmp_path, "app:Life", "--backend", "auto", bind=BIND) as service:
        service.says("datagrams come by AF_XDP on near0, in copy mode")
        service.begun(1)
        clients = [wide.client() for _ in range(SENDERS)]
        for number, client in enumerate(clients):
            client.send(b"%d" % number)
        with wide.near, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"by loopback", (NEAR, PORT))
        names = [*map(str, range(SENDERS)), "by loopback"]
        service.noted("start", *names)
        assert service.rows()["by_ring"][0] == SENDERS
        assert service.stop() == 0
        service.noted("start", *names, "stop")


def test_a_queue_that_another_has_comes_by_the_socket(wide: Cable, tmp_path: Path) -> None:
    with recorded(tmp_path) as service, Redirect("near0", 9) as redirect:
        senders = Senders(wide)
        os.kill(service.pids(2)[1], signal.SIGKILL)
        service.says(r"worker 1 \[\d+\] has died")
        with XdpReceiver.of(redirect, queues=[1]):
            service.says(
                r"queue 1 of near0: .*\(another AF_XDP socket has this queue.*\): its datagrams come by the socket"
            )
            for _ in range(3):
                senders.round()
            handled(service, 3 * SENDERS)
        assert service.rows()["by_ring"][0] > 0
        assert service.rows()["by_ring"][1] == 0
        assert service.stop() == 0


def test_more_workers_than_queues_and_an_interface_without_a_wire_are_refused(wide: Cable, tmp_path: Path) -> None:
    wide.net.link("set", index=1, state="up")
    app(tmp_path)
    for options, bind, code, message in (
        (("-w", 3, "--policy", "queue"), BIND, 2, "--workers: interface near0 has 2 queues, and each has one worker:"),
        ((), f"127.0.0.1:{PORT}", 1, "AF_XDP takes nothing off the loopback interface"),
    ):
        with Service(tmp_path, "app:handle", "--backend", "xdp", *options, bind=bind) as service:
            assert service.process.wait(20) == code
        (line,) = service.log.splitlines()
        assert message in line
        assert Interface.named("near0").program == 0


def test_a_foreign_program_stays_and_a_loop_over_sockets_has_no_rings(wide: Cable, tmp_path: Path) -> None:
    app(tmp_path)
    with packaged("swallow") as swallow, swallow.load().programs["swallow"].attach_xdp(wide.index):
        said = refused(Service(tmp_path, "app:handle", "--backend", "xdp", bind=BIND))
        assert "interface near0 has an XDP program already, swallow (id " in said
    said = refused(Service(tmp_path, "app:serve", "--backend", "xdp", bind=BIND))
    assert "'app:serve' has serve, a loop over sockets, which AF_XDP has none of: give it handle(batch)" in said
    assert Interface.named("near0").program == 0


def test_auto_takes_sockets_where_it_must_and_says_why(wide: Cable, tmp_path: Path) -> None:
    app(tmp_path)
    powerless = (sys.executable, "-c", POWERLESS)
    for options, before, why in (
        (("-w", 2), (), "with AF_XDP the queues of the interface decide which worker gets a sender"),
        ((), powerless, "CAP_BPF and CAP_NET_ADMIN"),
    ):
        with Service(tmp_path, "app:handle", "--backend", "auto", *options, bind=BIND, before=before) as service:
            service.says(f"datagrams come by sockets alone: .*{why}")
            service.begun(2 if options else 1)
            assert Interface.named("near0").program == 0
            wide.client().send(b"once")
            service.noted("once")
            assert service.stop() == 0
        (tmp_path / "notes").unlink()
