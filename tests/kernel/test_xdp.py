"""XdpReceiver on a veth: what it takes and what it leaves, whose the frames are, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import struct
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest

from fastrecv import Batch, Receiver, aio
from fastrecv.adapters.xdp import create_datagram_endpoint
from fastrecv.backend import ReceiverBackend
from fastrecv.bpf import packaged
from fastrecv.errors import XdpError
from fastrecv.interfaces import Interface
from fastrecv.redirect import Redirect
from fastrecv.xdp import XdpReceiver
from tests.kernel.cable import FAR, FAR6, NEAR, NEAR6, PORT, VLAN, VLAN_FAR, VLAN_NEAR, Cable, laid

NOTHING: list[bytes] = []


@pytest.fixture
def cable() -> Iterator[Cable]:
    with laid() as made, made.near:
        yield made


def payloads(receiver: XdpReceiver, count: int) -> list[bytes]:
    """Of the next `count` datagrams; fails when they do not come."""
    found: list[bytes] = []
    while len(found) < count:
        batch = receiver.recv(2)
        assert len(batch), f"{len(found)} of {count} datagrams came"
        found += [data for data, _ in batch.datagrams()]
    assert not len(receiver.recv(0))
    return found


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
            assert not len(receiver.recv(0.05))
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


def test_no_byte_changes_under_a_view_while_frames_arrive(cable: Cable) -> None:
    rng = np.random.default_rng(1)
    kept: list[tuple[Any, bytes]] = []
    arrived = 0
    with XdpReceiver("near0", PORT, ring_size=256, frames=2048, batch_size=32) as receiver:
        for turn in range(400):
            for number in range(50):
                cable.put(cable.datagram(b"%d %d " % (turn, number) * int(rng.integers(1, 60))))
            while len(batch := receiver.recv(0)):
                arrived += len(batch)
                row = int(rng.integers(len(batch)))
                kept.append((batch[row], bytes(batch[row])))
                kept.append((batch.records("u1"), batch.records("u1").tobytes()))
                del batch
            while len(kept) > 60:
                view, data = kept.pop(int(rng.integers(len(kept))))
                assert bytes(view) == data
        for view, data in kept:
            assert bytes(view) == data
        statistics = receiver.statistics()
        assert arrived + statistics.kernel.dropped == 400 * 50
        assert statistics.kernel.dropped == 0
        kept.clear()
        del view
        gc.collect()
        assert receiver.statistics().held == 0


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


def test_an_event_loop_gets_its_batches(cable: Cable) -> None:
    async def main() -> list[bytes]:
        found: list[bytes] = []
        with XdpReceiver("near0", PORT, ring_size=16, frames=32) as receiver:
            for number in range(10):
                cable.put(cable.datagram(b"%d" % number))
            async for batch in aio.batches(receiver):
                for data, _ in batch.datagrams():
                    found.append(data)
                    if len(found) < 100:
                        cable.put(cable.datagram(b"%d" % (len(found) + 9)))
                if len(found) == 109:
                    receiver.close()
        return found

    assert asyncio.run(asyncio.wait_for(main(), 20)) == [b"%d" % number for number in range(109)]


class Echo(asyncio.DatagramProtocol):
    """Any protocol: it knows of no receiver."""

    def __init__(self) -> None:
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        self.transport.sendto(b"echo " + data, address)
        if data == b"end":
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set_result(error)


def test_an_asyncio_protocol_runs_on_it_unchanged(cable: Cable) -> None:
    clients = [cable.client(NEAR), cable.client(NEAR6)]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        receiver = XdpReceiver("near0", PORT)
        transport, protocol = await create_datagram_endpoint(Echo, receiver)
        assert transport.get_extra_info("receiver") is receiver
        for client in clients:
            for number in range(300):
                client.send(b"%d" % number)
                answer = await loop.run_in_executor(None, client.recv, 100)
                assert answer == b"echo %d" % number
        clients[0].send(b"end")
        assert await asyncio.wait_for(protocol.lost, 5) is None
        assert receiver.closed
        assert clients[0].recv(100) == b"echo end"

    asyncio.run(main())


def test_a_protocol_is_told_when_its_receiver_is_closed_by_a_thread(cable: Cable) -> None:
    async def main() -> None:
        receiver = XdpReceiver("near0", PORT)
        _, protocol = await create_datagram_endpoint(Echo, receiver)
        threading.Thread(target=receiver.close).start()
        error = await asyncio.wait_for(protocol.lost, 5)
        assert isinstance(error, OSError)
        assert error.errno == errno.EBADF

    asyncio.run(main())


@pytest.mark.parametrize("to", [NEAR, NEAR6])
def test_answers_leave_by_the_ring_and_by_the_stack_where_that_cannot_be(cable: Cable, to: str) -> None:
    client = cable.client(to)
    with XdpReceiver("near0", PORT, ring_size=64) as receiver:
        for copied in (False, True):
            for size in (0, 1, 1000, 1452 if ":" in to else 1472, 5000):
                client.send(b"question")
                batch = receiver.recv(2)
                answered = batch.copy() if copied else batch
                assert receiver.reply(answered, [b"%d" % copied * size]) == 1
                assert client.recv(9000) == b"%d" % copied * size
        for _ in range(10):
            for _ in range(30):
                client.send(b"question")
            left = 30
            while left:
                batch = receiver.recv(2)
                assert receiver.reply(batch, batch) == len(batch)
                left -= len(batch)
            assert {client.recv(100) for _ in range(30)} == {b"question"}
        client.send(b"no answer")
        assert receiver.reply(receiver.recv(2), [None]) == 0
        assert receiver.send([b"unasked"], client.getsockname()) == 1
        assert client.recv(100) == b"unasked"
        del batch, answered
        statistics = receiver.statistics()
    assert statistics.unanswered == 0
    assert statistics.held == 0
    with pytest.raises(TimeoutError):
        client.recv(100)


def test_an_answer_is_whole_on_the_wire(cable: Cable) -> None:
    """Answers have no card that would finish them: the far stack checks their sums (InCsumErrors stays 0)."""
    client, client6 = cable.client(NEAR), cable.client(NEAR6)
    with XdpReceiver("near0", PORT) as receiver:
        for size in range(200):
            for each in (client, client6):
                each.send(os.urandom(size))
            for _ in range(2):
                batch = receiver.recv(2)
                assert receiver.reply(batch, batch) == len(batch)
                if len(batch) == 2:
                    break
            for each in (client, client6):
                assert len(each.recv(300)) == size


def test_a_foreign_program_stays_and_is_named(cable: Cable) -> None:
    for first, second in ((0, "auto"), (1 << 1, "copy"), (1 << 2, "generic")):
        with packaged("swallow") as swallow:
            program = swallow.load().programs["swallow"]
            with program.attach_xdp(cable.index, first) as link:
                with pytest.raises(XdpError, match=r"near0 has an XDP program already, swallow \(id \d+\)") as raised:
                    XdpReceiver("near0", PORT, mode=second)
                assert raised.value.errno == errno.EBUSY
                assert link.info.ifindex == cable.index
                cable.put(cable.datagram(b"swallowed"))
    with XdpReceiver("near0", PORT) as receiver:
        for mode in ("native", "generic", "auto"):
            with (
                Redirect("near0", PORT + 1) as redirect,
                pytest.raises(XdpError, match=r"already, redirect \(id \d+\)"),
            ):
                redirect.attach(mode)
        with pytest.raises(XdpError, match="another AF_XDP socket has this queue: close it"):
            XdpReceiver("near0", PORT + 1)
        with packaged("swallow") as swallow, pytest.raises(OSError, match="busy"):
            swallow.load().programs["swallow"].attach_xdp(cable.index)
        cable.put(cable.datagram(b"still there"))
        assert payloads(receiver, 1) == [b"still there"]


@pytest.mark.parametrize("mode", ["copy", "generic"])
def test_modes_can_be_forced(cable: Cable, mode: str) -> None:
    with XdpReceiver("near0", PORT, mode=mode) as receiver:
        assert receiver.mode == mode
        cable.put(cable.datagram(b"forced"))
        assert payloads(receiver, 1) == [b"forced"]
    with pytest.raises(XdpError, match="no zero-copy mode"):
        XdpReceiver("near0", PORT, mode="zero-copy")
    with XdpReceiver("near0", PORT) as receiver:
        assert receiver.mode == "copy"
        assert "zero-copy" in receiver.refused["zero-copy"]


def test_generic_mode_is_chosen_where_the_driver_has_no_other(cable: Cable) -> None:
    cable.far_net.link("set", index=cable.far_index, mtu=9000)
    cable.net.link("set", index=cable.index, mtu=9000)
    with XdpReceiver("near0", PORT) as receiver:
        assert receiver.mode == "generic"
        assert list(receiver.refused) == ["zero-copy", "copy"]
        assert "MTU of 9,000 is too large" in receiver.refused["copy"]
        cable.put(cable.datagram(b"x" * 3000))
        assert payloads(receiver, 1) == [b"x" * 3000]
        server = cable.server()
        cable.put(cable.datagram(b"y" * 5000))
        assert server.recv(9000) == b"y" * 5000
        assert receiver.statistics().passed["too_long"] == 1


def test_vlans_are_told_apart(cable: Cable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own addresses are those of untagged frames. Many a kernel is built without 802.1Q devices, so what
    rtnetlink says of one is put in here by hand."""
    told = Interface.addresses
    monkeypatch.setattr(Interface, "addresses", lambda self: {*told(self), (ip_address(VLAN_NEAR), VLAN)})
    tag = struct.pack("!HH", 0x8100, 3 << 13 | VLAN)
    with XdpReceiver("near0", PORT) as receiver:
        receiver._reader.place({VLAN: 77}, [])
        cable.put(cable.datagram(b"tagged", VLAN_FAR, to=VLAN_NEAR, tags=tag))
        batch = receiver.recv(2)
        assert bytes(batch[0]) == b"tagged"
        assert batch.destinations is not None
        assert batch.destinations["scope"][0] == 77
        cable.put(cable.datagram(b"priority", tags=struct.pack("!HH", 0x8100, 5 << 13)))
        assert payloads(receiver, 1) == [b"priority"]
        for wrong in (
            cable.datagram(b"untagged", VLAN_FAR, to=VLAN_NEAR),
            cable.datagram(b"other vlan", VLAN_FAR, to=VLAN_NEAR, tags=struct.pack("!HH", 0x8100, 8)),
            cable.datagram(b"tagged, for the other", tags=tag),
            cable.datagram(b"twice", tags=tag + tag),
            cable.datagram(b"of a provider", tags=struct.pack("!HH", 0x88A8, VLAN)),
        ):
            cable.put(wrong)
        assert payloads(receiver, 0) == NOTHING
        passed = receiver.statistics().passed
        assert (passed["other_address"], passed["nested_vlan"]) == (3, 2)


def test_addresses_that_come_later_count_from_a_refresh_on(cable: Cable) -> None:
    later = "192.0.2.77"
    with XdpReceiver("near0", PORT) as receiver:
        cable.net.addr("add", index=cable.index, address=later, prefixlen=24)
        frame = cable.datagram(b"later", to=later)
        cable.put(frame)
        assert payloads(receiver, 0) == NOTHING
        receiver.refresh()
        cable.put(frame)
        assert payloads(receiver, 1) == [b"later"]
        cable.net.addr("del", index=cable.index, address=later, prefixlen=24)
        receiver.refresh()
        cable.put(frame)
        cable.put(cable.datagram(b"ours"))
        assert payloads(receiver, 1) == [b"ours"]


SENDERS = range(4000, 4020)  # the kernel puts a flow into one of the veth's queues by its hash


def test_one_receiver_takes_what_comes_by_several_queues() -> None:
    with laid(queues=2) as cable, cable.near, XdpReceiver("near0", PORT, ring_size=64) as receiver:
        for turn in range(20):
            for sender in SENDERS:
                cable.put(cable.datagram(b"%d %d" % (turn, sender), sender=sender))
            assert set(payloads(receiver, 20)) == {b"%d %d" % (turn, sender) for sender in SENDERS}
        assert receiver.statistics().held == 0


def test_each_queue_may_have_a_receiver_of_its_own() -> None:
    with laid(queues=2) as cable, cable.near, Redirect("near0", PORT) as redirect:
        server = cable.server()
        with XdpReceiver.of(redirect, queues=[0]) as first, XdpReceiver.of(redirect, queues=[1]) as second:
            assert redirect.attach() == "native"
            for sender in SENDERS:
                cable.put(cable.datagram(b"%d" % sender, sender=sender))
            time.sleep(0.1)
            parts = [{int(data) for data, _ in each.recv(0).datagrams()} for each in (first, second)]
            assert parts[0]
            assert parts[1]
            assert sorted(parts[0] | parts[1]) == list(SENDERS)
            assert len(parts[0]) + len(parts[1]) == len(SENDERS)
            with pytest.raises(XdpError, match="another AF_XDP socket has this queue"):
                XdpReceiver.of(redirect, queues=[0])
            second.close()
            cable.put(cable.datagram(b"nobody's queue is the stack's", sender=min(parts[1])))
            assert server.recv(100) == b"nobody's queue is the stack's"
            assert first.statistics().passed["no_socket"] == 1
            forgotten = [XdpReceiver.of(redirect, queues=[1])]
            with pytest.warns(ResourceWarning, match="unclosed <XdpReceiver on near0 port 2055, copy>"):
                forgotten.clear()


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        (("near9", PORT), {}, "no interface 'near9' here: choose from lo, near0"),
        (("near0", 0), {}, "the port is 0: give numbers from 1 to 65535"),
        (("near0", []), {}, "no port: give one, or several"),
        (("near0", [PORT, "x"]), {}, "the port is 'x'"),
        (("near0", PORT), {"addresses": ["192.0.2.9"]}, r"192.0.2.9 not on interface near0: ip address add"),
        (("near0", PORT), {"addresses": ["host"]}, "'host' does not appear to be"),
        (("near0", PORT), {"queues": [1]}, "interface near0 has no queue 1: give 0 to 0"),
        (("near0", PORT), {"queues": []}, "give each once"),
        (("near0", PORT), {"mode": "fast"}, "mode is 'fast': choose auto, zero-copy, copy, generic"),
        (("near0", PORT), {"batch_size": 0}, "batch_size is 0: give 1 to 1,024"),
        (("near0", PORT), {"ring_size": 100}, "ring_size is 100: give a power of two"),
        (("near0", PORT), {"frames": 8}, "frames is 8: give 2,048 to"),
        (("near0", PORT), {"frames": 1 << 20}, "2,147,483,648 bytes .* give fewer frames"),
        (("near0", PORT), {"frame_size": 1500}, "frame_size is 1500: give 2048 or 4096"),
        (("near0", PORT), {"checksums": "no"}, "checksums is 'no': choose trust, verify, partial"),
        (("near0", PORT), {"prefer_busy_poll": True}, "need busy_poll: give its microseconds"),
        (("near0", PORT), {"timestamps": 1}, "timestamps is 1: give True or False"),
        (("near0", PORT), {"gro": True}, "no option 'gro': choose from batch_size"),
    ],
)
def test_a_mistake_is_named(cable: Cable, arguments: Any, options: Any, error: str) -> None:
    with pytest.raises((ValueError, TypeError, OSError), match=error):
        XdpReceiver(*arguments, **options)


def test_busy_polling_receives(cable: Cable) -> None:
    with XdpReceiver("near0", PORT, busy_poll=20, prefer_busy_poll=True, busy_poll_budget=64) as receiver:
        for number in range(500):
            cable.put(cable.datagram(b"%d" % number))
        assert payloads(receiver, 500) == [b"%d" % number for number in range(500)]


def test_an_interface_that_goes_is_said(cable: Cable) -> None:
    with XdpReceiver("near0", PORT) as receiver:
        assert receiver.redirect.attached
        cable.net.link("del", index=cable.index)
        with pytest.raises(XdpError, match="the interface is gone") as raised:
            receiver.recv(5)
        assert raised.value.errno == errno.ENETDOWN
        assert not receiver.redirect.attached
