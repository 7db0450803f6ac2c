"""A worker's loop: receive, handle, record; from when it is told to start until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastrecv._recv import Batch
from fastrecv.receiver import Receiver
from fastrecv.steerable import described
from fastrecv.workers import snapshots
from fastrecv.workers.counters import Counters, Row
from fastrecv.workers.handlers import Handler, HandlerError, called, in_one_line
from fastrecv.workers.logs import Limited
from fastrecv.workers.orders import Orders
from fastrecv.workers.serving import Watch
from fastrecv.workers.settings import Task
from fastrecv.workers.snapshots import Snapshots

if TYPE_CHECKING:
    from fastrecv.workers.rings import Rings

__all__ = ["Reading"]

_LOOK = 5_000_000  # ns between two looks at the orders while datagrams come


class Reading:
    """One socket, read by one handler.

    run() lets the handler start, says "ready", reads when told to until told to stop, says "stopped", and lets the
    handler stop. So start() is called while a predecessor may still read. A handler whose state is kept restores it
    before it reads, and stops before "stopped" is said, so that its successor gets what stop() leaves. HandlerError
    where it cannot begin.
    """

    def __init__(
        self, task: Task, handler: Handler, sock: socket.socket, rings: Rings | None, counters: Counters,
        orders: Orders, log: logging.Logger,
    ) -> None:  # fmt: skip
        self._settings, self._slot, self._handler, self._sock = task.settings, task.slot, handler, sock
        self._rings, self._counters, self._orders = rings, counters, orders
        self._log, self._errors, self._unkept = log, Limited(log), Limited(log)
        self._kept = task.snapshots
        self._idle = min(1.0, (task.settings.timeout or 3.0) / 3)  # seconds without a datagram until a sign of life
        self._looked = 0
        self._row: Row
        self._snapshots: Snapshots
        if handler.handle is not None and sock.type == socket.SOCK_STREAM:
            raise HandlerError(
                f"{task.settings.handler!r} takes batches of datagrams, and {described(sock)} has connections: give it "
                "serve(sockets), a loop that accepts them"
            )
        if handler.handle is None and task.settings.backend == "xdp":
            raise HandlerError(
                f"{task.settings.handler!r} has serve, a loop over sockets, which AF_XDP has none of: give it "
                "handle(batch), or choose the backend socket"
            )
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if handler.stateful and most != resource.RLIM_INFINITY and most < snapshots.SIZE:
            raise HandlerError(
                f"{task.settings.handler!r} has snapshot(), which limit fsize {most} forbids: give {snapshots.SIZE} "
                "at least"
            )

    def run(self) -> None:
        if self._handler.asynchronous:
            asyncio.run(self._run_async())
            return
        with contextlib.ExitStack() as stack:
            with self._beginning():
                if self._handler.start is not None:
                    self._handler.start()
                receiver = self._receiver(stack)
            self._orders.say("ready")
            while self._orders.waiting:
                self._orders.idle(None)
            if self._take_row():
                if receiver is not None:
                    self._restore()
                    with self._source(receiver) as source:
                        self._read(source)
                elif self._handler.serve is not None:
                    with Watch(self._row, self._orders, self._idle):
                        self._handler.serve([self._sock])
                    self._serve_ended()
                if not self._handler.stateful:
                    self._say_stopped()
        with self._ending():
            if self._handler.stop is not None:
                self._handler.stop()
            self._keep()

    async def _run_async(self) -> None:
        with contextlib.ExitStack() as stack:
            with self._beginning():
                await called(self._handler.start)
                receiver = self._receiver(stack)
            self._orders.say("ready")
            while self._orders.waiting:
                await self._idle_async(None)
            if self._take_row():
                if receiver is not None:
                    await self._restore_async()
                    with self._source(receiver) as source:
                        await self._read_async(source)
                else:
                    with Watch(self._row, self._orders, self._idle):
                        await called(self._handler.serve, [self._sock])
                    self._serve_ended()
                if not self._handler.stateful:
                    self._say_stopped()
        with self._ending():
            await called(self._handler.stop)
            await self._keep_async()

    @contextlib.contextmanager
    def _beginning(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # whatever the service's code raises
            raise HandlerError(f"{self._settings.handler!r} cannot start: {in_one_line(error)}") from error

    def _receiver(self, stack: contextlib.ExitStack) -> Receiver | None:
        if self._handler.handle is None:
            return None
        return stack.enter_context(Receiver(self._sock, batch_size=self._settings.batch_size))

    @contextlib.contextmanager
    def _source(self, receiver: Receiver) -> Iterator[Receiver | Rings]:
        """What is read: the socket, and the rings, which are closed before the successor is to bind its own."""
        if self._rings is None:
            yield receiver
            return
        with self._rings as rings:
            rings.begin(receiver, self._log)
            yield rings
            rings.look()
            self._row.rings(*rings.counts())

    def _take_row(self) -> bool:
        """Begin to count, where it may read: nobody else writes the row any more."""
        if self._orders.started:
            self._row = self._counters.row(self._slot)
            self._snapshots = Snapshots(self._kept, self._row)
            self._sock.setblocking(True)  # whoever had it before: the flag is the socket's, not the descriptor's
        return self._orders.started

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Where the state is kept: the successor may begin when stop() is over, however it ends."""
        try:
            yield
        finally:
            if self._handler.stateful and self._orders.started:
                self._say_stopped()

    def _serve_ended(self) -> None:
        if not (self._orders.stop or self._orders.drain):
            self._log.error("serve() has returned, though nobody has told it to stop")

    def _say_stopped(self) -> None:
        self._row.stop()
        self._orders.say("stopped")

    # Batches

    def _read(self, source: Receiver | Rings) -> None:
        handle = self._handler.handle
        assert handle is not None
        while self._goes_on():
            batch, began = self._received(source)
            if not len(batch):
                if self._orders.stop or self._orders.drain:
                    return
                self._orders.idle(self._idle, source.fileno())
                continue
            try:
                handle(batch)
            except Exception:  # whatever the service's code raises
                self._failed(batch)
            else:
                self._keep()
                self._row.handled(len(batch), time.monotonic_ns() - began)

    async def _read_async(self, source: Receiver | Rings) -> None:
        handle = self._handler.handle
        while self._goes_on():
            batch, began = self._received(source)
            if not len(batch):
                if self._orders.stop or self._orders.drain:
                    return
                await self._idle_async(self._idle, source.fileno())
                continue
            try:
                await called(handle, batch)
            except Exception:  # whatever the service's code raises
                self._failed(batch)
            else:
                await self._keep_async()
                self._row.handled(len(batch), time.monotonic_ns() - began)
            await asyncio.sleep(0)  # a flood must not keep the loop from the handler's other tasks

    def _goes_on(self) -> bool:
        """Whether to receive again; what waits in rings would end with them."""
        orders = self._orders
        if self._rings is None:
            return not orders.stop
        return not (orders.stop or orders.drain) or self._rings.leave(to_the_end=not orders.stop)

    def _received(self, source: Receiver | Rings) -> tuple[Batch, int]:
        batch = source.recv_nowait()
        now = time.monotonic_ns()
        self._row.beat(now)
        if len(batch):
            self._row.received(source.statistics(), len(batch))
        if now - self._looked > _LOOK or (self._rings is not None and not len(batch)):
            if self._rings is not None:
                self._rings.look()
            self._orders.look()
            self._looked = now
        if self._rings is not None:  # each time: what a killed worker did not tell would count as lost in its rings
            self._row.rings(*self._rings.counts())
        return batch, now

    def _failed(self, batch: Batch) -> None:
        """The exception that is being handled has cost a batch; it goes on where the settings say so."""
        self._row.failed(len(batch))
        if self._settings.on_error == "exit":
            raise  # noqa: PLE0704 - the one that is being handled
        self._errors.exception(f"the handler has lost a batch of {len(batch)} datagrams")

    # State

    def _restore(self) -> None:
        if self._handler.restore is not None:
            with self._stateless("restore() has failed: the handler goes on without what was kept"):
                if (state := self._snapshots.read()) is not None:
                    self._handler.restore(state)

    async def _restore_async(self) -> None:
        if self._handler.restore is not None:
            with self._stateless("restore() has failed: the handler goes on without what was kept"):
                if (state := self._snapshots.read()) is not None:
                    await called(self._handler.restore, state)

    def _keep(self) -> None:
        if self._handler.snapshot is not None and self._orders.started:
            with self._stateless("snapshot() has failed: what was kept before stays"):
                self._snapshots.write(self._handler.snapshot())

    async def _keep_async(self) -> None:
        if self._handler.snapshot is not None and self._orders.started:
            with self._stateless("snapshot() has failed: what was kept before stays"):
                self._snapshots.write(await called(self._handler.snapshot))

    @contextlib.contextmanager
    def _stateless(self, said: str) -> Iterator[None]:
        """An exception costs state and no batch; the worker goes on."""
        try:
            yield
        except Exception:  # whatever the service's code raises, and what cannot be kept
            self._row.failed(0)
            self._unkept.exception(said)

    async def _idle_async(self, seconds: float | None, *others: int) -> None:
        """Orders.idle on the event loop."""
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        watched = (self._orders.fileno(), *others)
        for fd in watched:
            loop.add_reader(fd, ready.set)
        try:
            await asyncio.wait_for(ready.wait(), seconds)
        except TimeoutError:
            pass
        finally:
            for fd in watched:
                loop.remove_reader(fd)
        self._orders.look()
