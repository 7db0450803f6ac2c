"""A supervisor that is followed by newer code of its own: same process, same workers, nothing lost."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrecv.bench.numbered import NumberedSource
from fastrecv.netns import Namespace
from tests.kernel.privileges import CAP_NET_BIND_SERVICE
from tests.kernel.supervising import (
    ADDRESS,
    PORT,
    POWERLESS,
    Service,
    app,
    finished,
    namespace,
    recording,
    say,
    status,
    until,
)

_SENDERS = 1000
CAPABILITY = "net_bind_service"


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture
def folder(ns: Namespace, tmp_path: Path) -> Path:
    app(tmp_path)
    return tmp_path


def descriptors(service: Service) -> int:
    return len(list(Path(f"/proc/{service.process.pid}/fd").iterdir()))


def taken_over(service: Service, times: int = 1) -> None:
    service.says("took over", times)


def test_nothing_is_lost_and_all_goes_on(ns: Namespace, tmp_path: Path) -> None:
    with recording(tmp_path, 3) as service, NumberedSource(ns, _SENDERS, ADDRESS, PORT) as source:
        pids = service.pids(3)
        service.send(signal.SIGUSR2)
        taken_over(service)
        assert service.pids(3) == pids
        held = descriptors(service)
        service.send(signal.SIGTTIN)  # the balancer's tables and slots are its own still
        service.says("workers 0, 1, 2, 3 share")
        service.send(signal.SIGUSR2)
        taken_over(service, 2)
        os.kill(pids[1], signal.SIGKILL)
        service.says("with .* in its hands")
        service.says(r"worker 1 \[\d+\] reads", 2)
        service.send(signal.SIGTTOU)
        service.says("worker 3 has left")
        service.send(signal.SIGHUP)
        service.says("all workers are new")
        assert not set(service.pids(3)) & set(pids)
        service.send(signal.SIGUSR2)
        taken_over(service, 3)
        assert descriptors(service) == held
        found = finished(service, source, ns)
    assert (found.destroyed, found.repeated, found.dropped) == (0, 0, 0)
    assert found.taken == found.handled + found.killed
    assert found.recorded >= found.sent - found.killed


def test_signals_and_deaths_meanwhile_are_not_missed(folder: Path) -> None:
    with Service(folder, "app:handle", "-w", 2) as service:
        service.begun(2)
        for turn, pause in enumerate((0.0, 0.25, 0.5), start=1):
            pid = service.pids(2)[0]
            service.send(signal.SIGUSR2)
            time.sleep(pause)
            os.kill(pid, signal.SIGKILL)
            service.send(signal.SIGHUP)
            taken_over(service, turn)
            service.says("has died", turn)
            service.says("all workers are new", turn)
        service.send(signal.SIGUSR2)
        assert service.stop() == 0
        assert len(re.findall("has died", service.log)) == 3


def test_code_that_would_not_do_changes_nothing(folder: Path) -> None:
    with Service(folder, "app:handle", "-w", 2) as service:
        service.begun(2)
        pids, held = service.pids(2), descriptors(service)
        broken = folder / "sitecustomize.py"
        broken.write_text("import os, sys\nif 'FASTRECV_SUCCESSION' in os.environ: sys.exit('broken code')\n")
        service.send(signal.SIGUSR2)
        service.says("stays as it is: its successor would not do")
        assert "broken code" in service.log
        assert (service.pids(2), descriptors(service)) == (pids, held)
        say("one")
        service.noted("one")
        broken.unlink()
        service.send(signal.SIGUSR2)
        taken_over(service)
        assert service.stop() == 0


def test_code_that_hangs_in_its_check_does_not_outlive_the_service(folder: Path) -> None:
    with Service(folder, "app:handle") as service:
        service.begun(1)
        said = folder / "check"
        (folder / "sitecustomize.py").write_text(
            "import os, pathlib, time\nif 'FASTRECV_SUCCESSION' in os.environ:\n"
            f"    pathlib.Path({str(said)!r}).write_text(str(os.getpid()))\n    time.sleep(1000)\n"
        )
        service.send(signal.SIGUSR2)
        until(lambda: said.exists() and said.read_text(), lambda: service.log)
        assert service.stop() == 0
        assert not Path("/proc", said.read_text()).exists()


def test_configuration_is_read_again_as_far_as_it_can_change(folder: Path) -> None:
    config = folder / "collector.toml"
    config.write_text("workers = 1\n")
    with Service(folder, "app:handle", "--config", config) as service:
        service.begun(1)
        config.write_text('workers = 1\npolicy = "flow"\n')
        service.send(signal.SIGUSR2)
        service.says("stays as it is")
        assert "fastrecv: policy was source when the service began: to make it flow, stop it and start" in service.log
        config.write_text("workers = 2\nworker = 3\n")
        service.send(signal.SIGUSR2)
        service.says("stays as it is", 2)
        assert "unknown key 'worker'" in service.log
        config.write_text("workers = 2\n")
        service.send(signal.SIGUSR2)
        service.says("workers 0, 1 share the senders")
        assert service.stop() == 0


def test_without_privileges_senders_keep_their_workers(folder: Path) -> None:
    """Classic BPF goes by the same seed as before."""
    names = [f"127.0.1.{number}" for number in range(1, 17)]
    with Service(folder, "app:handle", "-w", 2, before=(sys.executable, "-c", POWERLESS)) as service:
        service.begun(2)
        for turn in ("before", "after"):
            for name in names:
                say(f"{name} {turn}", source=name)
            service.noted(*(f"{name} {one}" for name in names for one in ("before", "after")[: 1 + (turn == "after")]))
            if turn == "before":
                service.send(signal.SIGUSR2)
                taken_over(service)
        notes = {text: pid for pid, text in service.notes()}
        assert all(notes[f"{name} before"] == notes[f"{name} after"] for name in names)
        assert len(set(notes.values())) == 2
        service.send(signal.SIGTTIN)
        service.says("workers 0, 1, 2 share")
        assert service.stop() == 0


def test_a_capability_that_resizing_takes_is_kept_without_being_root(folder: Path) -> None:
    """As systemd's AmbientCapabilities= gives it to an ordinary user; here root has no more than such a one."""
    one = f"--inh-caps=-all,+{CAPABILITY}", f"--ambient-caps=-all,+{CAPABILITY}"
    before = ("setpriv", "--securebits=+noroot,+noroot_locked", *one)
    with Service(folder, "app:handle", bind=f"{ADDRESS}:53", before=before) as service:
        service.begun(1)
        service.send(signal.SIGUSR2)
        taken_over(service)
        assert int(status(service.process.pid)["CapPrm"], 16) == 1 << CAP_NET_BIND_SERVICE
        service.send(signal.SIGTTIN)
        service.says("workers 0, 1 share")
        assert [int(status(pid)["CapPrm"], 16) for pid in service.pids(2)] == [0, 0]
        assert service.stop() == 0


def test_a_reload_that_a_successor_is_asked_for_is_said_while_another_goes_on(folder: Path) -> None:
    path = folder / "manager"
    (folder / "late.py").write_text("import time\ntime.sleep(1.5)\nfrom app import handle\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(10)

        def heard(words: str) -> None:
            while words not in manager.recv(4096).decode():
                pass

        with Service(folder, "late:handle", environment={"NOTIFY_SOCKET": str(path)}) as service:
            heard("READY=1")
            service.send(signal.SIGUSR2)
            service.says("SIGUSR2")
            service.send(signal.SIGHUP)
            heard("RELOADING=1")
            taken_over(service)
            service.send(signal.SIGHUP)
            heard("RELOADING=1")
            heard("READY=1")
            assert service.stop() == 0
