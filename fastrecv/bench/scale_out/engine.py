"""The engine: three nats-servers with JetStream, a stream with a copy on each, and a consumer for every shard."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import nats
import nats.errors
import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, StorageType, StreamConfig

from fastrecv.bench.scale_out.addresses import ENGINE, NODES, PREFIX, SERVERS, STREAM, durable
from fastrecv.bench.scale_out.processes import started
from fastrecv.bench.survive_service import until
from fastrecv.netns import Namespace

__all__ = ["ACK_WAIT", "WINDOW", "Engine", "Held"]

WINDOW = 600.0
"""Seconds for which the stream knows message ids: a host that returns later publishes again what was stored already."""
ACK_WAIT = 3.0
"""Seconds until a message that nobody has acknowledged is delivered again."""
_MAX_ACK_PENDING = 2048  # messages of a shard that are delivered and not acknowledged
_ROUTES = 6222  # and the next ones
_PATIENCE = 30.0  # seconds
_CONFIG = """
server_name: node{node}
listen: "{clients}"
jetstream {{ store_dir: "{folder}" }}
cluster {{
  name: scale-out
  listen: "{address}:{routes}"
  routes: [{others}]
}}
"""
Found = TypeVar("Found")


class Held(NamedTuple):
    """What the stream has, in messages. bytes : of a copy. pending : not delivered yet; unacknowledged : delivered."""

    messages: int
    bytes: int
    pending: int
    unacknowledged: int


class Engine:
    """A context manager: the nodes run in a namespace, their data in a folder; the stream is there when it begins."""

    def __init__(self, space: Namespace, folder: Path, shards: int) -> None:
        self._space, self._folder, self._shards = space, folder, shards
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        try:
            for node in range(NODES):
                self._configure(node)
                self.start(node)
            self._until(self._make)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._nodes.values()]

    def leader(self) -> int:
        """The node that leads the stream."""

        async def ask(stream: JetStreamContext) -> int | None:
            cluster = (await stream.stream_info(STREAM)).cluster
            return int(cluster.leader.removeprefix("node")) if cluster and cluster.leader else None

        return self._until(ask)

    def kill(self, node: int) -> None:
        """By SIGKILL."""
        process = self._nodes.pop(node)
        process.kill()
        process.wait()

    def start(self, node: int) -> None:
        """For the first time, or again with what it had."""
        config, log = self._folder / f"node{node}.conf", self._folder / f"node{node}.log"
        self._nodes[node] = started(self._space, ["nats-server", "-c", str(config)], log)

    def whole(self) -> None:
        """Wait until every node has all of the stream."""

        async def ask(stream: JetStreamContext) -> bool | None:
            cluster = (await stream.stream_info(STREAM)).cluster
            if not (cluster and cluster.leader):
                return None
            return all(peer.current and not peer.offline for peer in cluster.replicas or []) or None

        self._until(ask)

    def held(self) -> Held:
        async def ask(stream: JetStreamContext) -> Held:
            state = (await stream.stream_info(STREAM)).state
            consumers = [await stream.consumer_info(STREAM, durable(shard)) for shard in range(self._shards)]
            return Held(
                state.messages, state.bytes, sum(one.num_pending or 0 for one in consumers),
                sum(one.num_ack_pending or 0 for one in consumers),
            )  # fmt: skip

        return self._until(ask)

    def _configure(self, node: int) -> None:
        others = ", ".join(f'"nats://{ENGINE}:{_ROUTES + other}"' for other in range(NODES) if other != node)
        text = _CONFIG.format(
            node=node, address=ENGINE, clients=SERVERS[node], routes=_ROUTES + node, others=others,
            folder=self._folder / f"node{node}",
        )  # fmt: skip
        (self._folder / f"node{node}.conf").write_text(text)

    async def _make(self, stream: JetStreamContext) -> bool:
        await stream.add_stream(StreamConfig(
            name=STREAM, subjects=[f"{PREFIX}.*"], storage=StorageType.FILE, num_replicas=NODES,
            duplicate_window=WINDOW,
        ))  # fmt: skip
        for shard in range(self._shards):
            await stream.add_consumer(STREAM, ConsumerConfig(
                durable_name=durable(shard), filter_subject=f"{PREFIX}.{shard}", ack_policy=AckPolicy.EXPLICIT,
                ack_wait=ACK_WAIT, max_ack_pending=_MAX_ACK_PENDING,
            ))  # fmt: skip
        return True

    def _until(self, ask: Callable[[JetStreamContext], Awaitable[Found | None]]) -> Found:
        """The engine's answer, as soon as it has one: while it elects leaders it has none."""
        answers: list[Found] = []

        def answered() -> bool:
            with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
                answer = asyncio.run(self._asked(ask))
                if answer is not None:
                    answers.append(answer)
            return bool(answers)

        with self._space:
            until(answered, lambda: f"the engine does not answer, see {self._folder}/*.log", _PATIENCE)
        return answers[0]

    @staticmethod
    async def _asked(ask: Callable[[JetStreamContext], Awaitable[Found | None]]) -> Found | None:
        async def quiet(_error: Exception) -> None:
            """The caller tries again."""

        client = await nats.connect(SERVERS, allow_reconnect=False, connect_timeout=1, error_cb=quiet)
        try:
            return await ask(client.jetstream(timeout=2))
        finally:
            await client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in list(self._nodes):
            self.kill(node)
