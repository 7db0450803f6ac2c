"""What /proc says of workers that were given CPUs, niceness and limits, and what it takes; and logs for programs."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrecv import privileges
from fastrecv.netns import Namespace
from tests.kernel.privileges import need_open_root
from tests.kernel.supervising import POWERLESS, Service, app_for_all, namespace, say, status
from tests.kernel.test_workers_cli import refused
from tests.kernel.test_workers_life import NOBODY

STUBBORN = """
import logging
class Stubborn:
    def handle(self, batch):
        logging.getLogger("fastrecv.sinks").warning("as a sink does")
        raise ValueError("whatever it is")
    def stop(self):
        raise RuntimeError("even at the end")
"""


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture
def folder(ns: Namespace, tmp_path: Path) -> Path:
    return app_for_all(tmp_path)


def niceness(pid: int) -> int:
    """Field 19 of proc(5), /proc/PID/stat."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[16])


def limits(pid: int, name: str) -> list[str]:
    """Soft and hard."""
    (line,) = [line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith(name)]
    return line.removeprefix(name).split()[:2]


def test_workers_have_them_and_their_successors_too(folder: Path) -> None:
    need_open_root()
    cpus = sorted(os.sched_getaffinity(0))[:2]
    (folder / "collector.toml").write_text(
        f'workers = 3\ncpus = "{",".join(map(str, cpus))}"\nuser = "nobody"\n[limits]\nnofile = 99\ncore = "1M"\n'
    )
    with Service(folder, "app:handle", "--config", folder / "collector.toml", "--nice", -5) as service:
        service.begun(3)
        kept = int(status(service.process.pid)["CapEff"], 16)
        assert kept & (1 << privileges.CAP_SYS_NICE)
        assert kept.bit_count() == 4  # and CAP_KILL, CAP_SETGID, CAP_SETUID
        os.kill(service.pids(3)[1], signal.SIGKILL)
        service.begun(4)
        for slot, pid in enumerate(service.pids(3)):
            assert status(pid)["Cpus_allowed_list"] == str(cpus[slot % len(cpus)])
            assert niceness(pid) == -5
            assert limits(pid, "Max open files") == ["99", "99"]
            assert limits(pid, "Max core file size") == [str(1 << 20)] * 2
            assert status(pid)["Uid"].split() == [str(NOBODY)] * 4
            assert {int(status(pid)[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
        assert niceness(service.process.pid) == os.getpriority(os.PRIO_PROCESS, 0)
        assert limits(service.process.pid, "Max open files") == list(
            map(str, resource.getrlimit(resource.RLIMIT_NOFILE))
        )
        assert service.stop() == 0


def test_a_limit_may_be_above_the_hard_one_of_who_is_privileged(folder: Path) -> None:
    if not privileges.has(privileges.CAP_SYS_RESOURCE):
        pytest.skip("CAP_SYS_RESOURCE is not to be had here")
    with Service(folder, "app:handle", "--limit", "core=1M", before=("prlimit", "--core=0:0")) as service:
        service.begun(1)
        assert int(status(service.process.pid)["CapEff"], 16) == 1 << privileges.CAP_SYS_RESOURCE
        assert limits(service.pids(1)[0], "Max core file size") == [str(1 << 20)] * 2
        assert limits(service.process.pid, "Max core file size") == ["0", "0"]
        assert service.stop() == 0


def test_who_is_not_root_but_has_ambient_capabilities_can_do_it_and_become_another(folder: Path) -> None:
    need_open_root()
    given = ",".join(f"+{name}" for name in ("bpf", "kill", "setgid", "setuid", "sys_nice"))
    only = f"--inh-caps=-all,{given}", f"--ambient-caps=-all,{given}"
    daemon = ("setpriv", "--securebits=+noroot,+noroot_locked", *only)  # any user's folders may be closed to others
    with Service(folder, "app:handle", "-w", 2, "--user", "nobody", "--nice", -3, before=daemon) as service:
        service.begun(2)
        assert "senders are balanced by source" in service.log
        assert int(status(service.process.pid)["CapEff"], 16).bit_count() == 4  # all but CAP_BPF
        for pid in service.pids(2):
            assert niceness(pid) == -3
            assert status(pid)["Uid"].split() == [str(NOBODY)] * 4
            assert {int(status(pid)[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
        assert service.stop() == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nice", -20), "nice -20 is below 0, which takes CAP_SYS_NICE: run as root"),
        (("--limit", "core=2G"), "limit core is above the hard one, 0, which takes CAP_SYS_RESOURCE: run as root"),
    ],
)
def test_a_missing_privilege_is_said_before_anything_begins(
    words: tuple[object, ...], message: str, folder: Path
) -> None:
    powerless = ("prlimit", "--core=0:0", sys.executable, "-c", POWERLESS)
    assert refused(Service(folder, "app:handle", *words, before=powerless), 77) == message


def test_a_file_that_is_not_readable(folder: Path) -> None:
    file = folder / "collector.toml"
    file.touch(0o000)
    with Service(folder, "app:handle", "--config", file, before=(sys.executable, "-c", POWERLESS)) as service:
        assert service.process.wait(20) == 2
        assert service.log == f"fastrecv run: {file}: cannot be read: Permission denied (see fastrecv run --help)\n"


def test_logs_are_objects_where_that_is_asked_for(folder: Path) -> None:
    (folder / "stubborn.py").write_text(STUBBORN)
    (folder / "collector.toml").write_text('handler = "stubborn:Stubborn"\nlog-format = "json"\nnice = 7\n')
    with Service(folder, "--config", folder / "collector.toml") as service:
        service.says('"worker 0 .* reads"')
        (first,) = service.pids(1)
        assert niceness(first) == 7
        assert int(status(service.process.pid)["CapEff"], 16) == 0  # what takes no privilege keeps none
        say("anything")
        service.says("whatever it is")
        os.kill(first, signal.SIGKILL)
        service.says('"worker 0 .* reads"', 2)
        (second,) = service.pids(1)
        assert service.stop() == 0
        said = [json.loads(line) for line in service.log.splitlines()]
    for event in said:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"])
    warned, raised, ended = [event for event in said if event["name"] == "worker"]
    assert (warned["slot"], warned["pid"], warned["level"]) == (0, first, "warning")
    assert warned["message"] == "as a sink does"
    assert (raised["slot"], raised["pid"], raised["level"]) == (0, first, "error")
    assert raised["message"] == "the handler has lost a batch of 1 datagrams"
    assert raised["exception"].startswith("Traceback (most recent call last):\n")
    assert raised["exception"].endswith("ValueError: whatever it is")
    assert (ended["slot"], ended["pid"], ended["level"]) == (0, second, "critical")
    assert ended["exception"].endswith("RuntimeError: even at the end")
    (died,) = [event for event in said if "has died" in event["message"]]
    assert (died["name"], died["slot"], died["pid"]) == ("supervisor", 0, service.process.pid)
    assert {"time", "level", "name", "pid", "message"} == said[-1].keys()
    assert said[-1]["message"].startswith("stopped: 1 datagrams received, 0 handled, 1 failed")
