"""`async for` over a Receiver: nothing is lost, nothing is left in the loop, and the end is noticed."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from fastrecv import Batch, Receiver, aio
from fastrecv.backend import ReceiverBackend

Run = Callable[[Coroutine[Any, Any, None]], None]
LOOPS = {"asyncio": asyncio.run, "uvloop": uvloop.run}
NUMBERED = [b"%d" % number for number in range(100)]


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    loop_run: Any = LOOPS[request.param]
    return lambda coroutine: loop_run(asyncio.wait_for(coroutine, 10))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver.bind(("127.0.0.1", 0)) as made:
        yield made


def send(receiver: Receiver, *payloads: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for payload in payloads:
            sock.sendto(payload, receiver.address)


def payloads(batch: Batch) -> list[bytes]:
    return [data for data, _ in batch.datagrams()]


async def collect(receiver: Receiver, got: list[bytes]) -> None:
    async for batch in aio.batches(receiver):
        got += payloads(batch)


def test_batches_come_as_they_are_sent(run: Run, receiver: Receiver) -> None:
    async def check() -> None:
        send(receiver, *NUMBERED)
        iterator = aio.batches(receiver)
        assert [len(await anext(iterator)), len(await anext(iterator))] == [64, 36]
        got: list[bytes] = []
        waiting = asyncio.ensure_future(collect(receiver, got))
        for payload in NUMBERED:
            send(receiver, payload)
            await asyncio.sleep(0)
        while len(got) < 100:
            await asyncio.sleep(0.001)
        receiver.close()
        await waiting
        assert got == NUMBERED

    run(check())


@pytest.mark.parametrize("by", ["task", "thread"])
def test_closing_ends_the_iteration(run: Run, receiver: Receiver, by: str) -> None:
    async def check() -> None:
        waiting = asyncio.ensure_future(collect(receiver, []))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        address = receiver.address
        if by == "task":
            receiver.close()
        else:
            thread = threading.Thread(target=receiver.close)
            thread.start()
            thread.join()
        await waiting
        Receiver.bind(address).close()  # the port is free

    run(check())


def test_a_closed_receiver_has_no_batches(run: Run, receiver: Receiver) -> None:
    receiver.close()
    run(collect(receiver, []))


def test_closing_while_the_socket_stays_open_leaves_nothing_in_the_loop(run: Run) -> None:
    async def check() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            before = set(Path("/proc/self/fd").iterdir())
            receiver = Receiver(sock)
            waiting = asyncio.ensure_future(collect(receiver, []))
            await asyncio.sleep(0.01)
            receiver.close()
            await waiting
            assert set(Path("/proc/self/fd").iterdir()) == before
            sock.sendto(b"late", sock.getsockname())
            await asyncio.sleep(0.01)
            with Receiver(sock) as second:
                assert payloads(await anext(aio.batches(second))) == [b"late"]

    run(check())


def test_a_wait_that_is_cancelled_loses_nothing(run: Run, receiver: Receiver) -> None:
    async def check() -> None:
        got: list[bytes] = []
        for number, payload in enumerate(NUMBERED):
            waiting = asyncio.ensure_future(collect(receiver, got))
            for _ in range(number % 5):
                await asyncio.sleep(0)
            send(receiver, payload)
            for _ in range(number % 3):
                await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        if len(got) < 100:
            got += payloads(await anext(aio.batches(receiver)))
        assert got == NUMBERED

    run(check())


def test_a_second_consumer_is_refused_while_the_first_waits(run: Run, receiver: Receiver) -> None:
    async def check() -> None:
        waiting = asyncio.ensure_future(anext(aio.batches(receiver)))
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="another task is waiting"):
            await anext(aio.batches(receiver))
        send(receiver, b"one")
        assert payloads(await waiting) == [b"one"]
        send(receiver, b"two")
        assert payloads(await anext(aio.batches(receiver))) == [b"two"]

    run(check())


def test_a_flood_leaves_other_tasks_their_turn(run: Run, receiver: Receiver) -> None:
    async def check() -> None:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.ensure_future(other())
        iterator = aio.batches(receiver)
        for _ in range(50):
            send(receiver, b"one")
            await anext(iterator)
        assert turns >= 49
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(check())


def test_errors_are_raised_and_the_iteration_goes_on(run: Run) -> None:
    async def check() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer, socket.socket(type=socket.SOCK_DGRAM) as sock:
            peer.bind(("127.0.0.1", 0))
            sock.connect(peer.getsockname())
            with Receiver(sock, batch_size=1, arenas=1) as receiver:
                iterator = aio.batches(receiver)
                for _ in range(2):
                    peer.sendto(b"one", sock.getsockname())
                held = await anext(iterator)
                with pytest.raises(BufferError):
                    await anext(iterator)
                held.release()
                assert payloads(await anext(iterator)) == [b"one"]
                del held
                peer.close()
                sock.send(b"anyone?")
                with pytest.raises(ConnectionRefusedError):
                    await anext(iterator)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(iterator), 0.02)

    run(check())


def test_a_receiver_is_a_backend(receiver: Receiver) -> None:
    backend: ReceiverBackend = receiver  # for mypy
    something: object = receiver.socket
    assert isinstance(backend, ReceiverBackend)
    assert not isinstance(something, ReceiverBackend)


def test_what_is_no_receiver_is_refused() -> None:
    with pytest.raises(TypeError, match="takes a Receiver or another ReceiverBackend, not str"):
        aio.batches("x")  # type: ignore[arg-type] # that is the test
