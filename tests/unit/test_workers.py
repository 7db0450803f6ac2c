"""Settings, counters and handlers of supervised services: what is right, and a line for each thing that is wrong."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastrecv._recv import MAX_BATCH
from fastrecv.errors import StateError
from fastrecv.receiver import Statistics
from fastrecv.workers.control import listener
from fastrecv.workers.counters import FILLS, ROW, STATES, Counters
from fastrecv.workers.handlers import HandlerError, called, load
from fastrecv.workers.settings import MAX_WORKERS, Settings, identity, is_tcp, parsed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"bind": "192.0.2.1"},
            "'192.0.2.1' is no address to bind to: give ADDRESS:PORT, like 0.0.0.0:2055, or [ADDRESS]:PORT, "
            "with tcp: before",
        ),
        ({"bind": "localhost:53"}, "'localhost:53' is no address"),
        ({"bind": "::1:53"}, "'::1:53' is no address"),
        ({"bind": "[127.0.0.1]:53"}, "is no address"),
        ({"bind": "127.0.0.1:0"}, "is no address"),
        ({"bind": "sctp:127.0.0.1:53"}, "'sctp:127.0.0.1:53' is no address"),
        ({"bind": "tcp:udp:127.0.0.1:53"}, "is no address"),
        ({"bind": "tcp:53"}, "is no address"),
        ({"bind": "127.0.0.1:65536"}, "is no address"),
        ({"policy": "sauce"}, "policy 'sauce': give source"),
        *(
            ({"handler": name}, "names no handler: give package.module:name")
            for name in ("", "a", "a:", ":b", "a:b()", "./a:b", "a:b:c", "a..b:c")
        ),
        ({"workers": 0}, "workers: 0 is out of range: give 1 to 128"),
        ({"workers": 129}, "workers: 129 is out of range: give 1 to 128"),
        ({"batch_size": 1025}, "batch_size: 1025 is out of range: give 1 to 1,024"),
        ({"receive_buffer": 0}, "receive_buffer: 0 is out of range: give 1 to"),
        ({"timeout": -1.0}, "timeout: -1.0 is out of range: give 0 to 86400 seconds"),
        ({"timeout": float("nan")}, "timeout: nan"),
        ({"graceful_timeout": float("inf")}, "graceful_timeout: inf"),
        ({"metrics": "9100"}, "'9100' is no address to bind to: give ADDRESS:PORT"),
        ({"control": ""}, "control: '' is no path of 1 to 107 bytes"),
        ({"control": "/" + 107 * "x"}, "is no path of 1 to 107 bytes"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(**{"handler": "a:b"} | wrong)


def test_addresses_to_bind_to() -> None:
    assert parsed("192.0.2.1:2055") == ("192.0.2.1", 2055)
    assert parsed("[::]:53") == parsed("udp:[::]:53") == parsed("tcp:[::]:53") == ("::", 53)
    assert [is_tcp(bind) for bind in ("192.0.2.1:2055", "udp:192.0.2.1:2055", "tcp:[::]:53")] == [False, False, True]


def test_whom_workers_become() -> None:
    assert identity(None, None) == (None, None, [])
    assert identity("0", None) == identity("root", None)
    assert identity("root", None)[:2] == (0, 0)
    assert identity("nobody", "0")[1] == 0
    assert 0 in identity("nobody", "0").groups
    assert identity(None, "0") == (None, 0, [0])
    assert identity("4000000000", "0") == (4_000_000_000, 0, [0])


@pytest.mark.parametrize(
    ("user", "group", "message"),
    [
        ("nonsense", None, "there is no user 'nonsense'"),
        ("4294967295", "0", "there is no user '4294967295'"),
        (None, "nonsense", "there is no group 'nonsense'"),
        ("root", "4294967295", "there is no group '4294967295'"),
        ("4000000000", None, "user 4000000000 has no entry that names its group: give the group, too"),
    ],
)
def test_nobody_can_become_them(user: str | None, group: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        identity(user, group)


def received(datagrams: int, batches: int = 1) -> Statistics:
    return Statistics(batches, datagrams, 100 * datagrams, 0, 0, 0)


def test_a_row_is_counted_on_by_the_next_worker() -> None:
    with Counters() as counters:
        first = counters.row(3)
        first.begin(41)
        first.received(received(10), 10)
        first.handled(10, 500)
        first.received(received(17, 2), 7)
        first.rings(10, 3)
        first.rings(17, 3)
        assert first.settle() == 7
        assert first.settle() == 0
        second = counters.row(3)
        second.begin(42)
        second.received(received(5), 5)
        second.rings(13, 0)
        second.failed(5)
        second.stop()
        second.died()
        second.closed(9)
        assert second.settle() == 0
        rows = counters.read()
    assert len(rows) == MAX_WORKERS
    row = rows[3]
    assert {name: int(row[name]) for name in ROW.names or () if name not in ("heartbeat", "fill")} == {
        "pid": 42, "state": STATES.index("idle"), "datagrams": 22, "bytes": 2200, "batches": 3, "truncated": 0,
        "handled": 10, "handler_ns": 500, "failed": 5, "errors": 1, "killed": 7, "starts": 2, "snapshot": 0,
        "deaths": 1, "closed_drops": 9, "by_ring": 30, "ring_drops": 3,
    }  # fmt: skip
    assert row["fill"].tolist() == [0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0]  # 5 and 7, 10
    assert ROW.itemsize % 64 == 0
    assert not rows["datagrams"][:3].any()


def test_the_largest_batch_has_a_place_in_the_histogram() -> None:
    with Counters() as counters:
        row = counters.row(MAX_WORKERS - 1)
        for datagrams in (1, 2, 3, 1023, MAX_BATCH):
            row.received(received(datagrams), datagrams)
        assert counters.read()["fill"][-1].tolist() == [1, 2, *[0] * (FILLS - 4), 1, 1]


def test_a_control_socket_replaces_that_of_the_dead_only(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    listener(path).close()
    with listener(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(StateError, match=f"{path} is served already, by process {os.getpid()}: stop it, or give"):
            listener(path)
    path.unlink()
    path.write_text("mine")
    with pytest.raises(StateError, match=f"{path} is there and is no socket: remove it, or give another path"):
        listener(path)
    assert path.read_text() == "mine"
    with pytest.raises(FileNotFoundError, match=f"cannot make the control socket {tmp_path}/absent/path: No such"):
        listener(tmp_path / "absent" / "path")


def test_counters_are_seen_by_other_processes_and_cannot_be_cut_off() -> None:
    with Counters() as counters:
        program = (
            "import sys; from fastrecv.workers.counters import Counters\n"
            "with Counters(int(sys.argv[1])) as counters: counters.row(1).begin(99); counters.row(1).handled(7, 1)\n"
        )
        words = [sys.executable, "-c", program, str(counters.fd)]
        subprocess.run(words, pass_fds=[counters.fd], check=True)
        assert counters.read()["handled"].tolist()[:3] == [0, 7, 0]
        assert counters.row(1).heartbeat > 0
        assert fcntl.fcntl(counters.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        with pytest.raises(PermissionError):
            os.ftruncate(counters.fd, 0)


HANDLERS = """
def handle(batch): return batch
async def handle_async(batch): return batch
def serve(sockets): return sockets
def nothing(): pass
def two(batch, more): pass
number = 3
class Full:
    def __init__(self): self.seen = []
    def start(self): self.seen.append("start")
    def handle(self, batch): self.seen.append(batch)
    async def stop(self): self.seen.append("stop")
class Loop:
    def serve(self, sockets): pass
class Stateful:
    def handle(self, batch): pass
    async def snapshot(self): return b""
    def restore(self, data): pass
class Snapshot:
    def handle(self, batch): pass
    def snapshot(self): return b""
class Restore:
    def handle(self, batch): pass
    def restore(self, data): pass
class Asking:
    def handle(self, batch): pass
    def snapshot(self, what): return b""
    def restore(self, data): pass
class Deaf:
    def handle(self, batch): pass
    def snapshot(self): return b""
    def restore(self): pass
class StatefulLoop:
    def serve(self, sockets): pass
    def snapshot(self): return b""
    def restore(self, data): pass
class Both:
    def handle(self, batch): pass
    def serve(self, sockets): pass
class Neither: pass
def yields(batch): yield
async def yields_async(batch): yield
class Ends:
    def __init__(self): raise SystemExit("why")
class Fails:
    def __init__(self): raise RuntimeError("not\\ntoday")
class Outer:
    class Inner:
        def handle(self, batch): pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "handlers_under_test.py").write_text(HANDLERS)
    (tmp_path / "wrong_syntax.py").write_text("def\n")
    (tmp_path / "wrong_import.py").write_text("import nonsense_inside\n")
    (tmp_path / "wrong_run.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name == "handlers_under_test" or name.startswith("wrong_")]:
        monkeypatch.delitem(sys.modules, name)
    return "handlers_under_test"


def test_functions_and_classes_are_handlers(module: str) -> None:
    plain, loop = load(f"{module}:handle"), load(f"{module}:serve")
    assert plain.handle is not None
    assert plain.handle(7) == 7
    assert (plain.serve, plain.asynchronous) == (None, False)
    assert load(f"{module}:handle_async").asynchronous
    assert loop.serve is not None
    assert loop.handle is None
    assert load(f"{module}:Loop").handle is None
    assert load(f"{module}:Outer.Inner").handle is not None
    assert not load(f"{module}:Full").stateful
    stateful = load(f"{module}:Stateful")
    assert stateful.stateful
    assert stateful.asynchronous


def test_a_class_is_made_once_for_each_worker(module: str) -> None:
    one, other = load(f"{module}:Full"), load(f"{module}:Full")
    assert one.asynchronous

    async def live() -> None:
        await called(one.start)
        await called(one.handle, 5)
        await called(one.stop)
        await called(load(f"{module}:Loop").start)

    asyncio.run(live())
    assert one.handle is not None
    assert other.handle is not None
    assert one.handle.__self__.seen == ["start", 5, "stop"]  # type: ignore[attr-defined]
    assert other.handle.__self__.seen == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:handle", "there is no module 'no_such_module' on the path of"),
        ("{}.below:handle", "there is no module 'handlers_under_test.below'"),
        ("{}:absent", "handlers_under_test has no 'absent'"),
        ("{}:number", "is int, not a function or a class"),
        ("{}:nothing", "must take one argument, the batch"),
        ("{}:two", "must take one argument, the batch"),
        ("{}:Both", "has both handle and serve: give it one"),
        ("{}:Neither", "has neither handle nor serve"),
        ("{}:yields", "is a generator, whose code would never run: leave yield out"),
        ("{}:yields_async", "is a generator"),
        ("{}:Ends", "cannot be made: SystemExit: why"),
        ("{}:Snapshot", "has snapshot and no restore: give it both, or neither"),
        ("{}:Restore", "has restore and no snapshot: give it both, or neither"),
        ("{}:Asking", ".snapshot' must take no argument"),
        ("{}:Deaf", ".restore' must take one argument, the data"),
        ("{}:StatefulLoop", "has serve, whose state is not kept: leave snapshot and restore out"),
        ("{}:Fails", "cannot be made: RuntimeError: not today ("),
        ("wrong_syntax:handle", "cannot be imported: SyntaxError: "),
        ("wrong_import:handle", "cannot be imported: ModuleNotFoundError: No module named 'nonsense_inside' ("),
        ("wrong_run:handle", "cannot be imported: ZeroDivisionError: division by zero ("),
    ],
)
def test_what_is_no_handler(name: str, message: str, module: str) -> None:
    with pytest.raises(HandlerError) as caught:
        load(name.format(module))
    said = str(caught.value)
    assert said.startswith(repr(name.format(module))[:-1])
    assert message in said
    assert "\n" not in said


def test_what_was_cancelled_is_an_exception_as_others_are_to_who_awaits_it() -> None:
    """A CancelledError, which is no Exception, would end the worker."""

    async def handle() -> None:
        task = asyncio.ensure_future(asyncio.sleep(10))
        asyncio.get_running_loop().call_soon(task.cancel)
        await task

    with pytest.raises(RuntimeError, match="it has awaited what was cancelled"):
        asyncio.run(called(handle))

    async def cancelled() -> None:
        task = asyncio.ensure_future(called(asyncio.sleep, 10))
        asyncio.get_running_loop().call_soon(task.cancel)
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
