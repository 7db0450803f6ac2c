"""Sending and answering over loopback: counts, errors, trains, and the address that answers leave from."""

from __future__ import annotations

import errno
import random
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrecv import ENDPOINT, Receiver, sockets
from fastrecv.replies import Buffer

EVERY = ["0.0.0.0", "::"]  # noqa: S104 - the sockets of these tests, by port
FAMILIES = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}


def drain(sock: socket.socket, count: int) -> list[bytes]:
    sock.settimeout(5)
    return [sock.recv(70000) for _ in range(count)]


@pytest.mark.parametrize("host", FAMILIES)
def test_one_payload_each_to_addresses_of_their_own(host: str) -> None:
    with Receiver.bind((host, 0)) as sender:
        sinks = [socket.socket(FAMILIES[host], socket.SOCK_DGRAM) for _ in range(3)]
        for sink in sinks:
            sink.bind((host, 0))
        payloads: list[Buffer] = [b"a", bytearray(b"bb"), memoryview(b"ccc")]
        addresses = [sink.getsockname() for sink in sinks]
        assert sender.send(payloads, addresses) == 3
        assert sender.send([np.frombuffer(b"dddd", np.uint8)] * 3, sockets.endpoints(addresses)) == 3
        assert sender.send([b"e"], sockets.endpoints(addresses)[0]) == 1
        assert sender.send([b"f"] * 3, tuple(addresses)) == 3
        assert drain(sinks[0], 4)[2:] == [b"e", b"f"]
        for sink, payload in zip(sinks, payloads, strict=True):
            if sink is not sinks[0]:
                assert drain(sink, 3) == [bytes(payload), b"dddd", b"f"]
            sink.close()


@pytest.mark.parametrize("host", FAMILIES)
def test_a_batch_can_be_sent_as_it_is(host: str) -> None:
    payloads = [random.randbytes(random.randrange(1500)) for _ in range(50)]
    with Receiver.bind((host, 0), receive_buffer=1 << 20) as first, Receiver.bind((host, 0)) as second:
        second.send(payloads, first.address)
        batch = first.recv(5)
        assert len(batch) == 50
        assert first.send(batch, batch.sources) == 50
        assert [bytes(view) for view, _ in second.recv(5)] == payloads
        assert first.reply(batch, batch) == 50
        assert [bytes(view) for view, _ in second.recv(5)] == payloads


@pytest.mark.parametrize("size", [0, 1, 100, 1400, 40_000, 65_507])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 64, 65, 300])
def test_runs_to_one_peer_arrive_as_they_were_sent(size: int, count: int) -> None:
    if size * count > 4_000_000:
        count = 60
    payloads = [random.randbytes(size) for _ in range(count)] + [random.randbytes(size // 2), b"", b"end"]
    with (
        Receiver.bind(("127.0.0.1", 0), receive_buffer=32 << 20) as receiver,
        Receiver.bind(("127.0.0.1", 0)) as sender,
    ):
        done = 0
        while done < len(payloads):
            sent = sender.send(payloads[done:], receiver.address, timeout=5)
            assert sent
            done += sent
        found: list[bytes] = []
        while len(found) < len(payloads):
            batch = receiver.recv(5)
            assert batch, f"{len(found)} of {len(payloads)}"
            found += [payload for payload, _ in batch.datagrams()]
        assert found == payloads


def test_a_connected_socket_needs_no_destination() -> None:
    with Receiver.bind(("127.0.0.1", 0)) as receiver, socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.connect(receiver.address)
        with Receiver(sock) as sender:
            assert sender.send([b"a", b"b"]) == 2
        assert [bytes(view) for view, _ in receiver.recv(5)] == [b"a", b"b"]


def test_datagrams_of_a_connected_unix_pair_stay_apart() -> None:
    """The kernel ignores UDP_SEGMENT there, and would join a run."""
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with first, second, Receiver(first) as sender, Receiver(second) as receiver:
        assert sender.send([b"%d" % i for i in range(9)]) == 9
        assert [bytes(view) for view, _ in receiver.recv(5)] == [b"%d" % i for i in range(9)]


def test_the_count_says_how_many_left_before_one_was_refused() -> None:
    with Receiver.bind(("127.0.0.1", 0)) as receiver, Receiver.bind(("127.0.0.1", 0)) as sender:
        assert sender.send([b"1", b"2", bytes(65508), b"4"], receiver.address) == 2
        with pytest.raises(OSError, match="sending: Message too long") as caught:
            sender.send([bytes(65508)], receiver.address)
        assert caught.value.errno == errno.EMSGSIZE


def test_without_room_in_the_send_buffer_the_count_says_how_far_it_went() -> None:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with first, second, Receiver(first) as sender:
        sent = sender.send([bytes(1000)] * 5000, timeout=0)
        assert 0 < sent < 5000
        assert sender.send([b"x"], timeout=0) == 0


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_timeout_that_is_none_is_refused(timeout: float) -> None:
    with Receiver.bind(("127.0.0.1", 0)) as sender, pytest.raises(ValueError, match="give seconds"):
        sender.send([b"x"], sender.address, timeout)


def test_one_unix_peer_that_does_not_read_holds_up_no_other(tmp_path: Path) -> None:
    with Receiver.bind(tmp_path / "server") as receiver:
        deaf, good = (Receiver.bind(tmp_path / name) for name in ("deaf", "good"))
        with deaf, good:
            while deaf.send([b"?"], tmp_path / "server", 0):
                batch = receiver.recv(0)
                if receiver.reply(batch, [b"!"]) == 0:  # its queue is full now
                    break
            good.send([b"?"], tmp_path / "server")
            deaf.send([b"?"], tmp_path / "server")
            batch = receiver.recv(5)
            while len(batch) < 2:
                batch = receiver.recv(5) if not len(batch) else batch
                break
            unanswered = receiver.statistics().unanswered
            begin = time.process_time()
            assert receiver.reply(batch, [b"!"] * len(batch)) == 1
            assert receiver.statistics().unanswered == unanswered + len(batch) - 1
            assert receiver.send([b"x"], tmp_path / "deaf", 0.2) == 0
            assert time.process_time() - begin < 0.15
            assert bytes(good.recv(5)[0]) == b"!"


def test_a_send_that_waits_is_woken_by_close_and_reaches_nobody_else() -> None:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with first, second:
        sender = Receiver(first)
        while sender.send([b"full"], timeout=0):
            pass
        threading.Timer(0.1, sender.close).start()
        with pytest.raises(OSError, match="the Receiver is closed"):
            sender.send([b"secret"])


@pytest.mark.parametrize(
    ("payloads", "destinations", "error", "words"),
    [
        ([b"a", b"b"], [("127.0.0.1", 1)] * 3, ValueError, "2 payloads for 3 destinations"),
        ([b"a", "text"], ("127.0.0.1", 1), TypeError, "payload 1 is a str: give a bytes-like object"),
        ([b"a"], [("127.0.0.1", 70000)], ValueError, "the port is 70000: give a number from 0 to 65535"),
        ([b"a"], ("localhost", 1), ValueError, "'localhost' is no numeric IPv4 or IPv6 address"),
        (b"abc", ("127.0.0.1", 1), TypeError, "payloads are a list of datagrams"),
        ([b"a", b"b"], [("127.0.0.1", 1), ["127.0.0.1", 1]], TypeError, "is no socket address"),
        ([b"a", b"b"], ["path", ("127.0.0.1", 1)], TypeError, "'path' is no socket address"),
        ([b"a"], np.zeros(1, "u4"), TypeError, "one-dimensional array of ENDPOINT"),
        ([b"a"], np.zeros((1, 1), ENDPOINT), TypeError, "one-dimensional array of ENDPOINT"),
        ([b"a"], "x" * 109, ValueError, "too long for the path of a socket"),
        ([b"a"], None, OSError, "Destination address required"),
    ],
)
def test_what_cannot_be_sent_is_refused(
    payloads: list[bytes], destinations: object, error: type[Exception], words: str
) -> None:
    with Receiver.bind(("127.0.0.1", 0)) as sender, pytest.raises(error, match=words):
        sender.send(payloads, destinations)  # type: ignore[arg-type] # that is the test


def test_a_reply_to_each_or_to_none() -> None:
    with Receiver.bind(("127.0.0.1", 0)) as receiver:
        clients = [socket.socket(type=socket.SOCK_DGRAM) for _ in range(3)]
        for i, client in enumerate(clients):
            client.connect(receiver.address)
            client.send(bytes([i]))
        batch = receiver.recv(5)
        wrongs: list[Any] = [{}, None, b"x"]
        for wrong in wrongs:
            with pytest.raises(TypeError, match="payloads are a list of datagrams"):
                receiver.reply(batch, wrong)
        with pytest.raises(TypeError, match="reply answers a Batch, not list"):
            receiver.reply([b"x"], [b"x"])  # type: ignore[arg-type] # that is the test
        with pytest.raises(ValueError, match="1 payloads for 3 datagrams: give one each, None for no answer"):
            receiver.reply(batch, [b"x"])
        assert receiver.reply(batch, [None] * 3) == 0
        assert receiver.reply(batch, [b"0", None, b"2"]) == 2
        assert [drain(clients[i], 1) for i in (0, 2)] == [[b"0"], [b"2"]]
        clients[1].settimeout(0.05)
        with pytest.raises(TimeoutError):
            clients[1].recv(1)
        for client in clients:
            client.close()


def test_a_refused_reply_is_counted_and_the_others_go() -> None:
    with Receiver.bind(("127.0.0.1", 0)) as receiver, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.connect(receiver.address)
        for _ in range(3):
            client.send(b"?")
        batch = receiver.recv(5)
        assert receiver.reply(batch, [b"1", bytes(65508), b"3"]) == 2
        assert receiver.statistics().unanswered == 1
        assert drain(client, 2) == [b"1", b"3"]


@pytest.mark.parametrize(
    ("server", "asked"),
    [
        (EVERY[0], "127.0.0.1"),
        (EVERY[0], "127.9.8.7"),
        (EVERY[1], "127.0.0.1"),
        (EVERY[1], "127.9.8.7"),
        (EVERY[1], "::1"),
    ],
)
def test_an_answer_leaves_from_the_address_that_was_asked(server: str, asked: str) -> None:
    """A connected client takes nothing from anywhere else."""
    with (
        Receiver.bind((server, 0), destinations=True) as receiver,
        socket.socket(socket.AF_INET6 if ":" in asked else socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.connect((asked, receiver.address[1]))
        for _ in range(10):
            client.send(b"?")
        batch = receiver.recv(5)
        assert receiver.reply(batch, [b"answer %d" % i for i in range(10)]) == 10  # a train where it can be
        assert drain(client, 10) == [b"answer %d" % i for i in range(10)]


@pytest.mark.parametrize("server", EVERY)
def test_a_socket_with_every_address_must_know_which_one_was_asked(server: str) -> None:
    with Receiver.bind((server, 0)) as receiver, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.sendto(b"?", ("127.0.0.1", receiver.address[1]))
        with pytest.raises(ValueError, match="open the Receiver with destinations=True"):
            receiver.reply(receiver.recv(5), [b"x"])
