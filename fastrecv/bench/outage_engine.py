"""A nats-server of the bench's own, which can be taken away and comes back, and all that a consumer finds in it."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrecv.bench.numbered import NUMBERED
from fastrecv.bench.survive_service import until
from fastrecv.closing import Closing
from fastrecv.errors import NotSupported
from fastrecv.sinks.engine import present

__all__ = ["PREFIX", "STREAM", "Consumed", "Engine"]

PREFIX, STREAM = "outage", "OUTAGE"
_ADDRESS, _PORT = "127.0.0.1", 4222
_FETCH = 500  # messages
_PATIENCE = 10.0  # seconds


class Consumed(NamedTuple):
    """What a consumer has got. rows : of NUMBERED (n,), in order; shards : of each. repeated : messages that the stream
    had twice, and that were removed by their ids before.
    """  # fmt: skip

    rows: NDArray[np.void]
    shards: NDArray[np.int64]
    messages: int
    repeated: int


class Engine(Closing):
    """In the namespace of who makes it, on loopback; its store outlives kill(). NotSupported: it is not installed."""

    def __init__(self, folder: Path) -> None:
        present(nkey=False)
        found = shutil.which("nats-server", path=f"{os.environ['PATH']}:/usr/sbin")
        if found is None:
            raise NotSupported("JetStream", "nats-server", errno.ENOENT, "install the package nats-server")
        self._words = [found, "-js", "-a", _ADDRESS, "-p", str(_PORT), "-sd", str(folder / "store"),
                       "-l", str(folder / "nats.log")]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://{_ADDRESS}:{_PORT}"

    def start(self) -> None:
        self._process = subprocess.Popen(self._words)  # noqa: S603 - found by its name
        until(self._listens, lambda: "nats-server does not listen", _PATIENCE)

    def kill(self) -> None:
        """As a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.kill()

    def consumed(self) -> Consumed:
        """All messages of the stream, each once."""
        return asyncio.run(_consumed(self.url))

    def _listens(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex((_ADDRESS, _PORT)) == 0


async def _consumed(url: str) -> Consumed:
    import nats  # noqa: PLC0415 - no other bench needs it
    import pyarrow as pa  # noqa: PLC0415
    from nats.js.api import AckPolicy, ConsumerConfig  # noqa: PLC0415

    client = await nats.connect(url)
    jetstream = client.jetstream()
    count = (await jetstream.stream_info(STREAM)).state.messages
    consumer = await jetstream.pull_subscribe("", stream=STREAM, config=ConsumerConfig(ack_policy=AckPolicy.NONE))
    rows, shards, seen, got = [np.zeros(0, NUMBERED)], [np.zeros(0, np.int64)], set(), 0
    while got < count:
        for message in await consumer.fetch(min(count - got, _FETCH), timeout=_PATIENCE):
            got += 1
            identity = (message.headers or {})["Nats-Msg-Id"]
            if identity not in seen:
                seen.add(identity)
                payloads = pa.ipc.open_stream(message.data).read_all()["payload"].to_pylist()
                rows.append(np.frombuffer(b"".join(payloads), NUMBERED))
                shards.append(np.full(len(payloads), int(message.subject.rpartition(".")[2])))
    await client.close()
    return Consumed(np.concatenate(rows), np.concatenate(shards), got, got - len(seen))
