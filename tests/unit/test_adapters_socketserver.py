"""The socketserver adapter is what socketserver's own datagram servers are: the same tests run against those, too."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastrecv.adapters import socketserver as ours

NUMBERED = [b"%d" % number for number in range(100)]
PAIRS: Any = {"own": socketserver, "fastrecv": ours}


@pytest.fixture(params=PAIRS)
def servers(request: pytest.FixtureRequest) -> Any:
    """The module to take server classes from: the standard library's as the reference, and ours."""
    return PAIRS[request.param]


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        data, sock = self.request
        self.server.got.append((data, self.client_address))  # type: ignore[attr-defined]
        sock.sendto(data, self.client_address)


class Quiet(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.server.got.append((self.request[0], self.client_address))  # type: ignore[attr-defined]


@contextmanager
def made(kind: Any, handler: type = Echo, address: Any = ("127.0.0.1", 0), **attributes: Any) -> Iterator[Any]:
    server = kind(address, handler)
    server.got = []
    vars(server).update(attributes)
    try:
        yield server
    finally:
        server.server_close()


@contextmanager
def serving(server: Any) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join(10)
        assert not thread.is_alive()


def client(server: Any) -> socket.socket:
    sock = socket.socket(server.address_family, socket.SOCK_DGRAM)
    sock.settimeout(5)
    sock.connect(server.server_address)
    return sock


def queue(server: Any, *payloads: bytes) -> None:
    with client(server) as sock:
        for payload in payloads:
            sock.send(payload)


def payloads(server: Any) -> list[bytes]:
    return [data for data, _ in server.got]


def test_a_hundred_are_answered_in_order(servers: Any) -> None:
    with made(servers.UDPServer) as server, serving(server), client(server) as sock:
        for payload in NUMBERED:
            sock.send(payload)
        assert [sock.recv(9) for _ in NUMBERED] == NUMBERED
        assert server.got == [(payload, sock.getsockname()) for payload in NUMBERED]


def test_ipv6_by_address_family(servers: Any) -> None:
    class Server(servers.UDPServer):  # type: ignore[misc]
        address_family = socket.AF_INET6

    with made(Server, address=("::1", 0)) as server, serving(server), client(server) as sock:
        sock.send(b"one")
        assert sock.recv(9) == b"one"


def test_threads_answer(servers: Any) -> None:
    with made(servers.ThreadingUDPServer) as server:
        with serving(server), client(server) as sock:
            for payload in NUMBERED:
                sock.send(payload)
            assert {sock.recv(9) for _ in NUMBERED} == set(NUMBERED)
        assert not server.daemon_threads


def test_forked_children_answer_and_never_outnumber_their_limit(servers: Any) -> None:
    class Forking(socketserver.ForkingMixIn, servers.UDPServer):  # type: ignore[misc]
        max_children = 3
        most = 0

        def service_actions(self) -> None:
            self.most = max(self.most, len(self.active_children or ()))
            super().service_actions()

    with made(Forking) as server:
        with client(server) as sock:
            for payload in NUMBERED[:20]:
                sock.send(payload)
            with serving(server):
                assert {sock.recv(9) for _ in NUMBERED[:20]} == set(NUMBERED[:20])
        assert 0 < server.most <= 3
        assert payloads(server) == []  # the children have noted them


def test_unix(servers: Any, tmp_path: Path) -> None:
    with made(servers.UnixDatagramServer, address=str(tmp_path / "here")) as server, serving(server):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(str(tmp_path / "there"))
            sock.settimeout(5)
            for payload in (b"one", b"two"):
                sock.sendto(payload, str(tmp_path / "here"))
            assert [sock.recv(9), sock.recv(9)] == [b"one", b"two"]
        assert server.got == [(payload, str(tmp_path / "there")) for payload in (b"one", b"two")]


def test_one_handle_request_handles_one_datagram(servers: Any) -> None:
    with made(servers.UDPServer, Quiet) as server:
        queue(server, *NUMBERED)
        for number in range(70):
            server.handle_request()
            assert payloads(server) == NUMBERED[: number + 1]
        with serving(server):  # what handle_request has read and left is not forgotten
            for _ in range(500):
                if len(server.got) == 100:
                    break
                threading.Event().wait(0.01)
        assert payloads(server) == NUMBERED


def test_handle_request_gives_up_in_time(servers: Any) -> None:
    told = []
    with made(servers.UDPServer, timeout=0.01, handle_timeout=lambda: told.append("timeout")) as server:
        server.handle_request()
    assert told == ["timeout"]


def test_what_is_too_long_is_cut_to_max_packet_size(servers: Any) -> None:
    with made(servers.UDPServer, Quiet, max_packet_size=5) as server:
        queue(server, b"1234567")
        server.handle_request()
        assert payloads(server) == [b"12345"]


def test_hooks_are_called(servers: Any) -> None:
    calls: list[Any] = []

    class Hooked(servers.UDPServer):  # type: ignore[misc]
        allow_reuse_address = True

        def server_bind(self) -> None:
            super().server_bind()
            calls.append(("bind", self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)))

        def server_activate(self) -> None:
            calls.append("activate")
            super().server_activate()

        def get_request(self) -> Any:
            (data, sock), address = super().get_request()
            assert sock is self.socket
            return (data.upper(), sock), address

        def verify_request(self, request: Any, _: Any) -> bool:
            return bool(request[0] != b"BAD")

        def shutdown_request(self, request: Any) -> None:
            calls.append(request[0])

    with made(Hooked, Quiet) as server:
        queue(server, b"good", b"bad", b"fine")
        for _ in range(3):
            server.handle_request()
        assert server.fileno() == server.socket.fileno()
        assert payloads(server) == [b"GOOD", b"FINE"]
    assert calls == [("bind", 1), "activate", b"GOOD", b"BAD", b"FINE"]


def test_a_handler_that_fails_stops_no_other(servers: Any) -> None:
    class Failing(Quiet):
        def handle(self) -> None:
            super().handle()
            if self.request[0] == b"7":
                raise ZeroDivisionError

    failed = []
    with made(servers.UDPServer, Failing, handle_error=lambda request, _: failed.append(request[0])) as server:
        queue(server, *NUMBERED)
        with serving(server):
            while len(server.got) < 100:
                threading.Event().wait(0.001)
    assert failed == [b"7"]


def test_service_actions_come_with_every_datagram(servers: Any) -> None:
    calls = []
    with made(servers.UDPServer, Quiet, service_actions=lambda: calls.append(1)) as server:
        queue(server, *NUMBERED)
        with serving(server):
            while len(server.got) < 100:
                threading.Event().wait(0.001)
        assert len(calls) >= 100


def test_what_was_read_when_shutdown_comes_is_still_handled() -> None:
    class Stopping(Quiet):
        def handle(self) -> None:
            super().handle()
            if self.request[0] == b"7":
                stopper.start()
                threading.Event().wait(0.05)  # shutdown() is certainly in force for the others of the batch

    with made(ours.UDPServer, Stopping) as server:
        stopper = threading.Thread(target=server.shutdown)
        queue(server, *NUMBERED)
        server.serve_forever(0.01)
        stopper.join(10)
        batch = server.receiver.batch_size
        assert payloads(server) == NUMBERED[:batch]
        assert [data for data, _ in server.receiver.recv_nowait().datagrams()] == NUMBERED[batch:]


def test_an_interrupt_leaves_what_was_read_for_the_next_serve_forever() -> None:
    class Interrupted(Quiet):
        def handle(self) -> None:
            super().handle()
            if self.request[0] == b"7":
                raise KeyboardInterrupt

    with made(ours.UDPServer, Interrupted) as server:
        queue(server, *NUMBERED)
        with pytest.raises(KeyboardInterrupt):
            server.serve_forever(0.01)
        assert payloads(server) == NUMBERED[:8]
        with serving(server):
            while len(server.got) < 100:
                threading.Event().wait(0.001)
        assert payloads(server) == NUMBERED


def test_a_socket_from_elsewhere_is_used() -> None:
    server: Any = ours.UDPServer(("127.0.0.1", 0), Quiet, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.server_bind()
    server.got = []
    with server:
        queue(server, b"one")
        server.handle_request()
        assert payloads(server) == [b"one"]


def test_closing_leaves_no_descriptor_open() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    with made(ours.UDPServer, Quiet) as server:
        queue(server, b"one")
        server.handle_request()
    assert server.receiver.closed
    assert set(Path("/proc/self/fd").iterdir()) == before
