"""Batches for `async for`, on any asyncio loop, without a transport or protocol between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastrecv._recv import Batch
from fastrecv.backend import ReceiverBackend

__all__ = ["batches"]

_consumed: set[int] = set()  # ids of the receivers whose next batch is being waited for


def batches(receiver: ReceiverBackend) -> AsyncIterator[Batch]:
    """What `async for` takes the batches of `receiver` from, until it is closed, by whichever task or thread.

    A wait that is cancelled loses no datagram. Errors are raised as by Receiver.recv, and the iteration may go on after
    them. One task at a time may wait for a batch; a second one gets a RuntimeError.
    """
    if not isinstance(receiver, ReceiverBackend):
        raise TypeError(f"batches() takes a Receiver or another ReceiverBackend, not {type(receiver).__name__}")
    return _Batches(receiver)


class _Batches(AsyncIterator[Batch]):
    def __init__(self, receiver: ReceiverBackend) -> None:
        self._receiver = receiver

    async def __anext__(self) -> Batch:
        receiver = self._receiver
        if id(receiver) in _consumed:
            raise RuntimeError(f"another task is waiting for the next batch of {receiver!r}")
        _consumed.add(id(receiver))
        try:
            await asyncio.sleep(0)  # a flood must not keep the loop from its other tasks
            while not receiver.closed:
                if len(batch := receiver.recv_nowait()):
                    return batch
                await _readable(receiver)
        except OSError:
            if not receiver.closed:  # else it was closed by a thread meanwhile
                raise
        finally:
            _consumed.discard(id(receiver))
        raise StopAsyncIteration


async def _readable(receiver: ReceiverBackend) -> None:
    """Wait until something may be received, or the receiver is closed."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    with receiver.watched() as descriptors:
        for descriptor in descriptors:
            loop.add_reader(descriptor, _set, ready)
        try:
            await ready
        finally:
            for descriptor in descriptors:
                loop.remove_reader(descriptor)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
