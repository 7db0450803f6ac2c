"""The sending half of a datagram transport, and its end: what asyncio promises, replies leaving together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import warnings
from asyncio.log import logger
from asyncio.trsock import TransportSocket
from collections import deque
from typing import Any

import numpy as np

from fastrecv._recv import ENDPOINT
from fastrecv.backend import ReceiverBackend
from fastrecv.sockets import Address

__all__ = ["Sender", "endpoint_name"]

_OUTBOX = 256  # replies that are collected at most: what one sendmmsg(2) of _recv takes
_OVERHEAD = 8  # bytes that a buffered datagram counts beside its own, so that empty ones fill the buffer, too
_PATIENCE = 5  # datagrams sent after the end before it is logged, as asyncio does
_LONGEST = 108  # sizeof(sun_path), unix(7)
_FOUR, _SIX = struct.Struct("=10xH4sHHI"), struct.Struct("=16sHHI")  # rows of ENDPOINT


class Sender(asyncio.DatagramTransport):
    """A datagram transport that never reads: fastrecv.adapters.asyncio.Transport does.

    While _collecting, what is sent waits for _flush.
    """

    _sock: socket.socket | None = None

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        receiver: ReceiverBackend,
        protocol: asyncio.BaseProtocol,
        remote: Address | None,
    ) -> None:
        peer: Any = None
        with contextlib.suppress(OSError):
            peer = sock.getpeername()
        super().__init__(
            {"socket": TransportSocket(sock), "sockname": sock.getsockname(), "peername": peer, "receiver": receiver}
        )
        self._loop = loop
        self._sock = sock
        self._fd = self._out = sock.fileno()
        self._family = int(sock.family)
        self._receiver = receiver
        self._remote = remote
        self._connected = peer is not None
        self._closing = self._lost = False
        self._late = 0
        self._collecting = False
        self._replies: list[tuple[bytes, Any]] = []
        self._names: list[bytes] = []  # their destinations, as _recv takes them
        self._buffer: deque[tuple[bytes, Any]] = deque()
        self._size = 0
        self._writing_paused = False
        self._low, self._high = _limits(None, None)
        self.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol: Any = protocol

    def is_closing(self) -> bool:
        return self._closing

    def sendto(self, data: bytes | bytearray | memoryview, addr: Any = None) -> None:
        """Send now, or at the end of the wake-up where this answers a batch; what finds no room is buffered."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if self._remote:
            if addr not in (None, self._remote):
                raise ValueError(f"Invalid address: must be None or {self._remote!r}")
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
            if self._replies:
                self._flush()
            self._send(data, addr)

    def _name(self, address: Any) -> bytes | None:
        """The address as _recv takes it; None where the socket module has to look at it: host names, mistakes."""
        if self._connected:
            return b""
        return endpoint_name(self._family, address)

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
        if self._lost:  # by what error_received did
            return
        if not self._buffer:
            self._loop.add_writer(self._out, self._write_ready)
        self._buffer.append((data, address))
        self._size += len(data) + _OVERHEAD
        self._pause_writing()

    def _write_ready(self) -> None:
        while self._buffer:
            data, address = self._buffer.popleft()
            self._size -= len(data) + _OVERHEAD
            try:
                self._transmit(data, address)
            except (BlockingIOError, InterruptedError):
                self._buffer.appendleft((data, address))
                self._size += len(data) + _OVERHEAD
                break
            except OSError as error:
                self._call("error_received", error)
            except Exception as error:
                self._fatal_error(error, "Fatal write error on datagram transport")
            if self._lost:
                return
        if self._writing_paused and self._size <= self._low:
            self._writing_paused = False
            self._call("resume_writing")
        if not self._buffer:
            self._loop.remove_writer(self._out)
            if self._closing:
                self._lose(None)

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

    def close(self) -> None:
        """Read no more, send what is buffered, and then call connection_lost(None)."""
        if self._closing:
            return
        self._stop_reading()
        self._flush()
        if not self._buffer:
            self._lose(None)

    def abort(self) -> None:
        """Close without sending what is buffered."""
        self._flush()  # for the protocol these have been sent
        self._force_close(None)

    def _stop_reading(self) -> None:
        self._closing = True

    def _force_close(self, error: Exception | None) -> None:
        self._buffer.clear()
        self._size = 0
        self._stop_reading()
        self._lose(error)

    def _lose(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            self._loop.remove_writer(self._out)
            self._loop.call_soon(self._connection_lost, error)

    def _connection_lost(self, error: Exception | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._release()
            self._protocol = None

    def _release(self) -> None:
        assert self._sock is not None
        self._receiver.close()
        self._sock.close()
        self._sock = None

    def _fatal_error(self, error: Exception, message: str) -> None:
        if not isinstance(error, OSError):
            self._report(message, error)
        self._force_close(error)

    def _call(self, callback: str, *arguments: Any) -> None:
        """Call the protocol where its exception must not end what is being done."""
        try:
            getattr(self._protocol, callback)(*arguments)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._report(f"protocol.{callback}() failed", error)

    def _report(self, message: str, error: BaseException) -> None:
        self._loop.call_exception_handler(
            {"message": message, "exception": error, "transport": self, "protocol": self._protocol}
        )

    def __repr__(self) -> str:
        state = "closed" if self._sock is None else "closing" if self._closing else f"fd={self._fd}"
        return f"<{type(self).__module__}.{type(self).__name__} {state}>"

    def __del__(self) -> None:
        if self._sock is not None:
            warnings.warn(f"unclosed transport {self!r}", ResourceWarning, source=self, stacklevel=2)
            self._release()


def endpoint_name(family: int, address: Any) -> bytes | None:
    """An address as _recv takes it, a row of ENDPOINT or a path; None for what is none of this family."""
    try:
        if family == socket.AF_INET:
            host, port = address
            return _FOUR.pack(0xFFFF, socket.inet_pton(socket.AF_INET, host), port, socket.AF_INET, 0)
        if family == socket.AF_INET6:
            host, port, flow, scope = (*address, 0, 0)[:4]
            row = _SIX.pack(socket.inet_pton(socket.AF_INET6, host), port, socket.AF_INET6, scope)
            return None if flow else row
        path = os.fsencode(address)
    except (OSError, TypeError, ValueError, struct.error):
        return None
    return path if 0 < len(path) < _LONGEST else None


def _limits(high: int | None, low: int | None) -> tuple[int, int]:
    """The low and the high mark of the write buffer, as asyncio chooses them."""
    if high is None:
        high = 64 * 1024 if low is None else 4 * low
    if low is None:
        low = high // 4
    if not high >= low >= 0:
        raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
    return low, high
