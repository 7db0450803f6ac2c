"""Sockets that are hard to take: of groups that others balance, of processes with thousands, of odd families."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrecv import lookup_life
from fastrecv.bpf import Object
from fastrecv.errors import SocketRefusedError
from fastrecv.lookup import Dispatcher
from fastrecv.steerable import cookie_of
from tests.kernel.commands import WEB, Command
from tests.kernel.steering import TCP, UDP, Compile, Stage, bound
from tests.kernel.test_lookup import SLOTS
from tests.kernel.test_lookup_cli_sockets import HOME, holding, registered

SOCKETS = 1500


@pytest.fixture
def loaded(stage: Stage, bpffs: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    command = Command(bpffs, capsys)
    assert command.done("load") == "loaded\n"
    return command


# A group that somebody balances


@pytest.fixture
def held(stage: Stage, compile_bpf: Compile) -> Iterator[int]:
    """The descriptor of a UDP socket that a REUSEPORT_SOCKARRAY holds."""
    with Object(compile_bpf("slots", SLOTS), "slots") as balancing:
        balancing.set(slot=0)
        balancing.load()
        worker = stage.serve("worker", UDP, HOME, 8053, reuseport=True)
        balancing.maps["slots"].update([0], [worker.fileno()])
        yield worker.fileno()


@pytest.mark.parametrize("label", ["web", "new"])
@pytest.mark.parametrize("add", [False, True])
def test_where_one_of_the_destinations_cannot_be_served_none_is_changed(
    stage: Stage, bpffs: Path, held: int, label: str, add: bool
) -> None:
    before, after = (stage.serve(name, TCP, HOME, port) for name, port in (("before", 8008), ("after", 8009)))
    lookup_life.load(bpffs=bpffs)
    with Dispatcher(bpffs=bpffs) as dispatcher:
        dispatcher.bind(bound(TCP, "198.51.100.1", "web"))
        dispatcher.register("web", [before])
        document, serving = dispatcher.state.encode(), dispatcher.serving()
        with pytest.raises(SocketRefusedError, match="a REUSEPORT_SOCKARRAY holds the socket"):
            dispatcher.register(label, [after, stage.servers["worker"]], add=add)
        assert (dispatcher.state.encode(), dispatcher.serving()) == (document, serving)
    with Dispatcher(bpffs=bpffs, read_only=True) as dispatcher:
        assert dispatcher.state.encode() == document
        (found,) = dispatcher.serving()
        assert found.sockets == [cookie_of(before)]
    assert stage.ask(TCP, "198.51.100.1") == "before"
    lookup_life.unload(bpffs=bpffs)


def test_the_command_registers_no_label_where_the_socket_of_one_is_held(
    loaded: Command, stage: Stage, held: int
) -> None:
    loaded.done("bind", *WEB)
    fits = stage.serve("service", TCP, HOME, 8008).fileno()
    said = loaded.refused("register", "web", "--fd", fits, "--fd", held)
    assert "a REUSEPORT_SOCKARRAY holds the socket" in said
    assert registered(loaded) == []
    assert len(loaded("status", "--json").json["destinations"]) == 1


def test_a_fifth_socket_that_would_be_added_changes_nothing_for_the_other_protocol(
    loaded: Command, stage: Stage
) -> None:
    group = [stage.serve(f"udp{number}", UDP, HOME, 8053, reuseport=True).fileno() for number in range(5)]
    listener = stage.serve("service", TCP, HOME, 8008).fileno()
    loaded.done("register", "web", *(word for fd in group[:4] for word in ("--fd", fd)))
    said = loaded.refused("register", "web", "--fd", listener, "--fd", group[4], "--add")
    assert said == "4 sockets are registered there already, no more are kept"
    assert registered(loaded) == [("web", "ipv4", "udp", 4)]


# Processes


@contextlib.contextmanager
def busy() -> Iterator[subprocess.Popen[str]]:
    """A process with a thread, and more sockets than a process may usually have, of which the last is a service's."""
    text = f"""
import resource, socket, threading
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
kept = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range({SOCKETS})]
for sock in kept[::2]:
    sock.bind(("127.0.0.1", 0))
service = socket.create_server(("{HOME}", 8008))
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "\n"
            yield child
        finally:
            child.kill()


@contextlib.contextmanager
def few_descriptors(number: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_a_process_with_thousands_of_sockets_costs_no_more_descriptors_than_one_with_few(
    loaded: Command, stage: Stage
) -> None:
    loaded.done("bind", *WEB)
    before = descriptors()
    with busy() as child:
        with few_descriptors(256):
            assert loaded.done("register-pid", child.pid, "web", "tcp", HOME, 8008) == "registered web ipv4 tcp\n"
            said = loaded.refused("register-pid", child.pid, "web", "tcp", HOME, 9)
        assert said.startswith(f"process {child.pid} has no tcp socket on {HOME} port 9; it has tcp {HOME} port 8008, ")
        assert registered(loaded) == [("web", "ipv4", "tcp", 1)]
    assert descriptors() == before, "copies stay open"
    assert registered(loaded) == [], "nobody keeps the socket alive"


def test_the_id_of_a_thread_is_none_of_a_process(loaded: Command) -> None:
    with busy() as child:
        (thread,) = {int(entry.name) for entry in Path(f"/proc/{child.pid}/task").iterdir()} - {child.pid}
        assert loaded.refused("register-pid", thread, "web", "tcp", HOME, 8008) == f"there is no process {thread}"
    assert registered(loaded) == []


@pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])
def test_an_ipv4_address_that_is_bound_in_an_ipv6_socket_is_found_by_its_usual_name(
    loaded: Command, stage: Stage, kind: int
) -> None:
    service, name = stage.serve("service", kind, f"::ffff:{HOME}", 8008), "tcp" if kind == TCP else "udp"
    loaded.done("bind", "web", name, "198.51.100.0/24", 80)
    with holding(service) as child:
        said = loaded.done("register-pid", child.pid, "web", name, HOME, 8008)
        assert f"web ipv4 {name}" in said.partition(";")[0]
        assert stage.ask(kind, "198.51.100.1", 80) == "service"
