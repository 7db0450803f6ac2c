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
import struct
import warnings
from asyncio.log import logger
from asyncio.trsock import TransportSocket
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, Unpack

import numpy as np

from fastrecv._recv import ENDPOINT, Batch
from fastrecv.receiver import Options, Receiver
from fastrecv.sockets import Address

__all__ = ["Transport", "create_datagram_endpoint"]

P = TypeVar("P", bound=asyncio.BaseProtocol)
_Pair = tuple[tuple[int, int], tuple[Any, Any]]  # (family, proto), (local address, remote address)

_RETRY = 0.01  # seconds until arenas are asked for again when all are held
_OUTBOX = 256  # replies that are collected at most: what one sendmmsg(2) of _recv takes
_OVERHEAD = 8  # bytes that a buffered datagram counts beside its own, so that empty ones fill the buffer, too
_PATIENCE = 5  # datagrams sent after the end before it is logged, as asyncio does
_FOUR, _SIX = struct.Struct("=10xH4sHHI"), struct.Struct("=16sHHI")  # rows of ENDPOINT


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
    """loop.create_datagram_endpoint of the running loop, over a Receiver, which `options` are for.

    A protocol with a method datagrams_received(batch) is given whole batches instead, and may keep them.
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


class Transport(asyncio.DatagramTransport):
    """A datagram transport that reads batches; made by create_datagram_endpoint."""

    _sock: socket.socket | None = None

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        receiver: Receiver,
        protocol: Any,
        remote: Address | None,
        started: asyncio.Future[None],
    ) -> None:
        peer: Any = None
        with contextlib.suppress(OSError):
            peer = sock.getpeername()
        super().__init__(
            {"socket": TransportSocket(sock), "sockname": sock.getsockname(), "peername": peer, "receiver": receiver}
        )
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._family = int(sock.family)
        self._receiver = receiver
        self._remote = remote
        self._connected = peer is not None
        self.set_protocol(protocol)
        self._rest: Iterator[tuple[bytes, Any]] | None = None  # of the batch that is being delivered
        self._retry: asyncio.TimerHandle | None = None  # while all arenas are held
        self._paused = self._closing = self._lost = False
        self._late = 0
        self._collecting = False
        self._replies: list[tuple[bytes, Any]] = []
        self._names: list[bytes] = []  # their destinations, as _recv takes them
        self._buffer: deque[tuple[bytes, Any]] = deque()
        self._size = 0
        self._writing_paused = False
        self._low, self._high = _limits(None, None)
        loop.call_soon(protocol.connection_made, self)
        loop.call_soon(self._start_reading)
        loop.call_soon(_set, started)

    def get_protocol(self) -> asyncio.BaseProtocol:
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """From the next batch on; what is left of one goes to datagram_received."""
        self._protocol: Any = protocol
        self._batched = hasattr(protocol, "datagrams_received")

    def is_closing(self) -> bool:
        return self._closing

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
        except Exception as error:  # noqa: BLE001 - asyncio ends a transport that cannot read
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

    def sendto(self, data: bytes | bytearray | memoryview, addr: Any = None) -> None:
        """Send now, or at the end of the wake-up where this answers a batch; what finds no room is buffered."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if self._remote:
            if addr not in (None, self._remote):
                raise ValueError(f"Invalid address: must be None or {self._remote}")
            addr = self._remote
        if self._lost:
            self._late += 1
            if self._late == _PATIENCE:
                logger.warning("%r: datagrams are sent after its end", self)
        elif self._buffer:
            self._enqueue(bytes(data), addr)
        elif self._collecting and (name := self._name(addr)) is not None:
            self._replies.append((bytes(data), addr))
            self._names.append(name)
            if len(self._replies) == _OUTBOX:
                self._flush()
        else:
            self._flush()
            self._send(data, addr)

    def _name(self, address: Any) -> bytes | None:
        """The address as _recv takes it; None where the socket module has to look at it: host names, mistakes."""
        if self._connected:
            return b""
        try:
            if self._family == socket.AF_INET:
                host, port = address
                return _FOUR.pack(0xFFFF, socket.inet_aton(host), port, socket.AF_INET, 0)
            if self._family == socket.AF_INET6:
                host, port, flow, scope = (*address, 0, 0)[:4]
                return None if flow else _SIX.pack(socket.inet_pton(socket.AF_INET6, host), port, socket.AF_INET6, scope)
            path = os.fsencode(address)
        except (OSError, TypeError, ValueError, struct.error):
            return None
        return path if 0 < len(path) < _LONGEST else None

    def _flush(self) -> None:
        """Send what was collected, in order; one that is refused is reported, and the others go on."""
        replies, self._replies = self._replies, []
        names, self._names = self._names, []
        done = 0
        while done < len(replies):
            to: Any = names[done:]
            if self._connected:
                to = None
            elif self._family != socket.AF_UNIX:
                to = np.frombuffer(b"".join(to), ENDPOINT)
            try:
                sent = self._receiver.send([data for data, _ in replies[done:]], to, 0)
            except OSError as error:
                self._call("error_received", error)
                sent = 1
            if not sent:
                break
            done += sent
        for data, address in replies[done:]:
            self._enqueue(data, address)

    def _send(self, data: bytes | bytearray | memoryview, address: Any) -> None:
        if self._buffer:  # a flush just before has filled it
            self._enqueue(bytes(data), address)
            return
        try:
            self._transmit(data, address)
        except (BlockingIOError, InterruptedError):
            self._enqueue(bytes(data), address)
        except OSError as error:
            self._protocol.error_received(error)
        except Exception as error:
            self._fatal_error(error, "Fatal write error on datagram transport")

    def _transmit(self, data: bytes | bytearray | memoryview, address: Any) -> None:
        assert self._sock is not None
        if self._connected:
            self._sock.send(data)
        else:
            self._sock.sendto(data, address)

    def _enqueue(self, data: bytes, address: Any) -> None:
        if not self._buffer:
            self._loop.add_writer(self._fd, self._write_ready)
        self._buffer.append((data, address))
        self._size += len(data) + _OVERHEAD
        self._pause_writing()

    def _write_ready(self) -> None:
        while self._buffer:
            data, address = self._buffer[0]
            try:
                self._transmit(data, address)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._call("error_received", error)
            except Exception as error:
                self._fatal_error(error, "Fatal write error on datagram transport")
                return
            if self._lost
                return
            self._buffer.popleft()
            self._size -= len(data) + _OVERHEAD
        if self._writing_paused and self._size <= self._low:
            self._writing_paused = False
            self._call("resume_writing")
        if not self._buffer:
            self._loop.remove_writer(self._fd)
            if self._closing:
                self._end(None)

    def get_write_buffer_size(self) -> int:
        return self._size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._low, self._high = _limits(high, low)
        self._pause_writing()

    def _pause_writing(self) -> None:
        if self._size > self._high and not self._writing_paused:
            self._writing_paused = True
            self._call("pause_writing")
