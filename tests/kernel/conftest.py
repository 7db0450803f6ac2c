"""Kernel tests: root, private namespaces, and proof after each test that nothing was left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fastrecv import bpf
from fastrecv.bench.lab import quick_grace_periods
from fastrecv.bench.runner import NEEDS
from tests.kernel.balancing import group
from tests.kernel.commands import Command
from tests.kernel.steering import SCRIPTED, UDP, Compile, Stage, staged
from tests.kernel.traces import Traces, held, remaining

if TYPE_CHECKING:
    from tests.kernel.cable import Cable

HERE = Path(__file__).parent
RCU = Path("/sys/kernel/rcu_expedited")
LINKS = pytest.StashKey[Traces]()  # of the host, before a run of several processes
BUSY = {"test_collector.py", "test_scale_out.py"}  # other programs' time-outs pass where CPUs are short
WATCHED = "fastrecv_host_is_watched"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.needs(*NEEDS))
        if _busy(item):
            item.add_marker(pytest.mark.alone)
    items.sort(key=_busy)  # by then `make test` has nothing else to do


def _busy(item: pytest.Item) -> bool:
    return item.path.parent == HERE and item.path.name in BUSY


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """A process of `pytest -n` is told that the host is looked at when the run has ended."""
    node.workerinput[WATCHED] = True


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("numprocesses", None):
        with contextlib.suppress(OSError):  # tests say what is missing
            session.config.stash[LINKS] = Traces(set(), set(bpf.link_ids()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run of several processes has left no link behind, not even one that is only pinned."""
    before = session.config.stash.get(LINKS, None)
    if before is not None and (left := remaining(lambda: Traces(set(), set(bpf.link_ids())), before).links):
        print(f"\nBPF links left behind: {left}", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _named_namespaces() -> set[str]:
    folder = Path("/run/netns")
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def _one_of_several(request: pytest.FixtureRequest) -> bool:
    """Whether other tests run beside this process's. Those that may not are turned away."""
    told = getattr(request.config, "workerinput", None)
    if told is None:
        return False
    if WATCHED not in told:
        pytest.fail("with -n give tests/kernel as an argument: nobody would look at the host in the end", pytrace=False)
    if request.node.get_closest_marker("alone"):
        pytest.fail("runs alone: add -m 'not proof and not alone' to -n, then run -m alone without -n", pytrace=False)
    return True


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Namespaces, BPF links and the RCU knob are after a test, failed or not, what they were before.

    The links are the host's. Where several processes run tests, those of the others' come and go: then they are what
    this process and those it has started hold, and the rest is looked at when the run has ended.
    """
    several = _one_of_several(request)
    home = Path("/proc/thread-self/ns/net").readlink()

    def look() -> Traces:
        return held() if several else held()._replace(links=set(bpf.link_ids()))

    before, named, knob = look(), _named_namespaces(), RCU.read_text()
    yield
    assert Path("/proc/thread-self/ns/net").readlink() == home, "the test left its thread in another namespace"
    left = remaining(look, before)
    assert not left.links, f"BPF links left behind: {left.links}"
    assert not left.namespaces, f"namespaces left behind: {left.namespaces}"
    assert _named_namespaces() <= named, f"named namespaces left behind: {_named_namespaces() - named}"
    assert RCU.read_text() == knob, "rcu_expedited was not put back"


@pytest.fixture
def quick() -> Iterator[None]:
    """Grace periods of RCU end at once: for tests that wait for hundreds of them, and not for what they guard."""
    with quick_grace_periods():
        yield


@pytest.fixture(scope="session")
def compile_bpf(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compile a BPF source text of a test with the compiler that builds the package."""
    clang = shutil.which("clang")
    assert clang is not None, "clang is part of `make setup`"
    folder = tmp_path_factory.mktemp("bpf")

    def compile_text(name: str, text: str) -> bytes:
        source = folder / f"{name}.bpf.c"
        source.write_text(text)
        include = f"-I/usr/include/{os.uname().machine}-linux-gnu"
        target = source.with_suffix(".o")
        subprocess.run(
            [clang, "-target", "bpf", "-O2", "-g", include, "-c", str(source), "-o", str(target)], check=True
        )
        return target.read_bytes()

    return compile_text


@pytest.fixture(scope="session")
def compiled(compile_bpf: Compile) -> bytes:
    return compile_bpf("scripted", SCRIPTED)


@pytest.fixture
def stage(compiled: bytes) -> Iterator[Stage]:
    with staged(compiled) as made:
        yield made


@pytest.fixture
def cable() -> Iterator[Cable]:
    """Two namespaces joined by a veth; the test is in the near one."""
    from tests.kernel.cable import laid  # needs libxdp, which few tests do

    with laid() as made, made.near:
        yield made


@pytest.fixture
def bpffs() -> Iterator[Path]:
    """A BPF file system of its own, open to all users; what is still pinned at the end goes with it."""
    with tempfile.TemporaryDirectory(prefix="bpffs-") as made:
        Path(made).chmod(0o755)
        subprocess.run(["mount", "-t", "bpf", "bpf", made], check=True)
        try:
            yield Path(made)
        finally:
            subprocess.run(["umount", made], check=True)


@pytest.fixture
def lookup(stage: Stage, bpffs: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """`fastrecv lookup` in the stage's namespace; nothing is loaded yet."""
    return Command(bpffs, capsys)


@pytest.fixture
def balance(stage: Stage, bpffs: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """`fastrecv balance` in the stage's namespace; no balancer is there yet."""
    return Command(bpffs, capsys, "balance")


@pytest.fixture
def members(stage: Stage) -> list[socket.socket]:
    """Three of one UDP group."""
    return group(stage, UDP, "ipv4", 3)


@pytest.fixture
def flows(balance: Command, members: list[socket.socket]) -> Command:
    """A balancer `flows` with three slots, whose sockets have their program."""
    balance.done("create", "flows", "--policy", "source+port", "--size", 3)
    balance.done("attach", "flows", "--fd", members[0].fileno())
    for slot, member in enumerate(members):
        balance.done("register", "flows", slot, "--fd", member.fileno())
    return balance


@pytest.fixture
def loaded(lookup: Command) -> Command:
    assert lookup.done("load") == "loaded\n"
    return lookup
