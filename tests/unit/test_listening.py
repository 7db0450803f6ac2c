"""Clients that mean no good, or no more than to be slow: a listener stays bounded, and says what became of them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from fastrecv.companions.answers import Endpoint, Server
from fastrecv.companions.binding import is_local
from fastrecv.companions.connections import Connections
from fastrecv.companions.datagrams import Datagrams
from fastrecv.companions.listening import SENDERS, Connection, Datagram, Event, Group, Tally, serve, tallied
from tests.listeners import listening

HOST = ip_address("127.0.0.1")
ANSWER = Server(0, os.getpid()).answer()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def connections(**settings: float) -> Iterator[tuple[Connections, tuple[str, int]]]:
    port = free_port()
    with contextlib.closing(Connections(HOST, port, 1, **settings)) as group:  # type: ignore[arg-type] # most, idle
        yield group, ("127.0.0.1", port)


def served(group: Group, count: int) -> list[Event]:
    """What is told until so many have ended; it takes 10 seconds where fewer do."""
    told: list[Event] = []
    serve(group, told.extend, count=count, seconds=10)
    assert len(told) == count
    return told


def ended(events: list[Event]) -> list[tuple[int, str]]:
    return [(event.bytes, event.ended) for event in events if isinstance(event, Connection)]


def test_who_says_nothing_is_cut_off() -> None:
    with connections(idle=0.2) as (group, where), socket.create_connection(where, 5) as client:
        (event,) = served(group, 1)
        assert isinstance(event, Connection)
        assert (event.bytes, event.first_byte_ms, event.ended) == (0, None, "silent for 0.2 s")
        assert event.open_ms >= 200
        assert client.recv(99) == b""


def test_who_only_closes_is_answered() -> None:
    with connections() as (group, where), socket.create_connection(where, 5) as client:
        client.shutdown(socket.SHUT_WR)
        assert ended(served(group, 1)) == [(0, "closed")]
        assert client.recv(99) == ANSWER


def test_who_resets() -> None:
    with connections() as (group, where):
        with socket.create_connection(where, 5) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert ended(served(group, 1)) == [(0, "reset")]


def test_many_bytes_in_many_parts_are_one_connection() -> None:
    with connections() as (group, where), socket.create_connection(where, 5) as client:
        client.settimeout(0)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 1 << 20:
                sent += client.send(bytes(7001))
        client.shutdown(socket.SHUT_WR)
        assert sent > 1 << 17  # more than one read takes
        assert ended(served(group, 1)) == [(sent, "closed")]
        client.settimeout(5)
        assert client.recv(99) == ANSWER


def test_those_for_whom_there_is_no_place_wait_for_one() -> None:
    with connections(most=2, idle=0.3) as (group, where), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(where, 5)) for _ in range(5)]
        events = served(group, 5)
        assert ended(events) == [(0, "silent for 0.3 s")] * 5
        times = sorted(event.time for event in events)
        assert all(later - earlier >= 0.3 for earlier, later in zip(times, times[2:], strict=False))
        assert {event.source.port for event in events} == {client.getsockname()[1] for client in clients}


def test_who_is_there_at_the_end_is_told_of() -> None:
    told: list[Event] = []
    with connections() as (group, where), socket.create_connection(where, 5) as client:
        client.send(b"who?")
        serve(group, told.extend, seconds=0.5)
        assert ended(told) == [(4, "still open")]
        assert client.recv(99) == ANSWER
        assert client.recv(99) == b""


def test_answers_are_not_answered() -> None:
    port = free_port()
    with (
        contextlib.closing(Datagrams(HOST, port, 1)) as group,
        socket.socket(type=socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(5)
        client.connect(("127.0.0.1", port))
        for payload in (ANSWER, b"", ANSWER[:-1]):
            client.send(payload)
        assert [event.bytes for event in served(group, 3)] == [len(ANSWER), 0, len(ANSWER) - 1]
        assert [client.recv(99), client.recv(99)] == [ANSWER, ANSWER]
        client.settimeout(0)
        with pytest.raises(BlockingIOError):
            client.recv(99)


def test_every_datagram_of_a_fast_sender_is_served_or_lost() -> None:
    port = free_port()
    with listening("udp", f"127.0.0.1:{port}", "--quiet", listeners=2) as listener:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in range(20)]
            for client in clients:
                client.connect(("127.0.0.1", port))
            for _ in range(1000):
                for client in clients:
                    client.send(bytes(200))
        asked, answered = 0, set[bytes]()
        while len(answered) < 2:  # who answers this has read what came before
            with socket.socket(type=socket.SOCK_DGRAM) as last:
                last.settimeout(1)
                last.sendto(b"", ("127.0.0.1", port))
                asked += 1
                with contextlib.suppress(TimeoutError):
                    answered.add(last.recv(99))
        listener.end()
    assert sum(listener.served) + sum(found["lost"] for found in listener.events("summary")) == 20_000 + asked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_summary(number: signal.Signals) -> None:
    port = free_port()
    with (
        listening("tcp", f"127.0.0.1:{port}", listeners=1) as listener,
        socket.create_connection(("127.0.0.1", port), 5) as client,
    ):
        client.send(b"who?")
        assert Server.read(client.recv(99)) == Server(0, listener.process.pid)
        listener.end(number)
    assert [(event["bytes"], event["ended"]) for event in listener.events("connection")] == [(4, "still open")]
    assert listener.served == [1]


def test_signal_handlers_are_as_before() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with connections() as (group, _):
        serve(group, list, seconds=0.01)  # type: ignore[arg-type] # nothing is reported
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_tally_remembers_a_bounded_number_of_senders() -> None:
    tallies = [Tally(), Tally()]
    report = tallied(list, tallies)  # type: ignore[arg-type] # nobody else wants them
    where = Endpoint("127.0.0.1", 7)
    report([Datagram(0, 1, Endpoint(str(HOST + number % 20_000), 1), where, 2, 0) for number in range(30_000)])
    assert (tallies[1].served, tallies[1].bytes, tallies[1].senders) == (30_000, 60_000, SENDERS)
    assert (tallies[0].served, tallies[0].bytes, tallies[0].senders) == (0, 0, 0)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (b"slot 2 pid 4711\n", Server(2, 4711)),
        (b"slot 2 pid 4711", None),
        (b"slot 2 pid 4711\nslot 3 pid 1\n", None),
        (b"slot -1 pid 4711\n", None),
        (b"", None),
        (b"HTTP/1.1 200 OK\r\n", None),
    ],
)
def test_answers(text: bytes, read: Server | None) -> None:
    assert Server.read(text) == read


@pytest.mark.parametrize(
    ("address", "local"), [("127.9.9.9", True), ("::1", True), ("203.0.113.9", False), ("2001:db8:ffff::9", False)]
)
def test_what_is_local(address: str, local: bool) -> None:
    assert is_local(ip_address(address)) is local
