"""Clients that ask in parallel, once each, and learn who has answered and after what time."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from errno import EADDRNOTAVAIL, ECONNREFUSED, ECONNRESET, EINPROGRESS, EPIPE, ETIMEDOUT
from ipaddress import ip_address
from typing import Literal, NamedTuple

from fastrecv.companions import fastopen
from fastrecv.companions.answers import LONGEST, Endpoint, Server, endpoint
from fastrecv.companions.binding import Address, allow_descriptors, bind, check_local, name_of, opened

__all__ = ["LONGEST_PAYLOAD", "MOST", "Outcome", "Plan", "Way", "ask"]

MOST = 1000
LONGEST_PAYLOAD = 1400
"""Bytes: one packet, also through tunnels."""

Way = Literal["tcp", "udp", "fast-open"]

_MSG_FASTOPEN = 0x20000000  # include/linux/socket.h
_WORDS = {ECONNREFUSED: "refused", ECONNRESET: "reset", EPIPE: "reset", ETIMEDOUT: "timed out",
          EADDRNOTAVAIL: "no port is free, or that one still rests (TIME_WAIT, a minute)"}  # fmt: skip


class Outcome(NamedTuple):
    """What became of one client.

    source : with port 0 where it got none. server : None where something else than a listener of ours answered, or
    nothing. received : bytes of the answer. connect_ms : until TCP was connected, None for UDP. answer_ms : from
    sending the payload to the answer's first byte. in_syn : the payload went with the SYN and was taken, None where
    Fast Open was not asked for. failure : why there is no answer.
    """

    client: int
    source: Endpoint
    destination: Endpoint
    server: Server | None
    sent: int
    received: int
    connect_ms: float | None
    answer_ms: float | None
    in_syn: bool | None
    failure: str | None


class Plan(NamedTuple):
    """What is asked, by how many. Payloads and sources go round: client 3 of two payloads sends the second.

    sources : where they come from, none leaves it to the routes. first_port : of client 0, the next have those above;
    0 leaves it to the kernel. timeout : seconds that each may take.
    """

    way: Way
    destination: tuple[Address, int]
    clients: int = 1
    payloads: Sequence[bytes] = (b"who?",)
    sources: Sequence[Address] = ()
    first_port: int = 0
    timeout: float = 5.0

    def payload(self, client: int) -> bytes:
        return self.payloads[client % len(self.payloads)]


class _Client:
    """One client. `wants` is what its socket is to be watched for, 0 when all is over. Times: time.monotonic."""

    def __init__(self, number: int, sock: socket.socket, plan: Plan) -> None:
        self.sock, self._number, self._way = sock, number, plan.way
        self._payload = plan.payload(number)
        self._to = name_of(*plan.destination)
        self._sent = 0
        self._answer = b""
        self._connected: float | None = None
        self._asked: float | None = None
        self._answered: float | None = None
        self._failure: str | None = None
        self.started = time.monotonic()
        self.wants = selectors.EVENT_WRITE
        with self._failing():
            if plan.way == "fast-open":
                with contextlib.suppress(BlockingIOError):  # no cookie yet: it is asked for, and the data follows
                    self._sent = sock.sendto(self._payload, _MSG_FASTOPEN, self._to)
                    self._asked = time.monotonic()
            else:
                code = sock.connect_ex(self._to)
                if code not in (0, EINPROGRESS):
                    raise OSError(code, os.strerror(code))
        self._from = endpoint(sock.getsockname())

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.fail(_WORDS.get(error.errno or 0, (error.strerror or str(error)).lower()))

    def fail(self, why: str) -> None:
        self._failure = why
        self.wants = 0

    def give_up(self, timeout: float) -> None:
        what = "answer" if self._connected is not None else "connection"
        self.fail(f"timed out: no {what} in {timeout:g} s")

    def go_on(self) -> None:
        """What was waited for has come."""
        with self._failing():
            if self.wants == selectors.EVENT_WRITE:
                self._send()
            else:
                self._receive()

    def _send(self) -> None:
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        self._connected = time.monotonic()
        if self._asked is None:
            self._asked = self._connected
        if self._way == "udp" or self._sent < len(self._payload):
            self._sent += self.sock.send(self._payload[self._sent :])  # one packet: a fresh socket has room
        if not self._payload and self._way == "tcp":
            self.sock.shutdown(socket.SHUT_WR)  # its end is all that can tell the server that this was the question
        self.wants = selectors.EVENT_READ

    def _receive(self) -> None:
        try:
            part = self.sock.recv(1 << 16)
        except BlockingIOError:
            return
        if self._answered is None:
            self._answered = time.monotonic()
        self._answer += part
        # A line is an answer, and of another kind of server whatever it says first.
        if self._way == "udp" or not part or b"\n" in part or len(self._answer) > LONGEST:
            self.wants = 0
            if not self._answer and self._way != "udp":
                self.fail("closed without an answer")

    def outcome(self) -> Outcome:
        connected, in_syn = self._connected, None
        if self._way == "fast-open":
            in_syn = connected is not None and fastopen.in_syn(self.sock)
        answered = None if self._failure or self._answered is None or self._asked is None else (
            1e3 * (self._answered - self._asked))  # fmt: skip
        return Outcome(
            self._number, self._from, endpoint(self._to),
            None if self._failure else Server.read(self._answer), self._sent, len(self._answer),
            None if connected is None or self._way == "udp" else 1e3 * (connected - self.started), answered, in_syn,
            self._failure,
        )  # fmt: skip


def ask(plan: Plan) -> Generator[Outcome | None]:
    """The outcomes as they come; None for every second without news.

    OSError where a source is not of this host or a port not free, or where the sysctl forbids Fast Open.
    """
    allow_descriptors(plan.clients)
    if plan.way == "fast-open":
        fastopen.check("client")
    check_local(plan.sources[: plan.clients])
    waiting: dict[_Client, None] = {}  # who began first comes first
    begun = 0
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        while begun < plan.clients or waiting:
            ended = []
            if begun < plan.clients:  # one by one, so that opening the next is no part of the times of these
                made = _Client(begun, stack.enter_context(_bound(plan, begun)), plan)
                begun += 1
                selector.register(made.sock, made.wants or selectors.EVENT_READ, made)
                waiting[made] = None
                if not made.wants:
                    ended.append(made)
            due = next(iter(waiting)).started + plan.timeout - time.monotonic()
            ready = selector.select(0 if ended or begun < plan.clients else max(0.0, min(1.0, due)))
            for key, _ in ready:
                if key.data.wants:
                    key.data.go_on()
                    if key.data.wants:
                        selector.modify(key.fileobj, key.data.wants, key.data)
                    else:
                        ended.append(key.data)
            ended += _late(waiting, plan.timeout)
            for over in ended:
                selector.unregister(over.sock)
                del waiting[over]
                yield over.outcome()
                over.sock.close()
            if not ready and not ended and begun == plan.clients:
                yield None


def _late(waiting: Iterable[_Client], timeout: float) -> list[_Client]:
    """Those whose time is over; who began first comes first."""
    now = time.monotonic()
    late = []
    for client in waiting:
        if now - client.started < timeout:
            break
        if client.wants:
            client.give_up(timeout)
            late.append(client)
    return late


def _bound(plan: Plan, number: int) -> socket.socket:
    """The socket of one client, bound where the plan says to what."""
    version = plan.destination[0].version
    sock = opened(socket.SOCK_DGRAM if plan.way == "udp" else socket.SOCK_STREAM, version)
    try:
        if plan.sources or plan.first_port:
            anywhere = ip_address("::" if version == 6 else "0.0.0.0")  # noqa: S104 - the route chooses the address
            source = plan.sources[number % len(plan.sources)] if plan.sources else anywhere
            bind(sock, source, plan.first_port + number if plan.first_port else 0)
    except BaseException:
        sock.close()
        raise
    return sock
