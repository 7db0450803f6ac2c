"""XdpReceiver in event loops, and what leaves it: answers by its ring, and by the stack."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from typing import Any

import pytest

from fastrecv import aio
from fastrecv.adapters.xdp import create_datagram_endpoint
from fastrecv.xdp import XdpReceiver
from tests.kernel.cable import NEAR, NEAR6, PORT, Cable

pytestmark = pytest.mark.needs("AF_XDP in copy mode")


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


def test_a_protocol_is_told_that_the_interface_is_gone(cable: Cable) -> None:
    class Listening(Echo):
        def error_received(self, error: Exception) -> None:
            self.transport.abort()
            told.append(error)

    async def main() -> None:
        with XdpReceiver("near0", PORT) as receiver:
            _, protocol = await create_datagram_endpoint(Listening, receiver)
            await asyncio.to_thread(cable.net.link, "del", index=cable.index)
            await asyncio.wait_for(protocol.lost, 5)

    told: list[Exception] = []
    asyncio.run(main())
    (error,) = told
    assert isinstance(error, OSError)
    assert error.errno == errno.ENETDOWN


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
