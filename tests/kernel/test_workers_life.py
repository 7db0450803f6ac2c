"""Workers begin, hang, fail and end: each by what it handles, and by what /proc says of it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from errno import EPERM
from pathlib import Path

import pytest

import fastrecv
from fastrecv.netns import Namespace
from tests.kernel.privileges import CAP_BPF, CAP_NET_ADMIN, need_open_root
from tests.kernel.supervising import ADDRESS, PORT, POWERLESS, Service, app, app_for_all, namespace, say, status, until

NOBODY = 65534
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""
INSTALLED = f"""
import os, sys
os.environ["PYTHONPATH"] = {str(Path(fastrecv.__file__).parents[1])!r}
os.execv(sys.argv[1], [sys.argv[1], "-P", *sys.argv[2:]])
"""
CHILDLESS = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.execv(sys.argv[1], sys.argv[1:])
"""
LOCKS = """
import socket
def locks(batch):
    for fd in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{fd}") and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
            with socket.socket(fileno=os.dup(int(fd))) as sock:
                if sock.type == socket.SOCK_DGRAM:
                    sock.setsockopt(socket.SOL_SOCKET, 44, 1)  # SO_LOCK_FILTER
    handle(batch)
"""


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture
def folder(ns: Namespace, tmp_path: Path) -> Path:
    return app_for_all(tmp_path)


def lives(pid: int) -> bool:
    """Whether a process has not ended; others may be slow to take note of it."""
    return Path(f"/proc/{pid}").exists() and status(pid)["State"][0] != "Z"


def test_a_worker_is_another_user_without_capabilities(folder: Path) -> None:
    need_open_root()
    with Service(folder, "app:handle", "--user", "nobody") as service:
        service.begun(1)
        found = status(service.pids(1)[0])
        assert found["Uid"].split() == found["Gid"].split() == [str(NOBODY)] * 4
        assert {int(found[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
        assert found["NoNewPrivs"] == "1"
        kept = int(status(service.process.pid)["CapEff"], 16)
        assert not kept & (1 << CAP_BPF | 1 << CAP_NET_ADMIN)
        assert bin(kept).count("1") == 3  # CAP_KILL, CAP_SETGID, CAP_SETUID
        os.kill(service.pids(1)[0], signal.SIGKILL)
        service.begun(2)  # the supervisor still may
        assert status(service.pids(1)[0])["Uid"].split() == [str(NOBODY)] * 4
        assert service.stop() == 0


def test_nothing_of_the_current_folder_is_imported_before_privileges_are_given_up(folder: Path) -> None:
    need_open_root()
    (folder / "numpy.py").write_text(f"open({str(folder / 'intruded')!r}, 'w').close()\n")
    with Service(
        folder, "app:handle", "--user", "nobody", before=(sys.executable, "-c", INSTALLED), cwd=folder
    ) as service:
        service.begun(1)
        say("found")
        service.noted("found")
        assert service.stop() == 0
    assert not (folder / "intruded").exists()


def test_what_a_handler_executes_has_nothing_of_the_service(folder: Path) -> None:
    """It would keep the socket alive, and take datagrams with it, when the service is long over."""
    command = f"ls -l /proc/self/fd >{folder}/fds"
    (folder / "shell.py").write_text(f"import os\ndef handle(batch):\n    os.system({command!r})\n")
    with Service(folder, "shell:handle") as service:
        service.begun(1)
        say("datagram")
        assert service.stop() == 0
        held = (folder / "fds").read_text()
        assert "/log" in held
        assert "socket:" not in held
        assert "memfd:" not in held


def test_a_handler_may_not_load_bpf_even_as_root(folder: Path) -> None:
    with Service(folder, "app:handle") as service:
        service.begun(1)
        assert status(service.pids(1)[0])["Uid"].split() == ["0"] * 4
        say("bpf")
        service.noted(f"errno {EPERM}")
        assert service.stop() == 0


def test_children_are_waited_for_though_who_calls_ignores_his(folder: Path) -> None:
    before = (sys.executable, "-c", CHILDLESS)
    with Service(folder, "app:handle", before=before) as service:
        service.begun(1)
        os.kill(service.pids(1)[0], signal.SIGKILL)
        service.begun(2)
        assert service.stop() == 0


def test_a_handler_that_hangs_is_replaced(folder: Path) -> None:
    with Service(folder, "app:handle", "--timeout", 1, "--batch-size", 1) as service:
        service.begun(1)
        say("hang", "after")
        service.noted("after")
        assert "has given no sign of life for 1 s: killed" in service.log
        rows = service.rows()[0]
        assert (rows["datagrams"], rows["handled"], rows["killed"], rows["starts"]) == (2, 1, 1, 2)
        assert service.stop() == 0


def test_a_handler_that_raises_costs_its_batch_and_is_counted(folder: Path) -> None:
    with Service(folder, "app:handle", "--batch-size", 1) as service:
        service.begun(1)
        say("raise", "raise", "after")
        service.noted("after")
        rows = service.rows()[0]
        assert (rows["datagrams"], rows["failed"], rows["errors"], rows["killed"], rows["starts"]) == (3, 2, 2, 0, 1)
        assert service.log.count("ValueError: as it was told") == 1  # once a second at most
        assert service.stop() == 0


def test_a_handler_that_raises_ends_its_worker_where_that_is_asked_for(folder: Path) -> None:
    with Service(folder, "app:handle", "--batch-size", 1, "--on-error", "exit") as service:
        service.begun(1)
        say("raise", "after")
        service.noted("after")
        rows = service.rows()[0]
        assert (rows["datagrams"], rows["handled"], rows["failed"], rows["starts"]) == (2, 1, 1, 2)
        assert service.stop() == 0


def test_who_dies_again_and_again_is_given_up_its_senders_move_and_a_restart_revives_it(folder: Path) -> None:
    with Service(folder, "app:handle", "-w", 2, "--batch-size", 1) as service:
        service.begun(2)
        while "is given up: it has died at once 5 times, the last time exit code 7" not in service.log:
            say("die")
            time.sleep(0.05)
            assert service.process.poll() is None
        service.says(r"workers [01] share the senders")
        (left,) = {pid for pid in service.pids(2) if Path(f"/proc/{pid}").exists()}
        names = [str(number) for number in range(20)]
        for name in names:
            say(name, source=f"127.2.0.{name}")
        service.noted(*names)
        assert {pid for pid, _ in service.notes()} == {left}
        (folder / "app.py").write_text((folder / "app.py").read_text().replace("os._exit(7)", "continue"))
        service.send(signal.SIGHUP)
        service.says("all workers are new")
        service.says("workers 0, 1 share the senders")
        assert service.stop() == 0


def test_all_given_up_is_the_end(folder: Path) -> None:
    (folder / "broken.py").write_text("import os\nos._exit(5)\n")
    with Service(folder, "broken:handle") as service:
        assert service.process.wait(20) == 1
        assert "worker 0 is given up: it has died at once 5 times, the last time exit code 5" in service.log
        assert service.log.endswith("ERROR   supervisor: all workers were given up\n")


def test_told_to_stop_the_queue_is_read_to_its_end(folder: Path) -> None:
    with Service(folder, "app:slow", "-w", 2, "--batch-size", 1) as service:
        service.begun(2)
        for sender in range(20):
            say(*["datagram"] * 5, source=f"127.2.0.{sender}")
        assert service.stop() == 0
        assert "100 datagrams received, 100 handled, 0 failed, 0 in the hands" in service.log


@pytest.mark.parametrize("way", ["sys.exit()", "os._exit(0)"])
def test_a_handler_that_exits_well_while_its_queue_is_read_to_the_end_has_died_and_the_queue_waits(
    way: str, folder: Path
) -> None:
    with (folder / "app.py").open("a") as file:
        file.write(f"\nimport sys\ndef leave(batch):\n    handle(batch) if batch[0] != b'leave' else {way}\n")
    with Service(folder, "app:leave", "--batch-size", 1) as service:
        service.begun(1)
        (pid,) = service.pids(1)
        os.kill(pid, signal.SIGSTOP)
        say("leave", *map(str, range(5)))
        service.send(signal.SIGTERM)
        service.says("SIGTERM")
        os.kill(pid, signal.SIGCONT)
        assert service.process.wait(10) == 0
        assert [text for _, text in service.notes()] == list(map(str, range(5)))
        assert service.totals() == (6, 5, 0, 1)
        service.says(r"has died, exit code 0, with 1 datagrams in its hands")


def test_a_queue_that_a_loop_of_its_own_leaves_unread_is_lost_and_said(folder: Path) -> None:
    (folder / "app.py").write_text("import time\ndef serve(sockets):\n    time.sleep(1000)\n")
    with Service(folder, "app:serve") as service:
        service.begun(1)
        say("a")
        assert service.stop() == 1
        service.says("unread queues of workers 0 are lost")


def test_what_is_not_read_in_time_is_lost_and_said(folder: Path) -> None:
    with Service(folder, "app:slow", "--batch-size", 1, "--graceful-timeout", 0.2) as service:
        service.begun(1)
        say(*["datagram"] * 100)
        pid = service.pids(1)[0]
        assert service.stop() == 1
        assert "unread queues of workers 0 are lost" in service.log
        assert not Path(f"/proc/{pid}").exists()


def test_quit_is_at_once(folder: Path) -> None:
    with Service(folder, "app:handle", "-w", 2) as service:
        service.begun(2)
        say("hang")
        pids = service.pids(2)
        until(lambda: service.rows()["datagrams"].sum() == 1, lambda: service.log)
        began = time.monotonic()
        assert service.stop(signal.SIGQUIT) == 0
        assert time.monotonic() - began < 5
        assert "1 datagrams received, 0 handled, 0 failed, 1 in the hands" in service.log
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_restart_with_broken_code_leaves_the_workers_as_they_are(folder: Path) -> None:
    with Service(folder, "app:handle", "-w", 2) as service:
        service.begun(2)
        before = service.pids(2)
        (folder / "app.py").write_text("import nonsense\n")
        service.send(signal.SIGHUP)
        service.says("no more workers are restarted, the others stay: .* there is no module 'nonsense'|No module named")
        assert service.pids(2) == before
        say("still")
        service.noted("still")
        app(folder)
        service.send(signal.SIGHUP)
        service.says("all workers are new")
        assert not set(service.pids(2)) & set(before)
        assert service.stop() == 0


def test_a_class_starts_handles_and_stops_async_or_not(folder: Path) -> None:
    with Service(folder, "app:Life") as service:
        service.begun(1)
        say("one", "two")
        service.noted("start", "one", "two")
        assert service.stop() == 0
        assert [text for _, text in service.notes()] == ["start", "one", "two", "stop"]


def test_an_async_handler_runs_on_uvloop_where_its_module_says_so(folder: Path) -> None:
    (folder / "fast.py").write_text(
        "import asyncio, uvloop\nimport app\nuvloop.install()\n"
        "async def handle(batch):\n    app.note(type(asyncio.get_running_loop()).__module__)\n"
    )
    with Service(folder, "fast:handle") as service:
        service.begun(1)
        say("any")
        service.noted("uvloop")
        assert service.stop() == 0


def test_a_loop_of_its_own_gets_the_socket_and_sigterm(folder: Path) -> None:
    with Service(folder, "app:serve") as service:
        service.begun(1)
        say("one")
        service.noted("one")
        service.send(signal.SIGHUP)
        service.says("all workers are new")
        say("two")
        service.noted("one", "two")
        assert len({pid for pid, _ in service.notes()}) == 2
        assert service.stop() == 0


def test_sockets_of_systemd_keep_their_queues_over_a_restart(folder: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as passed:
        passed.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        passed.bind((ADDRESS, PORT))
        activated = (sys.executable, "-c", ACTIVATE, str(passed.fileno()))
        expected: list[str] = []
        # Of the second, which is killed, the program stays, with the socket in a slot of it.
        for turn, workers in (("first", 2), ("second", 1), ("third", 2)):
            say(f"before the {turn}")
            with Service(
                folder, "app:handle", "-w", workers, bind=None, before=activated, pass_fds=[passed.fileno()]
            ) as service:
                service.begun(workers)
                say(turn)
                expected += [f"before the {turn}", turn]
                service.noted(*expected)
                if turn == "second":
                    service.process.kill()
                else:
                    assert service.stop() == 0


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("source", "without CAP_BPF: classic BPF by source"),
        ("quic[8]", "takes CAP_BPF: the kernel's hash of both ends"),
    ],
)
def test_without_any_privilege_others_decide_and_that_is_said(policy: str, said: str, folder: Path) -> None:
    with Service(
        folder, "app:handle", "-w", 2, "--policy", policy, before=(sys.executable, "-c", POWERLESS)
    ) as service:
        service.begun(2)
        assert int(status(service.process.pid)["CapPrm"], 16) == 0
        assert said in service.log
        names = [str(number) for number in range(20)]
        expected: list[str] = []
        for change in (None, signal.SIGTTIN, signal.SIGTTOU):
            if change is not None:
                service.send(change)
                service.says("workers 0, 1, 2 share the senders" if change == signal.SIGTTIN else "worker 2 has left")
            before = len(service.notes())
            for name in names:
                say(name, name, source=f"127.2.0.{name}")
            expected += [*names, *names]
            service.noted(*expected)
            notes = service.notes()[before:]
            assert len({pid for pid, _ in notes}) == (3 if change == signal.SIGTTIN else 2)
            if policy == "source":
                assert len(set(notes)) == len(names)  # each sender has one worker
        assert service.stop() == 0


def test_workers_do_not_outlive_a_supervisor_that_is_killed(folder: Path) -> None:
    with Service(folder, "app:handle", "-w", 2) as service:
        service.begun(2)
        pids = service.pids(2)
        service.process.kill()
        until(lambda: not any(map(lives, pids)), lambda: f"{pids} live")


def test_workers_of_a_supervisor_that_is_killed_read_their_queues_to_the_end(folder: Path) -> None:
    texts = [f"datagram {number}" for number in range(50)]
    with Service(folder, "app:handle", "--batch-size", 1) as service:
        service.begun(1)
        (pid,) = service.pids(1)
        os.kill(pid, signal.SIGSTOP)
        say(*texts)
        service.process.kill()
        service.process.wait()
        os.kill(pid, signal.SIGCONT)
        service.noted(*texts)
        until(lambda: not lives(pid), lambda: f"{pid} lives")


def test_locked_filters_keep_no_worker_of_a_supervisor_that_is_killed_from_its_queue(folder: Path) -> None:
    with (folder / "app.py").open("a") as file:
        file.write(LOCKS)
    with Service(folder, "app:locks", "--batch-size", 1, "--graceful-timeout", 1) as service:
        service.begun(1)
        say("first")
        service.noted("first")
        (pid,) = service.pids(1)
        os.kill(pid, signal.SIGSTOP)
        say("second", "third")
        service.process.kill()
        service.process.wait()
        os.kill(pid, signal.SIGCONT)
        service.noted("first", "second", "third")
        until(lambda: not lives(pid), lambda: f"{pid} lives")


def test_a_worker_that_hangs_does_not_outlive_a_supervisor_that_is_killed(folder: Path) -> None:
    with Service(folder, "app:handle", "--graceful-timeout", 0.5) as service:
        service.begun(1)
        (pid,) = service.pids(1)
        say("before", "hang")
        service.noted("before")
        service.process.kill()
        until(lambda: not lives(pid), lambda: f"{pid} lives")


def test_a_loop_of_its_own_that_ends_by_itself_says_so(folder: Path) -> None:
    (folder / "short.py").write_text("def serve(sockets): pass\n")
    with Service(folder, "short:serve") as service:
        service.says(r"worker 0 \[\d+\]: serve\(\) has returned, though nobody has told it to stop")


def test_senders_of_who_is_given_up_wait_where_that_is_asked_for(folder: Path) -> None:
    with Service(folder, "app:handle", "-w", 2, "--batch-size", 1, "--given-up", "wait") as service:
        service.begun(2)
        while "is given up" not in service.log:
            say("die")
            time.sleep(0.05)
        say("waits")
        (folder / "app.py").write_text((folder / "app.py").read_text().replace("os._exit(7)", "continue"))
        service.send(signal.SIGHUP)
        service.noted("waits")
        assert "share the senders" not in service.log
        assert service.stop() == 0
