"""XdpReceiver on a veth: what a batch says, what it takes and what it leaves, and whose the frames are."""

from __future__ import annotations

import errno
import threading
import time
from typing import Any

import pytest

from fastrecv import Batch, Receiver
from fastrecv.backend import ReceiverBackend
from fastrecv.xdp import XdpReceiver
from tests.kernel.cable import FAR, FAR6, NEAR, NEAR6, PORT, Cable, payloads

pytestmark = pytest.mark.needs("AF_XDP in copy mode")


@pytest.mark.parametrize(("source", "to"), [(FAR, NEAR), (FAR6, NEAR6)])
def test_a_batch_says_what_that_of_a_socket_says(cable: Cable, source: str, to: str) -> None:
    sent = [bytes([size % 251]) * size for size in (0, 1, 2, 7, 100, 1432)]
    before = time.time_ns()
    batch = gathered(cable, sent, source)
    options: Any = {"destinations": True, "destination_ports": True, "timestamps": True, "tos": True}
    with Receiver.bind((to, PORT), **options) as plain:
        for data in sent:
            cable.put(cable.datagram(data, source))
        time.sleep(0.1)
        other = plain.recv(2)
    assert type(batch) is type(other) is Batch
    assert list(batch.datagrams()) == list(other.datagrams()) == [(data, batch.source(0)) for data in sent]
    for column in ("sources", "destinations", "lengths", "tos", "flags"):
        assert getattr(batch, column).tobytes() == getattr(other, column).tobytes()
    assert batch.timestamps is not None
    assert before <= batch.timestamps.min()
    assert batch.timestamps.max() <= time.time_ns()
    assert batch.packed()[0].tobytes() == b"".join(sent)


def gathered(cable: Cable, sent: list[bytes], source: str) -> Batch:
    """One batch of all of them, from a receiver that is closed: its memory outlives it."""
    with XdpReceiver("near0", PORT, timestamps=True, tos=True) as receiver:
        assert isinstance(receiver, ReceiverBackend)
        for data in sent:
            cable.put(cable.datagram(data, source))
        time.sleep(0.1)
        return receiver.recv(2)


def test_what_is_not_asked_for_goes_on_to_the_stack_and_is_counted(cable: Cable) -> None:
    other, icmp = cable.server(NEAR, 9999), cable.client(NEAR, 7777)
    with XdpReceiver("near0", [PORT, 4739], addresses=[NEAR]) as receiver:
        cable.put(cable.datagram(b"foreign port", port=9999))
        cable.put(cable.datagram(b"first"))
        cable.put(cable.datagram(b"second", port=4739))
        cable.put(cable.datagram(b"other address", FAR6))
        cable.put(b"\x02\0\0\0\0\x09" + cable.datagram(b"other host")[6:])
        icmp.send(b"nobody is there")
        assert payloads(receiver, 2) == [b"first", b"second"]
        assert other.recv(100) == b"foreign port"
        with pytest.raises(ConnectionRefusedError):
            icmp.recv(100)
        passed = receiver.statistics().passed
        assert (passed["other_port"], passed["other_address"], passed["other_host"]) == (2, 1, 1)


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("to", [NEAR, NEAR6])
def test_what_a_sender_on_this_host_leaves_to_its_card_is_accepted_on_a_veth(
    cable: Cable, to: str, offload: bool
) -> None:
    cable.offload(offload)
    client = cable.client(to)
    for checksums in (None, "partial", "verify", "trust"):
        options: Any = {"checksums": checksums} if checksums else {}
        with XdpReceiver("near0", PORT, **options) as receiver:
            for number in range(100):
                client.send(b"x" * number)
            if checksums == "verify" and offload:
                assert not len(receiver.recv(0.2))
                assert receiver.statistics().bad_checksum == 100
            else:
                assert payloads(receiver, 100) == [b"x" * number for number in range(100)]
                assert receiver.statistics().bad_checksum == 0


@pytest.mark.parametrize("source", [FAR, FAR6])
def test_a_wrong_checksum_is_dropped_and_counted_and_its_frame_used_again(cable: Cable, source: str) -> None:
    right = cable.datagram(b"payload", source)
    with XdpReceiver("near0", PORT, ring_size=8, frames=8) as receiver:
        for number in range(50):
            wrong = bytearray(right)
            wrong[-1 - number % 7] ^= 1 << number % 8
            cable.put(bytes(wrong))
            while receiver.statistics().bad_checksum <= number:
                assert not len(receiver.recv(0.01))
        cable.put(right)
        assert payloads(receiver, 1) == [b"payload"]
        statistics = receiver.statistics()
    assert statistics.bad_checksum == 50
    assert statistics.held == 0
    assert statistics.kernel.dropped == 0


def test_a_udp4_datagram_without_a_checksum_is_taken(cable: Cable) -> None:
    frame = bytearray(cable.datagram(b"no sum"))
    frame[40:42] = bytes(2)
    with XdpReceiver("near0", PORT) as receiver:
        cable.put(bytes(frame))
        assert payloads(receiver, 1) == [b"no sum"]


def test_frames_are_held_by_views_and_come_back_with_the_last_of_them(cable: Cable) -> None:
    with XdpReceiver("near0", PORT, ring_size=64, frames=64, batch_size=16) as receiver:
        held: list[memoryview] = []
        for number in range(64):
            cable.put(cable.datagram(b"%d" % number))
        while len(held) < 64:
            batch = receiver.recv(2)
            held += [batch[row] for row in range(len(batch))]
        del batch
        assert receiver.statistics().held == 64
        cable.put(cable.datagram(b"lost"))
        with pytest.raises(BufferError, match=r"64 of 64 frames are held .* release\(\) or copy\(\)"):
            receiver.recv(0)
        time.sleep(0.05)
        assert receiver.statistics().kernel.dropped == 1
        assert [bytes(view) for view in held] == [b"%d" % number for number in range(64)]
        del held[0]
        assert receiver.statistics().held == 64  # the others of its batch
        del held[:]
        assert receiver.statistics().held == 0
        cable.put(cable.datagram(b"again"))
        assert payloads(receiver, 1) == [b"again"]


def test_batches_may_end_in_other_threads(cable: Cable) -> None:
    with XdpReceiver("near0", PORT, ring_size=64, frames=128) as receiver:
        done = 0
        for _ in range(50):
            for number in range(40):
                cable.put(cable.datagram(b"%d" % number))
            batches: list[Batch] = []
            while sum(len(batch) for batch in batches) < 40:
                batches.append(receiver.recv(2))
            done += 40
            threads = [threading.Thread(target=batch.release) for batch in batches]
            del batches
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            del threads, thread
        assert receiver.statistics()[:2][1] == done == 2000
        assert receiver.statistics().held == 0


def test_threads_share_a_receiver(cable: Cable) -> None:
    """Every datagram comes to one of them, once."""
    found: list[bytes] = []
    with XdpReceiver("near0", PORT, ring_size=512, batch_size=8) as receiver:

        def receive() -> None:
            for batch in receiver:
                found.extend(data for data, _ in batch.datagrams())

        threads = [threading.Thread(target=receive) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(20_000):
            cable.put(cable.datagram(b"%d" % number))
            while number - len(found) > 400:
                time.sleep(0.001)
        deadline = time.monotonic() + 5
        while len(found) < 20_000 and time.monotonic() < deadline:
            time.sleep(0.01)
        receiver.close()
        for thread in threads:
            thread.join()
    assert sorted(map(int, found)) == list(range(20_000))


def test_what_threads_receive_while_it_is_closed_is_counted(cable: Cable) -> None:
    frames = [cable.datagram(b"%d" % number) for number in range(100)]
    for _ in range(5):
        received = [0, 0, 0]
        receiver = XdpReceiver("near0", PORT, ring_size=512, batch_size=4)

        def receive(place: int, receiver: XdpReceiver = receiver, received: list[int] = received) -> None:
            for batch in receiver:
                received[place] += len(batch)

        threads = [threading.Thread(target=receive, args=(place,)) for place in range(3)]
        for thread in threads:
            thread.start()
        for frame in frames:
            cable.put(frame)
        receiver.close()
        for thread in threads:
            thread.join()
        assert receiver.statistics().datagrams == sum(received)


def test_closing_wakes_who_waits_and_the_batches_stay(cable: Cable) -> None:
    receiver = XdpReceiver("near0", PORT)
    cable.put(cable.datagram(b"kept"))
    batch = receiver.recv(2)
    codes: list[int | None] = []

    def wait() -> None:
        with pytest.raises(OSError, match="closed") as raised:
            receiver.recv()
        codes.append(raised.value.errno)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    receiver.close()
    receiver.close()
    for thread in threads:
        thread.join(5)
    assert codes == [errno.EBADF] * 3
    assert bytes(batch[0]) == b"kept"
    assert receiver.statistics().datagrams == 1
    with pytest.raises(OSError, match="closed"):
        receiver.recv(0)
    server = cable.server()
    cable.put(cable.datagram(b"to the stack"))
    assert server.recv(100) == b"to the stack"
