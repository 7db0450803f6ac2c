"""Kernel tests: root, private namespaces, and proof after each test that nothing was left behind."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fastrecv import bpf
from fastrecv.bench.lab import quick_grace_periods
from fastrecv.bench.runner import NEEDS
from tests.kernel.balancing import group
from tests.kernel.commands import Command
from tests.kernel.steering import SCRIPTED, UDP, Compile, Stage, staged

if TYPE_CHECKING:
    from tests.kernel.cable import Cable

HERE = Path(__file__).parent
RCU = Path("/sys/kernel/rcu_expedited")
os.environ["FASTRECV_TEST_RUN"] = str(os.getpid())  # inherited by every process that a test starts
MARK = f"FASTRECV_TEST_RUN={os.getpid()}".encode()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.needs(*NEEDS))


def _held_namespaces() -> set[str]:
    """Every network namespace that this process or one it started is in or holds open ("net:[inode]")."""
    held = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != os.getpid() and MARK not in (process / "environ").read_bytes():
                continue
            held.add((process / "ns/net").readlink().name)
            held |= {name for fd in (process / "fd").iterdir() if (name := fd.readlink().name).startswith("net:[")}
        except OSError:
            continue  # the process has ended
    return held


def _named_namespaces() -> set[str]:
    folder = Path("/run/netns")
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Namespaces, BPF links and the RCU knob are after a test, failed or not, what they were before."""
    home = Path("/proc/thread-self/ns/net").readlink()
    before = _held_namespaces(), _named_namespaces(), set(bpf.link_ids()), RCU.read_text()
    yield
    assert Path("/proc/thread-self/ns/net").readlink() == home, "the test left its thread in another namespace"
    deadline = time.monotonic() + 5  # a link of somebody else on this host may come and go
    while set(bpf.link_ids()) - before[2] and time.monotonic() < deadline:
        time.sleep(0.1)
    after = _held_namespaces(), _named_namespaces(), set(bpf.link_ids()), RCU.read_text()
    for what, old, new in zip(("namespaces", "named namespaces", "BPF links"), before[:3], after[:3], strict=True):
        assert isinstance(old, set)
        assert isinstance(new, set)
        assert not new - old, f"{what} left behind: {new - old}"
    assert after[3] == before[3], "rcu_expedited was not put back"


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
