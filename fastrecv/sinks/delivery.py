"""Delivery: the thread that brings what is in spools to JetStream, each message until it is acknowledged.

Order. Up to `window` messages are on their way at once, but of one subject only one. JetStream stores what it gets; it
would store the second message of a subject though it has refused the first (a leader was being elected, say), and a
repetition of the first would come behind it. The headers that make it refuse the second (expected last sequence, or
last message id) presume one publisher for all of the stream or subject, and the hosts of a collector share theirs. So
what follows in a subject waits for the acknowledgement, a round trip; other subjects do not.

Repetition. A message's id (Nats-Msg-Id) is its spool's identity and its number there. What was not acknowledged is sent
again under the same id, by this process or by who takes over its spool, and the stream removes it where it has it
already, for as long as its duplicate window (two minutes, unless configured otherwise).
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fastrecv.sinks import engine
from fastrecv.sinks.engine import Access
from fastrecv.sinks.spool import Message, Spool

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

__all__ = ["Delivery", "Source"]

_LOG = logging.getLogger("fastrecv.sinks")
_ACKNOWLEDGE = 5.0  # seconds; a message that is not acknowledged by then is sent again, over another connection
_AGAIN = 0.05, 1.0  # seconds until a failed message or connection is tried again: at first, and at most
_LOOK = 1.0  # seconds between two looks at deadlines
_ADOPT = 10.0  # seconds between two looks for spools of processes that have died meanwhile
_AHEAD = 32 << 20  # bytes of messages that are in memory at most


class Source(Protocol):
    """Whose messages are delivered: the sink. Its methods are called by the thread."""

    def adopt(self) -> None:
        """Take over what dead processes have left."""

    def take(self) -> tuple[Spool, Message] | None:
        """The next message; None: there is none, and wake() is to be called when there is."""

    def kept(self, spool: Spool, message: Message) -> bool:
        """Whether it has not been dropped meanwhile."""

    def acknowledged(self, spool: Spool, message: Message, duplicate: bool) -> None: ...

    def reconnected(self) -> None: ...


class _Waiting(NamedTuple):
    spool: Spool
    message: Message


class Delivery:
    """start() it, wake() it when there are messages, stop() it.

    trouble : what is wrong just now; "" while the engine takes what it is given.
    """

    def __init__(
        self, source: Source, access: Access, context: ssl.SSLContext | None, prefix: str, stream: str | None,
        window: int,
    ) -> None:  # fmt: skip
        self.trouble = ""
        self._source, self._access, self._context, self._window = source, access, context, window
        self._prefix, self._stream = prefix, stream
        self._lanes: dict[int, deque[_Waiting]] = {}  # by shard: the messages that were taken and not acknowledged
        self._ahead = self._ahead_bytes = 0
        self._ready: deque[int] = deque()  # lanes whose first message may be sent
        self._flying: dict[str, tuple[int, float]] = {}  # by reply token: lane, deadline; the oldest first
        self._token = self._connections = 0
        self._stopping = False
        self._pause, self._adopt_at = _AGAIN[0], 0.0
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._main: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="fastrecv-jetstream", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There are messages. From any thread."""
        self._loop.call_soon_threadsafe(self._changed.set)

    def stop(self) -> None:
        """End the thread, whatever is on its way."""
        self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join()

    def _cancel(self) -> None:
        self._stopping = True
        if self._main is not None:
            self._main.cancel()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._deliver())
            except asyncio.CancelledError:
                return

    async def _deliver(self) -> None:
        self._main = asyncio.current_task()
        while not self._stopping:
            try:
                await self._adopt()
                client = await engine.connected(self._access, self._context, self._failed)
                try:
                    await self._session(client)
                finally:
                    await engine.dropped(client)
            except Exception as error:  # whatever nats-py, ssl and the network raise: all are tried again
                self._failed(error)
            await asyncio.sleep(self._longer())

    async def _session(self, client: Client) -> None:
        """One connection, until it fails."""
        if self._stream is not None:
            await engine.stream_made(client, self._stream, f"{self._prefix}.>")
        inbox = client.new_inbox()
        await client.subscribe(f"{inbox}.*", cb=self._answered)
        if self._connections:
            self._source.reconnected()
        self._connections += 1
        self._flying.clear()
        self._ready = deque(self._lanes)  # all is sent again, lanes by the age of their first message
        while not client.is_closed and not self._stopping:  # nats-py may have swallowed the cancellation
            self._changed.clear()
            self._take()
            while self._ready and len(self._flying) < self._window:
                await self._send(client, inbox, self._ready.popleft())
            if self._flying and next(iter(self._flying.values()))[1] < time.monotonic():
                raise TimeoutError(f"not acknowledged for {_ACKNOWLEDGE:g} s")
            await self._until_changed()
            await self._adopt()
        raise ConnectionError(f"the connection has ended: {client.last_error or 'closed by the server'}")

    async def _adopt(self) -> None:
        if time.monotonic() >= self._adopt_at:
            await asyncio.to_thread(self._source.adopt)
            self._adopt_at = time.monotonic() + _ADOPT

    async def _until_changed(self) -> None:
        timer = self._loop.call_later(_LOOK, self._changed.set)
        await self._changed.wait()
        timer.cancel()

    def _take(self) -> None:
        """Read ahead, so that a subject that waits does not keep others from being sent."""
        while self._ahead < 2 * self._window and self._ahead_bytes < _AHEAD:
            taken = self._source.take()
            if taken is None:
                return
            waiting = _Waiting(*taken)
            self._ahead += 1
            self._ahead_bytes += len(waiting.message.data)
            lane = self._lanes.setdefault(waiting.message.shard, deque())
            lane.append(waiting)
            if len(lane) == 1:
                self._ready.append(waiting.message.shard)

    async def _send(self, client: Client, inbox: str, shard: int) -> None:
        """Send a lane's first message that was not dropped."""
        lane = self._lanes[shard]
        while not self._source.kept(*lane[0]):
            self._leave(lane)
            if not lane:
                del self._lanes[shard]
                return
        spool, message = lane[0]
        headers = {"Nats-Msg-Id": f"{spool.identity}-{message.number}"}
        if self._stream is not None:
            headers["Nats-Expected-Stream"] = self._stream
        self._token += 1
        self._flying[str(self._token)] = shard, time.monotonic() + _ACKNOWLEDGE
        await client.publish(f"{self._prefix}.{shard}", message.data, f"{inbox}.{self._token}", headers)

    async def _answered(self, answer: Msg) -> None:
        token = answer.subject.rpartition(".")[2]
        shard, _ = self._flying.pop(token, (-1, 0.0))
        if shard < 0:
            return
        said = _said(answer)
        if error := said.get("error"):
            self._failed(RuntimeError(f"{self._prefix}.{shard}: {error.get('description', error)}"))
            self._loop.call_later(self._longer(), self._send_again, shard, self._connections)
            return
        lane = self._lanes[shard]
        spool, message = self._leave(lane)
        if lane:
            self._ready.append(shard)
        else:
            del self._lanes[shard]
        self._source.acknowledged(spool, message, bool(said.get("duplicate")))
        self._pause = _AGAIN[0]
        if self.trouble:
            _LOG.warning("%s takes messages again", self._prefix)
            self.trouble = ""
        self._changed.set()

    def _leave(self, lane: deque[_Waiting]) -> _Waiting:
        self._ahead -= 1
        left = lane.popleft()
        self._ahead_bytes -= len(left.message.data)
        return left

    def _send_again(self, shard: int, connection: int) -> None:
        if connection == self._connections and shard in self._lanes:  # a new connection sends all again
            self._ready.append(shard)
            self._changed.set()

    def _longer(self) -> float:
        """Seconds to wait for; twice as long each time."""
        pause = self._pause
        self._pause = min(2 * pause, _AGAIN[1])
        return pause

    def _failed(self, error: Exception) -> None:
        said = str(error) or ("no server answers" if isinstance(error, TimeoutError) else type(error).__name__)
        if not self.trouble:
            _LOG.warning("%s: messages wait: %s", self._prefix, said)
        self.trouble = said
        self._changed.set()


def _said(answer: Msg) -> dict[str, Any]:
    """What JetStream has answered; nobody answers where no stream takes the subject, or JetStream is not ready."""
    if (answer.headers or {}).get("Status") == "503":
        return {"error": {"description": "no stream takes it, or JetStream is not ready"}}
    try:
        found: dict[str, Any] = json.loads(answer.data)
    except ValueError:
        return {"error": {"description": f"an answer that is not JetStream's: {answer.data[:100]!r}"}}
    return found
