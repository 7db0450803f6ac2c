"""Datagrams from worker to worker: who gets one of another's connection hands it over, by the connection id.

A connection is the state of one process, and stays there while a successor reads the socket. So a worker has a name,
four random bytes, that every connection id of its making carries; and it listens under that name, on an AF_UNIX socket
on which only the same user is heard. An old and a new process share a port by the same means elsewhere: mvfst's
takeover (quic/server/QuicServerPacketRouter.h) forwards by a bit of the id.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from errno import EADDRINUSE
from typing import Any

import msgspec

__all__ = ["LENGTH", "Relay", "destination", "owner"]

LENGTH = 12
"""Bytes of a connection id: what it is steered by (1), its worker's name (4), and what nobody can guess (7)."""

_NAME = slice(1, 5)
_LONGEST = 256 * 1024  # bytes of a message
_FULL = 64 * 1024  # bytes that are handed over at once: net.core.wmem_max holds twice that
_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group (unix(7))


class Handed(msgspec.Struct, array_like=True):
    """One datagram, and whose it is: from there, or an answer to go there."""

    address: list[str | int]
    data: bytes
    answer: bool = False


Message = list[Handed]
Called = Callable[[bytes, Any], None]


def destination(data: bytes) -> bytes:
    """The destination connection id, of a long header or a short one (RFC 9000, 17); empty where there is none."""
    if not data:
        return b""
    if data[0] & 0x80:
        return data[6 : 6 + data[5]] if len(data) > 5 else b""
    return data[1 : 1 + LENGTH]


def owner(cid: bytes) -> bytes | None:
    """The name of the worker that has made an id; None where it is none of ours. A client's may look like one."""
    return cid[_NAME] if len(cid) == LENGTH else None


class Relay:
    """A worker's end; made on a running loop.

    heard : called with data and address of each datagram that another worker has handed over. unknown : with those that
    nobody took, since no worker has that name. send : with each answer that is to leave by this worker's socket.
    dropped : datagrams for which there was no room; QUIC sends again.
    """

    def __init__(self, heard: Called, unknown: Called, send: Called) -> None:
        self._heard, self._unknown, self._send = heard, unknown, send
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[bytes, Message] = {}
        self._size = 0
        self._last: bytes | None = None  # who has handed something over
        self.dropped = 0
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.name = self._bound()
        self._loop.add_reader(self._sock, self._read)

    def _bound(self) -> bytes:
        while True:
            name = os.urandom(4)
            try:
                self._sock.bind(_path(name))
            except OSError as error:
                if error.errno != EADDRINUSE:
                    raise
            else:
                return name

    def mint(self, steering: bytes) -> bytes:
        """A new connection id that comes to this worker. steering : the byte that the balancer goes by."""
        return steering + self.name + os.urandom(LENGTH - len(steering) - len(self.name))

    def hand_over(self, to: bytes, data: bytes, address: Any) -> None:
        """Give a datagram to the worker of a name."""
        self._add(_path(to), Handed(list(address), data))

    def answer(self, data: bytes, address: Any) -> None:
        """Let an answer leave by the socket of who has handed something over last; nothing where nobody has."""
        if self._last is not None:
            self._add(self._last, Handed(list(address), data, answer=True))

    def _add(self, path: bytes, one: Handed) -> None:
        """Together with others of this wake-up: a queue there holds few (net.unix.max_dgram_qlen)."""
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.setdefault(path, []).append(one)
        self._size += len(one.data)
        if self._size > _FULL:
            self._flush()

    def _flush(self) -> None:
        waiting, self._waiting, self._size = self._waiting, {}, 0
        for path, message in waiting.items():
            try:
                self._sock.sendto(msgspec.msgpack.encode(message), path)
            except ConnectionRefusedError:
                for one in message:
                    if not one.answer:
                        self._unknown(one.data, tuple(one.address))
            except OSError:  # its queue is full
                self.dropped += len(message)

    def _read(self) -> None:
        message, ancillary, _, path = self._sock.recvmsg(_LONGEST, socket.CMSG_SPACE(_CREDENTIALS.size))
        senders = [_CREDENTIALS.unpack(data)[1] for _, kind, data in ancillary if kind == socket.SCM_CREDENTIALS]
        if senders != [os.geteuid()]:
            return
        for one in msgspec.msgpack.decode(message, type=Message):
            if one.answer:
                self._send(one.data, tuple(one.address))
            else:
                self._last = path
                self._heard(one.data, tuple(one.address))

    def close(self) -> None:
        self._loop.remove_reader(self._sock)
        self._sock.close()


def _path(name: bytes) -> bytes:
    return b"\0fastrecv-quic/" + name.hex().encode()
