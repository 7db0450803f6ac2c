"""asyncio's datagram endpoints over a Receiver: unmodified protocols get what one recvmmsg(2) brought, one by one.

Reading a batch at a wake-up, and sending the replies to it with one sendmmsg(2), is all that differs from
loop.create_datagram_endpoint. Works on any loop that has add_reader and add_writer: asyncio's own, and uvloop's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, Unpack

from fastrecv._recv import Batch
from fastrecv.adapters.sending import Sender
from fastrecv.backend import ReceiverBackend
from fastrecv.options import Options
from fastrecv.receiver import Receiver
from fastrecv.sockets import Address

__all__ = ["Transport", "create_datagram_endpoint"]

P = TypeVar("P", bound=asyncio.BaseProtocol)
_Pair = tuple[tuple[int, int], tuple[Any, Any]]  # (family, proto), (local address, remote address)

_LARGEST = 256 * 1024  # bytes of an AF_UNIX datagram that asyncio reads
_RETRY = 0.01  # seconds until arenas are asked for again when all are held


async def create_datagram_endpoint(
    protocol_factory: Callable[[], P],
    local_addr: tuple[str, int] | str | None = None,
    remote_addr: tuple[str, int] | str | None = None,
    *,
    family: int = 0,
    proto: int = 0,
    flags: int = 0,
    reuse_port: bool | None = None,
    allow_broadcast: bool | None = None,
    sock: socket.socket | None = None,
    **options: Unpack[Options],
) -> tuple[Transport, P]:
    """loop.create_datagram_endpoint of the running loop, over a Receiver; options: see fastrecv.Receiver.

    A protocol with a method datagrams_received(batch) is given whole batches instead, and may keep them: while it
    holds all arenas reading waits, and the loop's exception handler is told. What datagram_received raises goes there,
    too, and the rest of the batch is delivered. transport.get_extra_info("receiver") is the Receiver.
    """
    loop = asyncio.get_running_loop()
    remote = None
    given = sock
    if sock is None:
        sock, remote = await _open(loop, local_addr, remote_addr, family, proto, flags, reuse_port, allow_broadcast)
    else:
        asked = {"local_addr": local_addr, "remote_addr": remote_addr, "family": family, "proto": proto,
                 "flags": flags, "reuse_port": reuse_port, "allow_broadcast": allow_broadcast}  # fmt: skip
        if problems := ", ".join(f"{name}={value}" for name, value in asked.items() if value):
            raise ValueError(f"socket modifier keyword arguments can not be used when sock is specified. ({problems})")
        if sock.type != socket.SOCK_DGRAM:
            raise ValueError(f"A UDP Socket was expected, got {sock!r}")
        sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        options.setdefault("slot_size", _LARGEST)
    with contextlib.ExitStack() as undo:
        if given is None:
            undo.callback(sock.close)
        receiver = undo.enter_context(Receiver(sock, **options))
        protocol = protocol_factory()
        undo.pop_all()
    started = loop.create_future()
    transport = Transport(loop, sock, receiver, protocol, remote, started)
    try:
        await started
    except BaseException:
        transport.close()
        raise
    return transport, protocol


async def _open(
    loop: asyncio.AbstractEventLoop, local: Any, remote: Any, family: int, proto: int, flags: int,
    reuse_port: bool | None, allow_broadcast: bool | None,
) -> tuple[socket.socket, Address | None]:  # fmt: skip
    """A socket of the first pair of addresses that can be used, and the remote address."""
    failures = []
    for (kind, protocol), (here, there) in await _pairs(loop, local, remote, family, proto, flags):
        with contextlib.ExitStack() as undo:
            try:
                sock = undo.enter_context(socket.socket(kind, socket.SOCK_DGRAM, protocol))
                if reuse_port:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if allow_broadcast:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                sock.setblocking(False)
                if here:
                    sock.bind(here)
                if there and not allow_broadcast:
                    sock.connect(there)  # never waits: datagram sockets only take note
            except OSError as error:
                failures.append(error)
            else:
                undo.pop_all()
                return sock, there
    raise failures[0]


async def _pairs(
    loop: asyncio.AbstractEventLoop, local: Any, remote: Any, family: int, proto: int, flags: int
) -> list[_Pair]:
    """What the endpoint may be opened with, in the resolver's order."""
    if not (local or remote):
        if family == 0:
            raise ValueError("unexpected address family")
        return [((family, proto), (None, None))]
    if family == socket.AF_UNIX:
        for path in (local, remote):
            if path is not None and not isinstance(path, str):
                raise TypeError("string is expected")
        if local and local[0] != "\0":
            _remove_stale(local)
        return [((family, proto), (local, remote))]
    found: dict[tuple[int, int], list[Any]] = {}
    for place, address in enumerate((local, remote)):
        if address is None:
            continue
        if not (isinstance(address, tuple) and len(address) == 2):
            raise TypeError("2-tuple is expected")
        infos = await loop.getaddrinfo(*address, family=family, type=socket.SOCK_DGRAM, proto=proto, flags=flags)
        for kind, _, protocol, _, resolved in infos:
            found.setdefault((kind, protocol), [None, None])[place] = resolved
    usable: list[_Pair] = [
        (key, (here, there)) for key, (here, there) in found.items() if (here or not local) and (there or not remote)
    ]
    if not usable:
        raise ValueError("can not get address information")
    return usable


def _remove_stale(path: str) -> None:
    """Take a socket's path away that an earlier process has left; bind says what is wrong if that fails."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116 - a name as the kernel keeps it
            os.unlink(path)  # noqa: PTH108


class Transport(Sender):
    """A datagram transport that reads batches; made by create_datagram_endpoint."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        receiver: ReceiverBackend,
        protocol: asyncio.BaseProtocol,
        remote: Address | None,
        started: asyncio.Future[None],
    ) -> None:
        super().__init__(loop, sock, receiver, protocol, remote)
        self._rest: Iterator[tuple[bytes, Any]] | None = None  # of the batch that is being delivered
        self._retry: asyncio.TimerHandle | None = None  # while all arenas are held
        self._paused = False
        loop.call_soon(self._protocol.connection_made, self)
        loop.call_soon(self._start_reading)
        loop.call_soon(_set, started)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """From the next batch on; what is left of one goes to datagram_received."""
        super().set_protocol(protocol)
        self._batched = hasattr(protocol, "datagrams_received")

    def is_reading(self) -> bool:
        return not (self._closing or self._paused)

    def pause_reading(self) -> None:
        """Stop deliveries at once; what has been read already waits for resume_reading."""
        if self.is_reading():
            self._paused = True
            self._loop.remove_reader(self._fd)

    def resume_reading(self) -> None:
        if self._paused and not self._closing:
            self._paused = False
            self._start_reading()
            if self._rest is not None:
                self._loop.call_soon(self._read_ready)

    def _start_reading(self) -> None:
        if self.is_reading():
            self._loop.add_reader(self._fd, self._read_ready)

    def _stop_reading(self) -> None:
        super()._stop_reading()
        self._loop.remove_reader(self._fd)
        if self._retry is not None:
            self._retry.cancel()

    def _read_ready(self) -> None:
        """One wake-up: what is left of the last batch, or one more."""
        if not self.is_reading():
            return
        batch = None
        if self._rest is None:
            batch = self._receive()
            if batch is None or not len(batch):
                return
            if not self._batched:
                self._rest = batch.datagrams()
        self._collecting = True
        try:
            if self._rest is not None:
                self._deliver(self._rest)
            else:
                self._call("datagrams_received", batch)
        finally:
            self._collecting = False
            self._flush()

    def _receive(self) -> Batch | None:
        try:
            batch = self._receiver.recv_nowait()
        except BufferError as error:
            self._starve(error)
            return None
        except OSError as error:
            if self._receiver.closed:
                self._fatal_error(error, "The Receiver of a datagram transport was closed under it")
            else:
                self._protocol.error_received(error)
            return None
        except Exception as error:
            self._fatal_error(error, "Fatal read error on datagram transport")
            return None
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
            self._start_reading()
        return batch

    def _deliver(self, rest: Iterator[tuple[bytes, Any]]) -> None:
        for data, address in rest:
            try:
                self._protocol.datagram_received(data, address)
            except (SystemExit, KeyboardInterrupt):
                self._loop.call_soon(self._read_ready)  # the others, if the loop goes on
                raise
            except BaseException as error:
                self._report("protocol.datagram_received() failed", error)
            if self._paused or self._closing:
                return
        self._rest = None

    def _starve(self, error: BufferError) -> None:
        """Leave datagrams to the kernel's queue until the protocol gives up one of its batches."""
        if self._retry is None:
            self._report("The protocol holds all batches: reading waits until it releases or copies one", error)
        else:
            self._retry.cancel()
        self._loop.remove_reader(self._fd)
        self._retry = self._loop.call_later(_RETRY, self._read_ready)


def _set(started: asyncio.Future[None]) -> None:
    if not started.done():
        started.set_result(None)
