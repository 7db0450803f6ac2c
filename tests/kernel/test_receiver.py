"""What of Receiver takes a namespace of its own: steered services on any port and address, IPv6 groups, privileges."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from fastrecv import Receiver, replies, sockets
from fastrecv.bpf import packaged
from fastrecv.netns import Namespace
from tests.kernel.privileges import CAP_NET_BIND_SERVICE, CAP_NET_RAW, only


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A namespace with loopback up, to which whole prefixes are local (RFC 5737, RFC 3849), as for an operator."""
    with contextlib.closing(Namespace()) as made, made:
        with IPRoute() as net:
            (loopback,) = net.link_lookup(ifname="lo")
            net.link("set", index=loopback, state="up")
            here = {"oif": loopback, "type": "local", "table": 255}  # ip-route(8): local, table local
            net.route("add", dst="198.51.100.0/24", scope=254, **here)
            net.route("add", dst="2001:db8:7::/64", family=socket.AF_INET6, **here)
            net.route("add", dst="ff00::/8", family=socket.AF_INET6, **here)
        yield made


@contextlib.contextmanager
def steered(namespace: Namespace, receiver: Receiver) -> Iterator[None]:
    """Every new flow of the namespace, whatever its address and port, comes to this socket."""
    with packaged("assign") as assign:
        assign.load().maps["sockets"].update([0], [receiver.socket.fileno()])
        with assign.programs["assign"].attach_netns(namespace.fd):
            yield


def ask(host: str, port: int, question: bytes) -> socket.socket:
    """A connected client: it takes answers from the address and port it has asked, and from nowhere else."""
    client = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(5)
    client.connect((host, port))
    client.send(question)
    return client


SERVERS = [("127.0.0.1", "198.51.100.{}"), ("::1", "2001:db8:7::{}"), ("::", "2001:db8:7::{}"), ("::", "198.51.100.{}")]


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "bound"])
@pytest.mark.parametrize(("bound", "asked"), SERVERS)
def test_an_any_port_service_answers_from_the_address_and_port_that_was_asked(
    namespace: Namespace, bound: str, asked: str, raw: bool
) -> None:
    receiver = Receiver.bind((bound, 7000), destinations=True, destination_ports=True)
    with receiver, contextlib.ExitStack() as stack:
        stack.enter_context(steered(namespace, receiver))
        places = [(asked.format(i + 1), port) for i, port in enumerate([7000, 53, 4242, 4242, 65535, 80])]
        sizes = [0, 1, 7, 1200, 9000, 333]
        clients = []
        for (host, port), size in zip(places, sizes, strict=True):
            clients.append(stack.enter_context(ask(host, port, bytes([size % 251]) * size)))
        found = 0
        while found < len(places):
            batch = receiver.recv(5)
            told: list[Any] = [batch.destination(i) for i in range(len(batch))]
            mapped = bound == "::" and "." in asked
            assert [(str(where[0])[7 * mapped :], where[1]) for where in told] == places[found : found + len(batch)]
            with only(CAP_NET_RAW if raw else CAP_NET_BIND_SERVICE):
                assert receiver.reply(batch, batch) == len(batch)
            found += len(batch)
        for client, size in zip(clients, sizes, strict=True):
            assert client.recv(70000) == bytes([size % 251]) * size
        assert receiver.statistics().unanswered == 0


def test_an_answer_that_takes_a_privilege_is_counted_logged_once_and_the_others_go(
    namespace: Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = Receiver.bind(("127.0.0.1", 7000), destinations=True, destination_ports=True)
    with receiver, steered(namespace, receiver), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(ask("198.51.100.1", port, b"?")) for port in (53, 54, 5000)]
        batch = receiver.recv(5)
        with only():
            assert receiver.reply(batch, [b"!"] * 3) == 1
        assert clients[2].recv(9) == b"!"
    assert receiver.statistics().unanswered == 2
    (record,) = caplog.records
    assert record.getMessage().startswith("cannot answer from 198.51.100.1 port 53: Permission denied (said once)")


def test_threads_that_answer_through_few_bound_sockets_answer_from_the_right_ports(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "_CACHED", 1)
    receiver = Receiver.bind(("127.0.0.1", 7000), destinations=True, destination_ports=True, arenas=8)
    answers = []
    with receiver, steered(namespace, receiver), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(ask("198.51.100.1", port, b"%d" % port)) for port in (5000, 5001)]
        batches = [receiver.recv(5)]
        assert len(batches[0]) == 2

        def answer(row: int) -> None:
            with only():
                payloads = [bytes(view) if i == row else None for i, (view, _) in enumerate(batches[0])]
                answers.append(sum(receiver.reply(batches[0], payloads) for _ in range(200)))

        threads = [threading.Thread(target=answer, args=[row]) for row in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [200, 200]
        for client, port in zip(clients, (5000, 5001), strict=True):
            assert {client.recv(9) for _ in range(200)} == {b"%d" % port}


def test_bound_reply_sockets_are_few_and_receive_nothing(namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "_CACHED", 5)
    with Receiver.bind(("127.0.0.1", 7000), destinations=True, destination_ports=True) as receiver:
        with steered(namespace, receiver), only():
            before = descriptors()
            for port in [*range(5000, 5020), 5019, 5000]:
                with ask("198.51.100.9", port, b"?") as client:
                    assert receiver.reply(receiver.recv(5), [b"%d" % port]) == 1
                    assert client.recv(10) == b"%d" % port
            assert descriptors() == before + 5
        bound = receiver._replier._bound[("198.51.100.9", 5000)]
        with socket.socket(type=socket.SOCK_DGRAM) as client:  # nothing steers it any more
            client.sendto(b"x", ("198.51.100.9", 5000))
        assert sockets.drops(bound) == 1
        with pytest.raises(BlockingIOError):
            bound.recv(1, socket.MSG_DONTWAIT)
    assert bound.fileno() < 0


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_an_ipv6_group_is_joined_by_interface_and_left(namespace: Namespace) -> None:
    loopback = socket.if_nametoindex("lo")
    with Receiver.bind(("::", 0), destinations=True) as receiver, Receiver.bind(("::", 0)) as other:
        receiver.join("ff05::7:1", interface="lo")
        other.join("ff05::7:2", interface="lo")

        def send() -> None:
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, loopback)
                for to in (receiver, other):
                    sock.sendto(b"to the group", ("ff05::7:1", to.address[1]))

        send()
        batch = receiver.recv(5)
        assert [bytes(view) for view, _ in batch] == [b"to the group"]
        assert batch.destination(0) == ("ff05::7:1", 0, 0, loopback)
        assert not other.recv(0.05)
        assert receiver.reply(batch, [b"from an address of the interface"]) == 1
        receiver.leave("ff05::7:1", interface="lo")
        send()
        assert not receiver.recv(0.05)


def test_a_receiver_needs_no_privilege_and_gets_the_buffer_it_may_have(namespace: Namespace) -> None:
    limit = int(Path("/proc/sys/net/core/rmem_max").read_text())
    with only():
        features = ("timestamps", "hardware_timestamps", "destinations", "destination_ports", "tos", "drops", "gro")
        with Receiver.bind(("::", 0), receive_buffer=(1 << 30) - 1, **dict.fromkeys(features, True)) as receiver:
            assert receiver.receive_buffer == 2 * limit
            with ask("127.0.0.1", receiver.address[1], b"?") as client:
                assert receiver.reply(receiver.recv(5), [b"!"]) == 1
                assert client.recv(1) == b"!"
    with Receiver.bind(("::", 0), receive_buffer=1 << 29) as receiver:
        assert receiver.receive_buffer == 1 << 30
