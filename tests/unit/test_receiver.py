"""Receiver on real sockets over loopback: what arrives, what is said of it, and what happens when things go wrong."""

from __future__ import annotations

import errno
import gc
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastrecv import CONTROL_TRUNCATED, TRUNCATED, Batch, NotSupported, Receiver, sockets
from fastrecv._recv import MAX_BATCH

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
FAMILIES = [socket.AF_INET, socket.AF_INET6]


def sender(to: Receiver) -> socket.socket:
    sock = socket.socket(to.socket.family, socket.SOCK_DGRAM)
    sock.connect(to.address)
    return sock


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def gather(receiver: Receiver, count: int) -> list[tuple[bytes, object]]:
    """`count` datagrams, however many batches they come in."""
    found: list[tuple[bytes, object]] = []
    while len(found) < count:
        batch = receiver.recv(5)
        assert batch, f"only {len(found)} of {count} datagrams came"
        found += batch.datagrams()
    return found


@pytest.fixture(params=FAMILIES, ids=["ipv4", "ipv6"])
def receiver(request: pytest.FixtureRequest) -> Iterator[Receiver]:
    with Receiver.bind((LOOPBACK[request.param], 0)) as made:
        yield made


def test_datagrams_arrive_whole_in_order_and_with_their_sender(receiver: Receiver) -> None:
    payloads = [random.randbytes(size) for size in (0, 1, 13, 1472, 9000, 65507)]
    with sender(receiver) as sock:
        for payload in payloads:
            sock.send(payload)
        batch = receiver.recv(5)
        assert [bytes(view) for view, _ in batch] == payloads
        assert [batch.source(i) for i in range(len(batch))] == [sock.getsockname()] * len(payloads)
        assert batch.lengths.tolist() == [len(payload) for payload in payloads]
        assert not batch.flags.any()


def test_a_source_is_what_the_socket_module_says(receiver: Receiver) -> None:
    with sender(receiver) as sock:
        sock.send(b"one")
        sock.send(b"two")
        batch = receiver.recv(5)
        assert batch.source(-1) == sock.getsockname()
        assert batch.sources is not None
        row = batch.sources[0]
        packed = bytes(row["address"])
        expected = socket.inet_pton(sock.family, sock.getsockname()[0])
        assert packed[-len(expected) :] == expected
        assert (int(row["family"]), int(row["port"]), int(row["scope"])) == (sock.family, sock.getsockname()[1], 0)


def test_a_dual_stack_socket_receives_both() -> None:
    with Receiver.bind(("::", 0), destinations=True, destination_ports=True, tos=True) as receiver:
        port = receiver.address[1]
        for family in FAMILIES:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                if family == socket.AF_INET:
                    sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x2A)
                else:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 0x2B)
                sock.sendto(b"x", (LOOPBACK[family], port))
                batch = receiver.recv(5)
                host = "::ffff:127.0.0.1" if family == socket.AF_INET else "::1"
                assert batch.source(0) == (host, sock.getsockname()[1], 0, 0)
                loopback = socket.if_nametoindex("lo")
                assert batch.destination(0) == (host, port, 0, loopback)
                assert batch.tos is not None
                assert batch.tos.tolist() == [0x2A if family == socket.AF_INET else 0x2B]


def test_a_socket_may_be_kept_to_ipv6() -> None:
    with Receiver.bind(("::", 0), dual_stack=False) as receiver, socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", receiver.address[1]))  # would be taken, were it both


@pytest.mark.parametrize("name", ["path", b"\0fastrecv-test-%d" % os.getpid()], ids=["path", "abstract"])
def test_unix_datagrams_with_and_without_a_sender(name: str | bytes, tmp_path: Path) -> None:
    address = str(tmp_path / name) if isinstance(name, str) else name
    with Receiver.bind(address) as receiver:
        nameless, sock = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
        with nameless, sock:
            nameless.sendto(b"nameless", address)
            theirs = str(tmp_path / "sender")
            sock.bind(theirs)
            sock.sendto(b"named", address)
            sock.sendto(b"", address)
            batch = receiver.recv(5)
            assert list(batch.datagrams()) == [(b"nameless", None), (b"named", theirs), (b"", theirs)]
            assert batch.sources is None
            assert batch.copy().source(1) == theirs
            assert receiver.reply(batch, [None, b"answer", b""]) == 2
            assert (sock.recv(99), sock.recv(99)) == (b"answer", b"")
            assert receiver.send([b"more", b"and more"], theirs) == 2
            assert (sock.recv(99), sock.recv(99)) == (b"more", b"and more")
    if isinstance(address, str):
        assert not Path(address).exists()


def test_an_abstract_sender_is_named_in_bytes() -> None:
    ours, theirs = (b"\0fastrecv-%s-%d" % (which, os.getpid()) for which in (b"a", b"b"))
    with Receiver.bind(ours) as receiver, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(theirs)
        sock.sendto(b"x", ours)
        batch = receiver.recv(5)
        assert batch.source(0) == theirs
        assert receiver.reply(batch, [b"y"]) == 1
        assert sock.recvfrom(9) == (b"y", ours)


def test_a_receiver_over_an_open_socket_leaves_it_open(receiver: Receiver) -> None:
    with Receiver(receiver.socket) as second, sender(receiver) as sock:
        sock.send(b"x")
        assert len(second.recv(5)) == 1
    assert receiver.socket.fileno() >= 0
    with sender(receiver) as sock:
        sock.send(b"y")
        assert gather(receiver, 1)[0][0] == b"y"


def test_closing_the_socket_underneath_does_not_disturb_the_receiver() -> None:
    sock = sockets.open_datagram(("127.0.0.1", 0))
    with Receiver(sock) as receiver, sender(receiver) as peer:
        sock.close()
        peer.send(b"x")
        assert bytes(receiver.recv(5)[0]) == b"x"


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_an_empty_batch_means_that_the_time_is_over(receiver: Receiver, timeout: float) -> None:
    begin = time.monotonic()
    batch = receiver.recv(timeout)
    assert time.monotonic() - begin >= timeout
    assert len(batch) == 0
    assert not batch
    assert batch.sources is not None
    assert (len(batch.lengths), len(batch.sources), list(batch), len(batch.records("u4"))) == (0, 0, [], 0)
    assert batch.packed()[1].tolist() == [0]


def test_recv_waits_for_the_first_datagram(receiver: Receiver) -> None:
    with sender(receiver) as sock:
        timer = threading.Timer(0.05, sock.send, [b"late"])
        timer.start()
        assert bytes(receiver.recv()[0]) == b"late"
        timer.join()


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_timeout_that_is_none_is_refused(receiver: Receiver, timeout: float) -> None:
    with pytest.raises(ValueError, match="give seconds, 0 not to wait, None to wait for ever"):
        receiver.recv(timeout)


@pytest.mark.parametrize("size", [1, 7, MAX_BATCH])
def test_a_batch_takes_up_to_its_size(size: int) -> None:
    with Receiver.bind(("127.0.0.1", 0), batch_size=size, slot_size=64) as receiver, sender(receiver) as sock:
        sockets.grow_receive_buffer(receiver.socket, 4 << 20)
        count = min(2 * size + 1, 150)
        for i in range(count):
            sock.send(i.to_bytes(2))
        sizes: list[int] = []
        found: list[int] = []
        while len(found) < count:
            batch = receiver.recv(5)
            sizes.append(len(batch))
            found += [int.from_bytes(view) for view, _ in batch]
        assert found == list(range(count))
        assert sizes == [size] * (count // size) + ([count % size] if count % size else [])


def test_a_datagram_larger_than_its_slot_is_cut_and_says_so() -> None:
    with Receiver.bind(("127.0.0.1", 0), slot_size=10) as receiver, sender(receiver) as sock:
        for size in (10, 11, 0, 5000):
            sock.send(bytes([size % 251]) * size)
        batch = receiver.recv(5)
        assert batch.lengths.tolist() == [10, 10, 0, 10]
        assert batch.flags.tolist() == [0, TRUNCATED, 0, TRUNCATED]
        assert [bytes(view) for view, _ in batch] == [bytes([10]) * 10, bytes([11]) * 10, b"", bytes([5000 % 251]) * 10]
        assert receiver.statistics()[:5] == (1, 4, 30, 2, 0)


def test_control_messages_that_found_no_room_are_reported(receiver: Receiver) -> None:
    receiver.socket.setsockopt(socket.SOL_SOCKET, 64, 1)  # SO_TIMESTAMPNS_NEW, behind the Receiver's back
    with sender(receiver) as sock:
        sock.send(b"x")
        batch = receiver.recv(5)
    assert batch.flags.tolist() == [CONTROL_TRUNCATED]
    assert (bytes(batch[0]), batch.timestamps) == (b"x", None)
    assert receiver.statistics().control_truncated == 1


def test_the_error_of_a_connected_socket_is_raised_and_nothing_is_lost() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as peer, socket.socket(type=socket.SOCK_DGRAM) as sock:
        peer.bind(("127.0.0.1", 0))
        sock.bind(("127.0.0.1", 0))
        sock.connect(peer.getsockname())
        peer.sendto(b"before", sock.getsockname())
        where = peer.getsockname()
        peer.close()
        sock.send(b"into the void")  # ICMP: nobody there
        with Receiver(sock) as receiver:
            with pytest.raises(ConnectionRefusedError):
                receiver.recv(5)
            assert bytes(receiver.recv(5)[0]) == b"before"
            with socket.socket(type=socket.SOCK_DGRAM) as again:
                again.bind(where)
                again.sendto(b"after", sock.getsockname())
                assert bytes(receiver.recv(5)[0]) == b"after"


def test_an_error_queue_that_nobody_reads_does_not_keep_anybody_spinning() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
        with socket.socket(type=socket.SOCK_DGRAM) as nobody:
            nobody.bind(("127.0.0.1", 0))
            where = nobody.getsockname()
        sock.connect(where)
        sock.send(b"x")
        with Receiver(sock) as receiver, select.epoll() as loop:  # somebody else's loop
            loop.register(sock, select.EPOLLIN)
            assert loop.poll(5) == [(sock.fileno(), select.EPOLLERR)]
            with pytest.raises(ConnectionRefusedError):
                receiver.recv(0)
            assert loop.poll(0) == []
            for _ in range(50):  # one refusal each, none twice and none lost
                sock.send(b"x")
                assert loop.poll(5)
                with pytest.raises(ConnectionRefusedError):
                    receiver.recv(0)
                assert not receiver.recv(0)


def test_an_error_queue_that_is_kept_for_something_else_is_left_alone() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, 37, 1 << 1 | 1 << 4)  # SO_TIMESTAMPING: TX_SOFTWARE | SOFTWARE
        sock.bind(("127.0.0.1", 0))
        with Receiver(sock) as receiver:
            sock.sendto(b"x", sock.getsockname())
            assert len(receiver.recv(5)) == 1
            before = time.process_time()
            assert not receiver.recv(0.3)
            assert time.process_time() - before < 0.2
            assert receiver.features == set()
        assert sock.recvmsg(100, 200, socket.MSG_ERRQUEUE)[1]  # its transmit timestamp


def test_a_socket_that_was_shut_down_says_so(receiver: Receiver) -> None:
    with sender(receiver) as sock:
        receiver.socket.connect(sock.getsockname())
        receiver.socket.shutdown(socket.SHUT_RD)
        with pytest.raises(OSError, match="the socket was shut down for receiving") as caught:
            receiver.recv(5)
        assert caught.value.errno == errno.ESHUTDOWN


def test_descriptors_that_a_stranger_sends_are_closed(tmp_path: Path) -> None:
    with Receiver.bind(tmp_path / "x", timestamps=True) as receiver:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            before = descriptors()
            sock.connect(str(tmp_path / "x"))
            for i in range(10):
                socket.send_fds(sock, [b"%d" % i], [0, 0, 0, 0])
            found = gather(receiver, 10)
        assert descriptors() == before - 1
        assert [payload for payload, _ in found] == [b"%d" % i for i in range(10)]


def test_a_child_of_a_fork_neither_wakes_nor_unnames_its_parent(tmp_path: Path) -> None:
    program = (
        "import fastrecv, os, sys, time, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "receiver = fastrecv.Receiver.bind(sys.argv[1])\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    receiver.close()\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "before = time.process_time()\n"
        "assert not receiver.recv(0.3)\n"
        "assert time.process_time() - before < 0.2\n"
        "assert os.path.exists(sys.argv[1])\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    assert not receiver.recv(0.6)\n"
        "    os._exit(0 if time.process_time() < 0.2 else 1)\n"
        "time.sleep(0.1)\n"
        "receiver.close()\n"
        "assert not os.path.exists(sys.argv[1])\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], check=True, timeout=20)


def test_a_path_that_a_successor_has_taken_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    first = Receiver.bind(path)
    path.unlink()
    with Receiver.bind(path) as second:
        first.close()
        assert path.exists()
        with sender(second) as sock:
            sock.send(b"x")
            assert len(second.recv(5)) == 1
    assert not path.exists()


def test_more_threads_than_arenas_may_wait(receiver: Receiver) -> None:
    sizes: list[int] = []
    threads = [threading.Thread(target=lambda: sizes.append(len(receiver.recv(0.3)))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [0] * 12


def test_one_arena_is_enough_for_a_loop() -> None:
    with Receiver.bind(("127.0.0.1", 0), arenas=1) as receiver, sender(receiver) as sock:
        sock.send(b"x")
        count = 0
        for batch in receiver:
            count += len(batch)
            del batch
            if count == 5:
                break
            sock.send(b"x")


def test_a_closed_receiver_says_so(receiver: Receiver) -> None:
    receiver.close()
    for use in (lambda: receiver.address, lambda: receiver.drops, lambda: receiver.join("239.1.1.1"),
                lambda: receiver.receive_buffer, lambda: receiver.send([b"x"])):  # fmt: skip
        with pytest.raises(OSError, match="the Receiver is closed"):
            use()


def test_drops_count_from_the_receivers_beginning() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as sock, socket.socket(type=socket.SOCK_DGRAM) as peer:
        sock.bind(("127.0.0.1", 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for _ in range(100):
            peer.sendto(bytes(500), sock.getsockname())
        while select.select([sock], [], [], 0)[0]:
            sock.recv(1000)
        assert sockets.drops(sock) > 50
        with Receiver(sock, drops=True) as receiver:
            peer.sendto(b"x", sock.getsockname())
            assert receiver.recv(5).drops == 0


def test_busy_polling_is_asked_for_whole() -> None:
    with pytest.raises(ValueError, match="need busy_poll"):
        Receiver.bind(("127.0.0.1", 0), prefer_busy_poll=True)


def test_transmit_timestamps_of_the_owner_survive_what_we_ask_for() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, 65, 1 << 1 | 1 << 4)  # SO_TIMESTAMPING_NEW
        with Receiver(sock, hardware_timestamps=True) as receiver:
            assert receiver.features == {"hardware_timestamps"}
            assert sock.getsockopt(socket.SOL_SOCKET, 65) == 1 << 1 | 1 << 4 | 1 << 2 | 1 << 6


def test_close_from_another_thread_wakes_every_waiting_recv(receiver: Receiver) -> None:
    codes: list[int | None] = []

    def wait() -> None:
        try:
            receiver.recv()
        except OSError as error:
            codes.append(error.errno)

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    receiver.close()
    for thread in threads:
        thread.join(5)
    assert codes == [errno.EBADF] * 4
    receiver.close()
    for call in (receiver.recv, receiver.recv_nowait, receiver.fileno):
        with pytest.raises(OSError, match="the Receiver is closed"):
            call()
    assert receiver.closed


def test_a_watched_receiver_tells_of_datagrams_and_of_its_end(receiver: Receiver) -> None:
    with receiver.watched() as descriptors:
        assert select.select(descriptors, [], [], 0)[0] == []
        with sender(receiver) as sock:
            sock.send(b"x")
        assert len(select.select(descriptors, [], [], 5)[0]) == 1
        assert len(receiver.recv_nowait()) == 1
        timer = threading.Timer(0.05, receiver.close)
        timer.start()
        assert len(select.select(descriptors, [], [], 5)[0]) == 1
        timer.join()
        assert receiver.closed
        assert all(os.fstat(descriptor) for descriptor in descriptors)  # not yet somebody else's
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_iteration_ends_when_the_receiver_is_closed(receiver: Receiver) -> None:
    found = []
    with sender(receiver) as sock:
        sock.send(b"x")
        timer = threading.Timer(0.1, receiver.close)
        timer.start()
        found = [bytes(view) for batch in receiver for view, _ in batch]
        timer.join()
    assert found == [b"x"]


def test_batches_outlive_the_receiver() -> None:
    with Receiver.bind(("127.0.0.1", 0)) as receiver, sender(receiver) as sock:
        sock.send(b"still here")
        batch = receiver.recv(5)
    del receiver
    gc.collect()
    assert bytes(batch[0]) == b"still here"


def test_a_receiver_that_is_forgotten_warns_and_leaks_nothing() -> None:
    before = descriptors()
    made = Receiver.bind(("127.0.0.1", 0))
    assert descriptors() == before + 3  # the socket, the Receiver's own descriptor, the wake-up
    with pytest.warns(ResourceWarning, match="unclosed Receiver"):
        del made
    assert descriptors() == before


def test_a_signal_handler_runs_while_recv_waits(receiver: Receiver) -> None:
    class Rung(Exception):  # noqa: N818
        pass

    def ring(*_: object) -> None:
        raise Rung

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Rung):
            receiver.recv(10)
    finally:
        signal.signal(signal.SIGALRM, before)
    with sender(receiver) as sock:  # the arena came back
        for _ in range(10):
            sock.send(b"x")
            assert len(receiver.recv(5)) == 1


def test_control_c_ends_a_process_that_waits() -> None:
    program = (
        "import fastrecv\n"
        "with fastrecv.Receiver.bind(('127.0.0.1', 0)) as receiver:\n"
        "    print('ready', flush=True)\n"
        "    receiver.recv()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=5)
    assert b"KeyboardInterrupt" in errors


def test_a_full_queue_is_counted() -> None:
    with Receiver.bind(("127.0.0.1", 0), drops=True) as receiver, sender(receiver) as sock:
        receiver.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the kernel's minimum
        sent = 200
        for _ in range(sent):
            sock.send(bytes(500))
        got = 0
        while batch := receiver.recv(0):
            got += len(batch)
            assert batch.drops == 0  # these were queued before the first was lost
        assert 0 < got < sent
        assert receiver.drops == sent - got
        sock.send(b"one more")
        assert receiver.recv(5).drops == sent - got


def test_without_the_option_a_batch_does_not_count_drops(receiver: Receiver) -> None:
    assert receiver.recv(0).drops is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_feature_at_once(family: socket.AddressFamily) -> None:
    features = {"timestamps", "hardware_timestamps", "destinations", "destination_ports", "tos", "drops", "gro"}
    with Receiver.bind((LOOPBACK[family], 0), **dict.fromkeys(features, True)) as receiver:
        assert receiver.features == features
        with sender(receiver) as sock:
            if family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x2E << 2 | 1)
            else:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 0x2E << 2 | 1)
            before = time.time_ns()
            sock.send(b"x")
            batch = receiver.recv(5)
            assert batch.timestamps is not None
            assert batch.hardware_timestamps is not None
            assert batch.destinations is not None
            assert batch.tos is not None
            assert before <= batch.timestamps[0] <= time.time_ns()
            assert batch.hardware_timestamps.tolist() == [0]  # loopback has no clock
            assert batch.destination(0) == (
                receiver.address if family == socket.AF_INET else (*receiver.address[:3], socket.if_nametoindex("lo"))
            )
            assert batch.destinations["scope"].tolist() == [socket.if_nametoindex("lo")]
            assert batch.tos.tolist() == [0x2E << 2 | 1]
            assert batch.drops == 0
            assert not batch.flags.any()


def test_options_that_the_socket_has_already_are_read_back() -> None:
    with Receiver.bind(("127.0.0.1", 0), gro=True, timestamps=True, slot_size=100) as first:
        assert first.slot_size == 65535
        with Receiver(first.socket, slot_size=100, destinations=True) as second:
            assert second.features == {"gro", "timestamps", "destinations"}
            assert second.slot_size == 65535
            with sender(first) as sock:
                sock.send(bytes(60_000))
                batch = second.recv(5)
                assert batch.lengths.tolist() == [60_000]
                assert not batch.flags.any()
                assert batch.timestamps is not None
                assert batch.timestamps[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gro_train_is_split_into_what_was_sent(family: socket.AddressFamily) -> None:
    payloads = [random.randbytes(1400) for _ in range(40)] + [random.randbytes(333)]
    payloads += [random.randbytes(100) for _ in range(300)] + [b"", random.randbytes(7)]
    with (
        Receiver.bind((LOOPBACK[family], 0), gro=True, tos=True, destinations=True, receive_buffer=4 << 20) as receiver,
        Receiver.bind((LOOPBACK[family], 0)) as other,
    ):
        assert other.send(payloads, receiver.address) == len(payloads)
        batch = receiver.recv(5)  # far more rows than trains
        found: list[tuple[bytes, object]] = list(batch.datagrams())
        assert len(found) > 64
        assert receiver.statistics().batches == 1
        found += gather(receiver, len(payloads) - len(found))
        assert [payload for payload, _ in found] == payloads
        assert {source for _, source in found} == {other.address}
        assert batch.tos is not None
        assert set(batch.tos.tolist()) == {0}
        assert batch.destinations is not None
        assert set(batch.destinations["port"].tolist()) <= {0}
        assert {batch.destination(i)[0] for i in range(len(batch))} == {LOOPBACK[family]}  # type: ignore[index]


def test_threads_that_share_a_receiver_get_each_datagram_once() -> None:
    count, threads = 4000, 4
    with Receiver.bind(("127.0.0.1", 0), receive_buffer=16 << 20, batch_size=16, arenas=8) as receiver:
        seen: list[list[int]] = [[] for _ in range(threads)]

        def read(mine: list[int]) -> None:
            while batch := receiver.recv(0.5):
                mine += [int.from_bytes(view) for view, _ in batch]

        readers = [threading.Thread(target=read, args=[mine]) for mine in seen]
        for reader in readers:
            reader.start()
        with sender(receiver) as sock:
            for i in range(count):
                sock.send(i.to_bytes(4))
                if i % 100 == 0:
                    time.sleep(0.001)
        for reader in readers:
            reader.join()
        assert receiver.drops == 0
        assert sorted(number for mine in seen for number in mine) == list(range(count))
        assert receiver.statistics().datagrams == count


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0: give 1 to 1,024"),
        ({"batch_size": 1025}, ValueError, "batch_size is 1025: give 1 to 1,024"),
        ({"slot_size": 0}, ValueError, "slot_size is 0"),
        ({"arenas": 0}, ValueError, "arenas is 0"),
        ({"arenas": 4, "max_arenas": 3}, ValueError, "max_arenas is 3: give 4 to"),
        ({"batch_size": 1024, "slot_size": 1 << 20, "arenas": 1}, None, ""),
        ({"batch_size": 1024, "slot_size": (1 << 20) + 1}, ValueError, "slot_size"),
        ({"timestamp": True}, TypeError, "no option 'timestamp': choose from timestamps, .*, reuse_port, dual_stack"),
        ({"timestamps": "no"}, TypeError, "timestamps is 'no': give True or False"),
        ({"batch_size": "64"}, ValueError, "batch_size is '64': give 1 to 1,024"),
        ({"receive_buffer": 0}, ValueError, "receive_buffer is 0: give 1 to"),
        ({"receive_buffer": "64M"}, ValueError, "receive_buffer is '64M': give 1 to"),
        ({"incoming_cpu": 99999}, ValueError, "incoming_cpu is 99999: give 0 to"),
        ({"busy_poll": -1}, ValueError, "busy_poll is -1: give 0 to"),
    ],
)
def test_options_out_of_bounds_are_refused(options: dict[str, int], error: type[Exception] | None, words: str) -> None:
    before = descriptors()
    if error is None:
        Receiver.bind(("127.0.0.1", 0), **options).close()  # type: ignore[arg-type] # that is the test
    else:
        with pytest.raises(error, match=words):
            Receiver.bind(("127.0.0.1", 0), **options)  # type: ignore[arg-type] # that is the test
    assert descriptors() == before


def test_what_is_no_datagram_socket_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Receiver takes an open socket, .*: Receiver\.bind\(address\) opens one"):
        Receiver(("127.0.0.1", 0))  # type: ignore[arg-type] # that is the test
    with socket.socket(type=socket.SOCK_DGRAM) as sock, pytest.raises(TypeError, match=r"is for Receiver\.bind"):
        Receiver(sock, receive_buffer=1)  # type: ignore[call-arg] # that is the test
    with socket.socket() as stream, pytest.raises(ValueError, match="needs a UDP or AF_UNIX datagram socket"):
        Receiver(stream)


def test_a_feature_that_the_family_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="drops, gro cannot be had of a socket of family AF_UNIX"):
        Receiver.bind(str(tmp_path / "x"), gro=True, drops=True)
    assert not (tmp_path / "x").exists()


def test_an_option_that_the_kernel_refuses_names_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastrecv.options as module

    setting = module._Setting("gro", socket.IPPROTO_UDP, 12345, 1, 4, (socket.AF_INET,), "Linux 9.9")
    monkeypatch.setattr(module, "_SETTINGS", (setting,))
    with pytest.raises(NotSupported, match=r"gro not available: Protocol not available \(needs Linux 9.9\)"):
        Receiver.bind(("127.0.0.1", 0), gro=True)


def test_arenas_are_made_up_to_the_limit_and_then_recv_refuses_and_loses_nothing() -> None:
    with Receiver.bind(("127.0.0.1", 0), batch_size=1, arenas=2, max_arenas=5) as receiver, sender(receiver) as sock:
        for i in range(6):
            sock.send(bytes([i]))
        assert receiver.arenas == 2
        held: list[Batch] = [receiver.recv(5) for _ in range(5)]
        assert receiver.arenas == 5
        with pytest.raises(BufferError, match=r"all 5 arenas are held .* release\(\) or copy\(\) one"):
            receiver.recv(5)
        views = [batch[0] for batch in held]
        held[2].release()
        with pytest.raises(BufferError):  # a view of it lives
            receiver.recv(5)
        del views[2]
        last = receiver.recv(5)
        assert [bytes(view) for view in views] == [bytes([i]) for i in (0, 1, 3, 4)]
        assert bytes(last[0]) == bytes([5])


def test_memory_is_touched_only_where_datagrams_lie() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    with Receiver.bind(("127.0.0.1", 0), batch_size=1024, arenas=4) as receiver, sender(receiver) as sock:
        sock.send(b"x")
        batch = receiver.recv(5)
        assert batch.data.nbytes == 1024 * 65536
        assert resident() - before < 16 << 20
    assert isinstance(batch.offsets, np.ndarray)
