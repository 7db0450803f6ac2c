"""What the surroundings say to a service, file, environment and command line: who comes first, and what is wrong."""

from __future__ import annotations

import json
import os
import re
import resource
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fastrecv.cli.main import run
from fastrecv.cli.run import run as command
from fastrecv.errors import StateError
from fastrecv.workers.attributes import LIMITS, limit, listed
from fastrecv.workers.config import ConfigError, gathered
from fastrecv.workers.notify import Manager
from fastrecv.workers.settings import Identity, SettingError, Settings, Task, attributes

FILE = """
handler = "mypkg.collector:handle"
bind = "192.0.2.1:2055"
workers = 2
receive-buffer = 1_000_000
timeout = 5

[limits]
nofile = 1024
as = "1G"
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "collector.toml"
    path.write_text(FILE)
    return str(path)


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(file: str) -> None:
    environment = {"FASTRECV_CONFIG": file, "FASTRECV_WORKERS": "3", "FASTRECV_RECEIVE_BUFFER": "2000000",
                   "FASTRECV_LIMITS": "as=2G, core=0", "FASTRECV_POLICY": "", "HOME": "/"}  # fmt: skip
    options = {"workers": 4, "policy": None, "limits": ("core=5",), "user": "nobody"}
    found = gathered(options, None, environment)
    assert found.settings == Settings(
        handler="mypkg.collector:handle", bind="192.0.2.1:2055", workers=4, receive_buffer=2_000_000, timeout=5.0,
        user="nobody", limits={"nofile": 1024, "as": "2G", "core": "5"},
    )  # fmt: skip
    rows = {key: (value, source) for key, value, source in found.rows()}
    assert rows["workers"] == (4, "--workers")
    assert rows["receive-buffer"] == (2_000_000, "FASTRECV_RECEIVE_BUFFER")
    assert rows["bind"] == ("192.0.2.1:2055", file)
    assert rows["policy"] == ("source", "default")
    assert rows["limits.nofile"] == (1024, file)
    assert rows["limits.as"] == ("2G", "FASTRECV_LIMITS")
    assert rows["limits.core"] == ("5", "--limit")


def test_every_setting_can_be_given_by_the_environment() -> None:
    whole = Settings(
        handler="a:b", bind="192.0.2.1:53", backend="auto", workers=3, policy="flow", user="nobody", group="nogroup",
        timeout=1.5, graceful_timeout=2.5, batch_size=8, receive_buffer=9, on_error="exit", given_up="wait", cpus="0,2",
        nice=3, limits={"core": "0"}, log_format="json", control="/run/a.sock", metrics="127.0.0.1:9",
    )  # fmt: skip
    given = msgspec.structs.asdict(whole)
    assert all(given[field.name] != field.default for field in msgspec.structs.fields(Settings)), "say each of them"
    words = {f"FASTRECV_{name.upper()}": str(value) for name, value in given.items()} | {"FASTRECV_LIMITS": "core=0"}
    assert gathered({}, None, words).settings == whole


def test_every_setting_is_an_option_of_the_same_name() -> None:
    options = {parameter.name: parameter.opts for parameter in command.params}
    for field in msgspec.structs.fields(Settings):
        if field.name not in ("handler", "limits"):  # the argument, and --limit
            assert f"--{field.encode_name}" in options[field.name]


def test_a_task_is_the_same_at_the_worker() -> None:
    settings = Settings(handler="a:b", cpus="0", limits={"as": "unlimited"}, given_up="wait", batch_size=7)
    task = Task(settings, 3, 4, 5, True, 6, Identity(1, 2, [2]), attributes(settings))
    assert msgspec.json.decode(msgspec.json.encode(task), type=Task) == task


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worker = 2", "unknown key 'worker': did you mean 'workers'?"),
        ("batch_size = 2", "unknown key 'batch_size': did you mean 'batch-size'?"),
        ("xyz = 2", "unknown key 'xyz'"),
        ("workers = '2'", "workers: '2' is not a whole number"),
        ("workers = true", "workers: True is not a whole number"),
        ("timeout = '2'", "timeout: '2' is not a number"),
        ("bind = 2055", "bind: 2055 is not text in quotes"),
        ("on-error = 'stop'", "on-error: 'stop' is none of continue, exit"),
        ("on-error = []", "on-error: [] is none of continue, exit"),
        ("limits = 5", "limits: 5 is not a table of limits, like [limits] with nofile = 1024"),
        ("[limits]\nnofile = 1.5", "limits.nofile: 1.5 is not a whole number, or text in quotes"),
        ("[limits]\nnofiles = 15", "limits.nofiles: there is no such limit: give one of as, core, cpu, data,"),
        ("[limits]\nas = -5", "limits.as: -5 is no limit: give a number, perhaps with K, M, G or T, or unlimited"),
        ("[limits]\nas = '1E'", "limits.as: '1E' is no limit"),
        ("[limits]\nas = '9999999999G'", "limits.as: '9999999999G' is no limit"),
        ("[limits]\nnofile = 1099511627776", "limits.nofile: 1099511627776 is more than the kernel allows: give "),
        ("workers = 500", "workers: 500 is out of range: give 1 to 128"),
        ("receive-buffer = 0", "receive-buffer: 0 is out of range: give 1 to"),
        ("nice = 20", "nice: 20 is out of range: give -20 to 19"),
        ("cpus = '3-1'", "cpus: '3-1' is no list of CPUs: give one like 0-3,6"),
        ("bind = 'localhost:53'", "bind: 'localhost:53' is no address to bind to"),
        ("policy = 'sauce'", "policy: policy 'sauce'"),
        ("backend = 'xdp'", "backend: AF_XDP takes datagrams for an address of an interface: give bind one"),
        (
            "backend = 'xdp'\nbind = 'tcp:192.0.2.1:53'",
            "backend: AF_XDP takes datagrams for an address of an interface",
        ),
        ("backend = 'xdp'\nbind = '[::]:53'", "bind: AF_XDP is of one interface: give an address of it, not ::"),
        ("backend = 'dpdk'", "backend: 'dpdk' is none of auto, socket, xdp"),
        ("workers =", "is not TOML: Invalid value (at "),
    ],
)
def test_files_that_make_no_sense(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "collector.toml"
    path.write_text(f"handler = 'a:b'\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        gathered({}, str(path), {})
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTRECV_WORKERS": "four"}, "FASTRECV_WORKERS: 'four' is not a whole number"),
        ({"FASTRECV_WORKERS": "null"}, "FASTRECV_WORKERS: 'null' is not a whole number"),
        ({"FASTRECV_WORKERS": "0"}, "FASTRECV_WORKERS: 0 is out of range"),
        ({"FASTRECV_WORKER": "4"}, "unknown variable FASTRECV_WORKER: did you mean 'FASTRECV_WORKERS'?"),
        ({"FASTRECV_LIMITS": "nofile"}, "FASTRECV_LIMITS: 'nofile' is no limit: give one like nofile=1024"),
        ({"FASTRECV_LIMITS": "core=0,as=x"}, "FASTRECV_LIMITS: as: 'x' is no limit"),
        ({"FASTRECV_GIVEN_UP": "stay"}, "FASTRECV_GIVEN_UP: 'stay' is none of move, wait"),
        ({"FASTRECV_CONFIG": "/nonexistent"}, "/nonexistent: cannot be read: No such file or directory"),
        ({"FASTRECV_CONFIG": "/"}, "/: cannot be read: Is a directory"),
        ({"FASTRECV_CONFIG": "/bin/true"}, "/bin/true: is not TOML: "),
        ({"FASTRECV_HANDLER": ""}, "Missing argument PACKAGE.MODULE:NAME: give it, FASTRECV_HANDLER, or handler in "),
    ],
)
def test_environments_that_make_no_sense(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gathered({}, None, {"FASTRECV_HANDLER": "a:b", **environment})
    assert str(caught.value).startswith(message)


def test_several_workers_on_af_xdp_need_the_policy_that_its_queues_are() -> None:
    with pytest.raises(
        SettingError, match=r"policy: with AF_XDP the queues of the interface decide .* give queue, or one"
    ):
        Settings(handler="a:b", bind="192.0.2.1:53", backend="xdp", workers=2, policy="flow")
    Settings(handler="a:b", bind="192.0.2.1:53", backend="xdp", workers=2, policy="queue")
    Settings(handler="a:b", bind="192.0.2.1:53", backend="xdp", policy="flow")
    Settings(handler="a:b", bind="0.0.0.0:53", backend="auto", workers=2)


def test_what_others_call_by_names_like_ours_is_left_alone() -> None:
    assert gathered({"handler": "a:b"}, None, {"FASTRECV_TEST_RUN": "1"}).settings == Settings(handler="a:b")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a:b", "--limit", "nofile"], "--limit: 'nofile' is no limit: give one like nofile=1024"),
        (["a:b", "--cpus", "8000"], "--cpus: there is no CPU 8000 for this process: it has "),
        (["a:b", "--user", "nonsense"], "--user: there is no user 'nonsense'"),
        (["a:b", "--config", "/nonexistent"], "/nonexistent: cannot be read"),
        (["a:b", "--json"], "--json is for --check"),
    ],
)
def test_options_that_make_no_sense(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastrecv run: {message}")


def test_check_says_what_would_hold_and_runs_nothing(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", "--config", file, "--check", "--json", "--workers", "7"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["workers"] == {"value": 7, "source": "--workers"}
    assert said["handler"] == {"value": "mypkg.collector:handle", "source": file}
    assert said["user"] == {"value": None, "source": "default"}
    assert run(["run", "--config", file, "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["receive-buffer", "1000000", file] in [line.split() for line in lines]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"NOTIFY_SOCKET": "vsock:2:99"},
            "NOTIFY_SOCKET is 'vsock:2:99': neither a path nor @ and a name (sd_notify(3))",
        ),
        (
            {"WATCHDOG_USEC": "soon"},
            "WATCHDOG_USEC is 'soon': no number of microseconds (sd_watchdog_enabled(3))",
        ),
        ({"WATCHDOG_USEC": "0"}, "WATCHDOG_USEC is '0': no number of microseconds"),
    ],
)
def test_what_a_service_manager_cannot_mean(environment: dict[str, str], message: str) -> None:
    with pytest.raises(StateError, match=re.escape(message)):
        Manager(environment)


def test_cpus_and_limits_as_words() -> None:
    assert listed("0-3,6") == [0, 1, 2, 3, 6]
    assert listed("6, 0") == [6, 0]
    assert limit("as", "1G") == (resource.RLIMIT_AS, 1 << 30)
    assert limit("core", "unlimited") == (resource.RLIMIT_CORE, resource.RLIM_INFINITY)
    assert {"nofile", "core", "as", "nproc", "memlock", "stack"} <= LIMITS.keys()
    for wrong in ("", "0-", "-1", "1,,2", "0-9999", "a"):
        with pytest.raises(ValueError, match=re.escape(f"{wrong!r} is no list of CPUs")):
            listed(wrong)


def test_a_cpu_that_is_not_there() -> None:
    may: Any = sorted(os.sched_getaffinity(0))
    assert attributes(Settings(handler="a:b", cpus=str(may[-1]))).cpus == [may[-1]]
    with pytest.raises(SettingError, match="there is no CPU 8191 for this process"):
        attributes(Settings(handler="a:b", cpus="8191"))
