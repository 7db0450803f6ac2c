"""Processes that change a dispatcher, to be killed while they do; and what a state must be to be whole."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address, ip_address, ip_network
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fastrecv import bpf, generations, lookup, lookup_life, members, pins, steerable
from fastrecv.errors import StateError
from fastrecv.lookup import Dispatcher, directory_of
from fastrecv.rules import Binding, Destination
from tests.kernel.steering import PORT, UDP, Stage

ROOT = Path(__file__).parents[2]
SETS = range(5)
EVERYWHERE = ["198.51.100.0/24", "2001:db8:7::/64"]
PAIR = ["198.51.100.240/32", "198.51.100.241/32"]  # bound and unbound in one step
FILES = {module.__file__ for module in (generations, lookup, lookup_life, members, pins)}
CHANGING = {
    *("load", "_load", "unload", "_detach", "_heal", "_put_in_force", "_clean", "register", "put", "_empty"),
    *("build", "pin", "point", "remove", "write_document"),
}  # functions whose lines are the steps
REFUSALS = ("no dispatcher is loaded", "is loaded in this network namespace already", "not bound", "no socket is")
PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def binding(prefix: str, label: str) -> Binding:
    return Binding("any", ip_network(prefix), (PORT, PORT), label)


def rules(number: int) -> list[Binding]:
    """A rule set that shares its prefixes with the others, and its label with none: a mixture has two labels."""
    own = [f"198.51.100.{number * 16 + last}/32" for last in range(2 * number + 1)]
    return [binding(prefix, f"set{number}") for prefix in [*EVERYWHERE, *own]]


EXTRAS = [binding(prefix, "pair") for prefix in PAIR]


def told(bindings: Sequence[Binding]) -> tuple[int | None, bool]:
    """Which rule set this is (None: none), and whether the pair is with it."""
    extras = [each for each in bindings if each.label == "pair"]
    rest = [each for each in bindings if each.label != "pair"]
    assert extras in ([], EXTRAS)
    if not rest:
        return None, bool(extras)
    number = int(str(rest[0].label).removeprefix("set"))
    assert set(rest) == set(rules(number)), "a mixture of rule sets"
    assert len(rest) == len(rules(number))
    return number, bool(extras)


class Watched(Dispatcher):
    """Says whether opening it has put something right."""

    healed = False

    def _heal(self) -> None:
        before = self._inside()
        super()._heal()
        self.healed = self._inside() != before

    def _inside(self) -> list[str]:
        return [*sorted(map(str, self._directory.rglob("*"))), str((self._directory / "current").readlink())]


def served(stage: Stage) -> dict[str, int]:
    """A server for each label; their cookies by label."""
    for number, label in enumerate([*(f"set{number}" for number in SETS), "pair"]):
        stage.serve(label, UDP, "198.51.100.254", 7100 + number).set_inheritable(True)
    return {label: steerable.cookie_of(server) for label, server in stage.servers.items()}


def asked(prefix: str) -> tuple[str, str]:
    """An address of the prefix, and one to ask from."""
    return str(ip_network(prefix)[0]), "2001:db8:7::1" if ":" in prefix else "198.51.100.253"


def destination(of: Binding) -> Destination:
    family = socket.AF_INET if of.prefix.version == 4 else socket.AF_INET6
    return Destination(of.label, family, socket.IPPROTO_UDP)


def assert_in_force(dispatcher: Dispatcher, cookies: dict[str, int]) -> None:
    """The program that is attached, its document and its sockets say the same."""
    assert dispatcher.link is not None
    assert dispatcher.link.program_id == dispatcher.program.info.id
    assert dispatcher.program.info.tag == dispatcher.state.tag
    told(dispatcher.bindings)
    for each in dispatcher.bindings:
        host, source = asked(str(each.prefix))
        members = dispatcher.sockets_of(destination(each))
        assert members in ([], [cookies[str(each.label)]])
        expected = (1, members[0]) if members else (0, 0)
        run = bpf.run_sk_lookup(
            dispatcher.program, socket.IPPROTO_UDP, (ip_address(source), 5000), (ip_address(host), PORT)
        )
        assert run == expected, f"{each}: {run} instead of {expected}"


def assert_tidy(directory: Path) -> None:
    """One generation, and nothing half-made."""
    current = (directory / "current").readlink().name
    assert {str(entry.relative_to(directory)) for entry in directory.rglob("*")} == {
        "link", "sockets", "counts", "current", current, f"{current}/program", f"{current}/document",
    }  # fmt: skip


def assert_clients_arrive(stage: Stage, dispatcher: Dispatcher) -> None:
    """Real clients come to the socket that the binding names. Nobody else can change it meanwhile."""
    for each in dispatcher.bindings:
        if each.prefix.version == 4 and not dispatcher.sockets_of(destination(each)):
            dispatcher.register(str(each.label), [stage.servers[str(each.label)]])
    asking = [each for each in dispatcher.bindings if isinstance(each.prefix.network_address, IPv4Address)]
    for each in [*asking[:1], *asking[-1:]]:
        assert stage.ask(UDP, asked(str(each.prefix))[0]) == each.label


def directory(stage: Stage, bpffs: Path) -> Path:
    return directory_of(bpffs / "fastrecv", stage.namespace.cookie)


def attached(stage: Stage) -> list[int]:
    return [link.program_id for link in bpf.sk_lookup_links().values() if link.netns_inode == stage.namespace.inode]


def assert_loads_anew(stage: Stage, bpffs: Path) -> None:
    """Nothing is attached, and what lies there does not hinder the next load."""
    assert attached(stage) == []
    for read_only in (True, False):
        with pytest.raises(StateError, match="no dispatcher is loaded"):
            Dispatcher(bpffs=bpffs, read_only=read_only)
    lookup_life.load(bpffs=bpffs)


def assert_gone(stage: Stage, bpffs: Path) -> None:
    assert [*(bpffs / "fastrecv").iterdir()] == []
    assert attached(stage) == []


# In processes of their own


def inherited() -> tuple[Path, dict[str, socket.socket]]:
    """The BPF file system, and the servers by their labels."""
    bpffs, *servers = sys.argv[3:]
    opened = (word.split("=") for word in servers)
    return Path(bpffs), {label: socket.socket(fileno=int(fd)) for label, fd in opened}


@contextlib.contextmanager
def helper(name: str, stage: Stage, bpffs: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A fresh interpreter that runs a function of this module in the stage's namespace."""
    command = [sys.executable, "-c", f"from tests.kernel.crashing import {name}; {name}()", *words, str(bpffs)]
    servers = {label: server.fileno() for label, server in stage.servers.items()}
    with subprocess.Popen(
        [*command, *(f"{label}={fd}" for label, fd in servers.items())], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, pass_fds=servers.values(),
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


Change = Callable[[Path, dict[str, socket.socket]], object]


def _opened(change: Callable[[Dispatcher, dict[str, socket.socket]], object], adopt: bool = False) -> Change:
    def run(bpffs: Path, servers: dict[str, socket.socket]) -> None:
        with Dispatcher(bpffs=bpffs, adopt=adopt) as dispatcher:
            change(dispatcher, servers)

    return run


CHANGES: dict[str, Change] = {
    "load": lambda bpffs, _: lookup_life.load(bpffs=bpffs),
    "unload": lambda bpffs, _: lookup_life.unload(bpffs=bpffs),
    "open": _opened(lambda dispatcher, _: None),
    "replace": _opened(lambda dispatcher, _: dispatcher.replace_bindings(rules(2))),
    "upgrade": _opened(lambda dispatcher, _: dispatcher.upgrade(), adopt=True),
    "register": _opened(lambda dispatcher, servers: dispatcher.register("new", [servers["set2"]])),
}


def stepping() -> None:
    """Make a change in a child that ends before its nth step, for n = 1, 2, ... and tell where."""
    change, how = sys.argv[1:3]
    bpffs, servers = inherited()
    for number in count(1):
        child = os.fork()
        if child == 0:
            try:
                sys.settrace(_trap(number, how))
                CHANGES[change](bpffs, servers)
                sys.settrace(None)
                os.write(1, b"ended\n")
            except InterruptedError:
                pass
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        print(flush=True)
        if not sys.stdin.readline():
            break


def _trap(left: int, how: str) -> Callable[[FrameType, str, Any], Any]:
    def line(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        left -= event == "line"
        if left == 0 and event == "line":
            os.write(1, f"{frame.f_code.co_name}, line {frame.f_lineno}".encode())
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise InterruptedError("as the test wants it")
        return line

    def call(frame: FrameType, _event: str, _argument: object) -> Any:
        return line if frame.f_code.co_filename in FILES and frame.f_code.co_name in CHANGING else None

    return call


def steps(change: str, how: str, stage: Stage, bpffs: Path) -> Iterator[str]:
    """Begin the change again and again; each time it has ended a step later. Gives where."""
    with helper("stepping", stage, bpffs, change, how) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for place in process.stdout:
            assert place != "\n", "the change has failed by itself"
            if place == "ended\n":
                return
            yield place.strip()
            process.stdin.write("\n")
            process.stdin.flush()
        raise AssertionError("the helper has ended")


def working() -> None:
    """Keep a child at work; when it is killed, the next takes its place. Ends with its standard input."""
    seed = int(sys.argv[1])
    bpffs, servers = inherited()
    for number in count():
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            try:
                os.write(1, f"born {os.getpid()}\n".encode())
                work(random.Random(f"{seed} {number}"), bpffs, servers)
            except BaseException:
                os.write(1, f"failed {traceback.format_exc()!r}\n".encode())
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        ended = select.select([sys.stdin], [], [], 0)[0]
        if ended or os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            return


def work(draw: random.Random, bpffs: Path, servers: dict[str, socket.socket]) -> None:
    ways: dict[str, Callable[[Dispatcher], object]] = {
        "replace": lambda dispatcher: dispatcher.replace_bindings(rules(draw.choice(SETS))),
        "bind": lambda dispatcher: dispatcher.bind(*EXTRAS),
        "unbind": lambda dispatcher: dispatcher.unbind(*EXTRAS),
        "register": lambda dispatcher: dispatcher.register(label := draw.choice([*servers]), [servers[label]]),
        "unregister": lambda dispatcher: dispatcher.unregister(draw.choice([*servers])),
        "upgrade": Dispatcher.upgrade,
        "read": lambda dispatcher: told(dispatcher.bindings),
    }
    kinds = [*ways, "replace", "replace", "bind", "register", "register", "load", "load", "load", "unload"]
    pin = pins.pin

    def announced(thing: pins.Pinnable, path: Path) -> None:
        os.write(1, b"pinning .\n")
        pin(thing, path)

    pins.pin = announced
    while True:
        kind = draw.choice(kinds)
        begun, outcome = time.monotonic(), "done"
        try:
            if kind in ("load", "unload"):
                CHANGES[kind](bpffs, servers)
            else:
                with Watched(bpffs=bpffs, read_only=kind == "read", adopt=kind == "upgrade") as dispatcher:
                    outcome = "done and put right" if dispatcher.healed else outcome
                    ways[kind](dispatcher)
        except StateError as error:
            if not any(words in str(error) for words in REFUSALS):
                raise
            outcome = "refused"
        os.write(1, f"did {time.monotonic() - begun} {kind} {outcome}\n".encode())


class Pair:
    """Two processes at work, and what they have said."""

    def __init__(self, helpers: Sequence[subprocess.Popen[str]]) -> None:
        self.fds = [process.stdout.fileno() for process in helpers if process.stdout is not None]
        self.inputs = [process.stdin for process in helpers if process.stdin is not None]
        self.alive: dict[int, int] = {}  # descriptor to pid
        self.rest = dict.fromkeys(self.fds, b"")
        self.pinning: int | None = None  # who was last in the midst of a change
        self.did = Counter[str]()
        self.kills, self.longest = 0, 0.0

    def listen_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.listen(left)

    def listen(self, seconds: float | None) -> None:
        for fd in select.select(self.fds, [], [], seconds)[0]:
            data = os.read(fd, 1 << 16)
            if not data:
                self.fds.remove(fd)
            *lines, self.rest[fd] = (self.rest[fd] + data).split(b"\n")
            for word, text in (line.decode().split(" ", 1) for line in lines):
                assert word != "failed", text
                if word == "born":
                    self.alive[fd] = int(text)
                elif word == "pinning":
                    self.pinning = fd
                else:
                    took, what = text.split(" ", 1)
                    self.longest = max(self.longest, float(took))
                    self.did[what] += 1

    def kill(self, fd: int | None) -> None:
        if fd is not None and fd in self.alive:
            os.kill(self.alive.pop(fd), signal.SIGKILL)
            self.kills += 1

    def end(self) -> None:
        for file in self.inputs:
            file.close()
        while self.fds:
            for fd in self.fds:
                self.kill(fd)
            self.listen(None)
