"""A real nats-server on a free loopback port, and what a consumer finds in its streams."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import nats
import pyarrow as pa
from nats.js.api import AckPolicy, ConsumerConfig

from fastrecv.closing import Closing
from tests.programs import program

_PATIENCE = 20.0  # seconds


class Stored(NamedTuple):
    """A message of a stream. identity : its Nats-Msg-Id. rows : what its Arrow stream has."""

    subject: str
    identity: str
    rows: list[dict[str, Any]]


class Server(Closing):
    """Started at once, with its store in `folder`. more : lines of its configuration."""

    def __init__(self, folder: Path, more: str = "", **connecting: Any) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._connecting, self._folder, self._log = connecting, folder, folder / "nats.log"
        self._config = folder / "nats.conf"
        self._config.write_text(
            f'host: "127.0.0.1"\nport: {self.port}\nlog_file: "{self._log}"\n'
            f'jetstream {{ store_dir: "{folder / "store"}" }}\n{more}\n'
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """On the same port and store as before."""
        self._process = subprocess.Popen([program("nats-server", "nats-server"), "-c", str(self._config)])
        until(lambda: self._log.exists() and self._listens(), self._said)

    def _listens(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def _said(self) -> str:
        return self._log.read_text() if self._log.exists() else "nats-server has said nothing"

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.close()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def made(self, name: str, *subjects: str, **config: Any) -> Self:
        """With this stream."""

        async def make() -> None:
            client = await nats.connect(f"nats://{self.address}", **self._connecting)
            await client.jetstream().add_stream(name=name, subjects=list(subjects), **config)
            await client.close()

        asyncio.run(make())
        return self

    def asked(self, subject: str, payload: bytes = b"") -> dict[str, Any]:
        """What JetStream's API answers."""

        async def ask() -> dict[str, Any]:
            client = await nats.connect(f"nats://{self.address}", **self._connecting)
            try:
                answer: dict[str, Any] = json.loads((await client.request(subject, payload, timeout=5)).data)
            finally:
                await client.close()
            return answer

        return asyncio.run(ask())

    def stored(self, stream: str) -> list[Stored]:
        """All that a consumer of the stream gets, in its order."""
        return asyncio.run(self._stored(stream))

    async def _stored(self, stream: str) -> list[Stored]:
        client = await nats.connect(f"nats://{self.address}", **self._connecting)
        try:
            jetstream = client.jetstream()
            count = (await jetstream.stream_info(stream)).state.messages
            config = ConsumerConfig(ack_policy=AckPolicy.NONE)
            consumer = await jetstream.pull_subscribe("", stream=stream, config=config)
            found: list[Stored] = []
            while len(found) < count:
                for message in await consumer.fetch(min(count - len(found), 50), timeout=10):
                    rows = pa.ipc.open_stream(message.data).read_all().to_pylist()
                    found.append(Stored(message.subject, (message.headers or {}).get("Nats-Msg-Id", ""), rows))
            return found
        finally:
            await client.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def until(found: Any, what: Any, seconds: float = _PATIENCE) -> None:
    """Wait until it is so; what() is said where it does not come to that."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, what()
        time.sleep(0.01)


def by_subject(stored: Sequence[Stored]) -> dict[str, list[int]]:
    """The numbers "n" of the rows of each subject, in order."""
    found: dict[str, list[int]] = defaultdict(list)
    for message in stored:
        found[message.subject] += [row["n"] for row in message.rows]
    return dict(found)
