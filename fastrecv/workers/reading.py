"""A worker's loop: receive, handle, record; until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastrecv._recv import Batch
from fastrecv.receiver import Receiver
from fastrecv.workers.counters import Row
from fastrecv.workers.handlers import Handler, called
from fastrecv.workers.logs import Limited
from fastrecv.workers.orders import Orders

__all__ = ["Reading"]

_LOOK = 5_000_000  # ns between two looks at the orders while datagrams come


class Reading:
    """One socket, read by one handler. going_on : whether it goes on after an exception of the handler."""

    def __init__(self, sock: socket.socket, handler: Handler, row: Row, orders: Orders, *, batch_size: int,
                 going_on: bool, idle: float, errors: Limited) -> None:  # fmt: skip
        """Idle : seconds without a datagram until a sign of life."""
        self._sock, self._handler, self._row, self._orders, self._idle = sock, handler, row, orders, idle
        self._batch_size, self._going_on, self._errors = batch_size, going_on, errors
        self._looked = 0

    def run(self) -> None:
        """Read to the end, say "stopped", and let the handler stop."""
        if self._handler.asynchronous:
            asyncio.run(self._run_async())
            return
        if self._handler.start is not None:
            self._handler.start()
        if self._handler.serve is not None:
            with self._watched():
                self._handler.serve([self._sock])
        else:
            self._read()
        self._say_stopped()
        if self._handler.stop is not None:
            self._handler.stop()

    async def _run_async(self) -> None:
        await called(self._handler.start)
        if self._handler.serve is not None:
            with self._watched():
                await called(self._handler.serve, [self._sock])
        else:
            await self._read_async()
        self._say_stopped()
        await called(self._handler.stop)

    def _say_stopped(self) -> None:
        self._row.stop()
        self._orders.say("stopped")

    # Batches

    def _read(self) -> None:
        handle = self._handler.handle
        assert handle is not None
        with Receiver(self._sock, batch_size=self._batch_size) as receiver:
            while not self._orders.stop:
                batch, began = self._received(receiver)
                if not len(batch):
                    if self._orders.drain:
                        return
                    self._orders.idle(receiver.fileno(), self._idle)
                    continue
                try:
                    handle(batch)
                except Exception:  # whatever the service's code raises
                    self._failed(batch)
                else:
                    self._row.handled(len(batch), time.monotonic_ns() - began)

    async def _read_async(self) -> None:
        handle: Callable[[Batch], Awaitable[Any] | Any] | None = self._handler.handle
        assert handle is not None
        with Receiver(self._sock, batch_size=self._batch_size) as receiver:
            while not self._orders.stop:
                batch, began = self._received(receiver)
                if not len(batch):
                    if self._orders.drain:
                        return
                    await self._idle_async(receiver.fileno())
                    continue
                try:
                    await called(handle, batch)
                except Exception:  # whatever the service's code raises
                    self._failed(batch)
                else:
                    self._row.handled(len(batch), time.monotonic_ns() - began)
                await asyncio.sleep(0)  # a flood must not keep the loop from the handler's other tasks

    def _received(self, receiver: Receiver) -> tuple[Batch, int]:
        batch = receiver.recv_nowait()
        now = time.monotonic_ns()
        self._row.beat(now)
        if len(batch):
            self._row.received(receiver.statistics())
            if now - self._looked > _LOOK:
                self._orders.look()
                self._looked = now
        return batch, now

    def _failed(self, batch: Batch) -> None:
        self._row.failed(len(batch))
        if not self._going_on:
            raise  # noqa: PLE0704 - called where it is handled
        self._errors.exception(f"the handler has lost a batch of {len(batch)} datagrams")

    async def _idle_async(self, fd: int) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        for one in (fd, self._orders.fileno()):
            loop.add_reader(one, ready.set)
        try:
            await asyncio.wait_for(ready.wait(), self._idle)
        except TimeoutError:
            pass
        finally:
            for one in (fd, self._orders.fileno()):
                loop.remove_reader(one)
        self._orders.look()

    # A loop of its own

    def _watched(self) -> _Watch:
        return _Watch(self._row, self._orders, self._idle)


class _Watch:
    """A thread that gives signs of life, and hands the order to stop on as SIGTERM, while the service's loop runs."""

    def __init__(self, row: Row, orders: Orders, idle: float) -> None:
        self._row, self._orders, self._idle = row, orders, idle
        self._ended = threading.Event()
        self._woken, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="fastrecv-orders", daemon=True)

    def _watch(self) -> None:
        while not (self._orders.stop or self._orders.drain):
            self._row.beat(time.monotonic_ns())
            self._orders.idle(self._woken, self._idle)
            if self._ended.is_set():
                return
        os.kill(os.getpid(), signal.SIGTERM)

    def __enter__(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the loop may have an answer of its own
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        os.close(self._wake)
        self._thread.join()
        os.close(self._woken)
