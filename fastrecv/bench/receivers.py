"""The contenders: every way to empty a datagram socket that the receive bench compares, each written as users write it.

A contender opens on a bound socket and then answers a full queue with what is to be timed, so that whatever it has to
set up stays outside of the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

from fastrecv import Receiver
from fastrecv.bench.limit import CLoop
from fastrecv.bpf import packaged
from fastrecv.options import Features

__all__ = ["BASICS", "Contender", "Ready", "again", "c_loop_with", "in_sockmap", "missing", "receiver_with"]

Ready = Callable[[int], Callable[[], int]]
"""Called when so many datagrams are queued; gives what is timed, which returns how many it has received."""

Kind = Literal["limit", "python", "asyncio", "fastrecv"]

_LARGEST = 65535
_PATIENCE = 20.0  # seconds until an event loop that waits for a lost datagram is stopped
_CONTROL = 256  # bytes: more than all control messages of one datagram take
_ADAPTER = "fastrecv.adapters.asyncio"


@dataclass(frozen=True)
class Contender:
    """One way to receive. libraries : modules that it needs.

    warm : datagrams of the drain before, which is not timed: enough to touch all memory that the next will use, which
    for a Receiver is two arenas.
    """

    name: str
    title: str
    kind: Kind
    open: Callable[[socket.socket], AbstractContextManager[Ready]]
    libraries: tuple[str, ...] = ()
    warm: int = 256


def missing(contender: Contender) -> str:
    """The module that the contender lacks here; "" when nothing is missing."""
    for library in contender.libraries:
        try:
            importlib.import_module(library)
        except ImportError as error:
            return error.name or library
    return ""


@contextlib.contextmanager
def _c_loop(sock: socket.socket, **features: Unpack[Features]) -> Iterator[Ready]:
    if features:
        Receiver(sock, **features).close()  # leaves the options set on the socket
    with CLoop(control=_CONTROL if features else 0) as loop:
        yield lambda _: partial(loop.drain, sock.fileno())


@contextlib.contextmanager
def _recvfrom(sock: socket.socket) -> Iterator[Ready]:
    def drain() -> int:
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                _data, _source = sock.recvfrom(_LARGEST, socket.MSG_DONTWAIT)
                count += 1
        return count

    yield lambda _: drain


@contextlib.contextmanager
def _recvfrom_into(sock: socket.socket) -> Iterator[Ready]:
    buffer = bytearray(_LARGEST)

    def drain() -> int:
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                _length, _source = sock.recvfrom_into(buffer, 0, socket.MSG_DONTWAIT)
                count += 1
        return count

    yield lambda _: drain


@contextlib.contextmanager
def _recv_into(sock: socket.socket) -> Iterator[Ready]:
    buffer = bytearray(_LARGEST)

    def drain() -> int:
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                _length = sock.recv_into(buffer, 0, socket.MSG_DONTWAIT)
                count += 1
        return count

    yield lambda _: drain


@contextlib.contextmanager
def _recvmsg_into(sock: socket.socket) -> Iterator[Ready]:
    buffers = [bytearray(_LARGEST)]

    def drain() -> int:
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                _length, _control, _flags, _source = sock.recvmsg_into(buffers, 0, socket.MSG_DONTWAIT)
                count += 1
        return count

    yield lambda _: drain


@contextlib.contextmanager
def _receiver(sock: socket.socket, **features: Unpack[Features]) -> Iterator[Ready]:
    with Receiver(sock, **features) as receiver:

        def drain() -> int:
            count = 0
            while batch := receiver.recv(0):
                count += len(batch)
            return count

        yield lambda _: drain


@contextlib.contextmanager
def _each_view(sock: socket.socket) -> Iterator[Ready]:
    with Receiver(sock) as receiver:

        def drain() -> int:
            count = 0
            while batch := receiver.recv(0):
                for _view, _source in batch:
                    count += 1
            return count

        yield lambda _: drain


@contextlib.contextmanager
def _each_copy(sock: socket.socket) -> Iterator[Ready]:
    with Receiver(sock) as receiver:

        def drain() -> int:
            count = 0
            while batch := receiver.recv(0):
                for _data, _source in batch.datagrams():
                    count += 1
            return count

        yield lambda _: drain


class _Protocol(asyncio.DatagramProtocol):
    """Counts down to 0 and then stops the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.left = 0
        self.loop = loop
        self.closed = loop.create_future()

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:  # noqa: ARG002 - asyncio's signature
        self.left -= 1
        if not self.left:
            self.loop.stop()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self.closed.set_result(None)


class _BatchProtocol(_Protocol):
    """The same, told of whole batches, which the adapter of fastrecv does."""

    def datagrams_received(self, batch: Any) -> None:
        self.left -= len(batch)
        if not self.left:
            self.loop.stop()


@contextlib.contextmanager
def _endpoint(
    sock: socket.socket, *, uvloop: bool = False, adapter: bool = False, protocol: type[_Protocol] = _Protocol
) -> Iterator[Ready]:
    """A datagram endpoint of an event loop on the socket: the loop's own, or the adapter's."""
    loop: asyncio.AbstractEventLoop = (importlib.import_module("uvloop") if uvloop else asyncio).new_event_loop()
    try:
        create = (
            importlib.import_module(_ADAPTER).create_datagram_endpoint if adapter else loop.create_datagram_endpoint
        )
        counting = protocol(loop)

        async def connect() -> asyncio.BaseTransport:
            transport: asyncio.BaseTransport
            transport, _ = await create(lambda: counting, sock=sock.dup())
            return transport

        transport = loop.run_until_complete(connect())

        def ready(expected: int) -> Callable[[], int]:
            counting.left = expected
            return run

        def run() -> int:
            expected = counting.left
            late = loop.call_later(_PATIENCE, loop.stop)
            loop.run_forever()
            late.cancel()
            return expected - counting.left

        try:
            yield ready
        finally:
            transport.close()
            loop.run_until_complete(counting.closed)
    finally:
        loop.close()


@contextlib.contextmanager
def _process(sock: socket.socket) -> Iterator[Ready]:
    """Stock asyncio in a process of its own; stock_asyncio.py says why."""
    script = Path(__file__).with_name("stock_asyncio.py")
    command = [sys.executable, "-I", str(script), str(sock.fileno())]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, pass_fds=[sock.fileno()]) as child:  # noqa: S603 - our own
        assert child.stdin is not None
        assert child.stdout is not None
        tell, answers = child.stdin, child.stdout

        def ready(expected: int) -> Callable[[], int]:
            def drain() -> int:
                tell.write(f"{expected}\n")
                tell.flush()
                return int(answers.readline() or 0)

            return drain

        yield ready


BASICS = (
    Contender("c-loop", "C loop (recvmmsg)", "limit", _c_loop),
    Contender("recvfrom", "socket.recvfrom", "python", _recvfrom),
    Contender("recvfrom-into", "socket.recvfrom_into", "python", _recvfrom_into),
    Contender("recv-into", "socket.recv_into (no source)", "python", _recv_into),
    Contender("recvmsg-into", "socket.recvmsg_into", "python", _recvmsg_into),
    Contender("asyncio", "asyncio, in a process of its own", "asyncio", _process),
    Contender("asyncio-here", "asyncio, in this process", "asyncio", _endpoint),
    Contender("uvloop", "uvloop", "asyncio", partial(_endpoint, uvloop=True), libraries=("uvloop",)),
    Contender("receiver", "Receiver.recv", "fastrecv", _receiver),
    Contender("receiver-views", "Receiver, for view, source in batch", "fastrecv", _each_view),
    Contender("receiver-copies", "Receiver, batch.datagrams()", "fastrecv", _each_copy),
    Contender("adapter", "adapter on asyncio", "fastrecv", partial(_endpoint, adapter=True), libraries=(_ADAPTER,)),
    Contender("adapter-uvloop", "adapter on uvloop", "fastrecv", partial(_endpoint, uvloop=True, adapter=True),
              libraries=("uvloop", _ADAPTER)),
    Contender("adapter-batches", "adapter on asyncio, datagrams_received", "fastrecv",
              partial(_endpoint, adapter=True, protocol=_BatchProtocol), libraries=(_ADAPTER,)),
)  # fmt: skip
"""What every payload size is received by."""

_NAMED = {contender.name: contender for contender in BASICS}


def again(name: str) -> Contender:
    """The same contender once more: by how much two equal things differ in this run."""
    original = _NAMED[name]
    return replace(original, name=f"{name}-again", title=f"{original.title} again (A/A)")


def _slug(label: str) -> str:
    return label.replace(" ", "-")


def c_loop_with(label: str, **features: Unpack[Features]) -> Contender:
    """The C loop on a socket with these features on; it takes the control messages and does not read them."""
    return Contender(f"c-loop-{_slug(label)}", f"C loop, {label}", "limit", partial(_c_loop, **features))


def receiver_with(label: str, **features: Unpack[Features]) -> Contender:
    """Receiver.recv with these features on."""
    opened = partial(_receiver, **features)
    warm = 3 * 64 * (64 if features.get("gro") else 1)  # batches of trains of so many datagrams
    return Contender(f"receiver-{_slug(label)}", f"Receiver.recv, {label}", "fastrecv", opened, warm=warm)


def in_sockmap(name: str) -> Contender:
    """A contender on a socket that sits in a SOCKMAP, as every socket does that a BPF program may choose."""
    original = _NAMED[name]

    @contextlib.contextmanager
    def opened(sock: socket.socket) -> Iterator[Ready]:
        with packaged("assign") as assign:
            assign.load().maps["sockets"].update([0], [sock.fileno()])
            with original.open(sock) as ready:
                yield ready

    return replace(original, name=f"{name}-sockmap", title=f"{original.title}, in a SOCKMAP", open=opened)
