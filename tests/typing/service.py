"""What a type checker must make of fastrecv: checked by mypy --strict and pyright, never run."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import fastrecv
from fastrecv import Batch, NotSupported, Receiver, Statistics
from fastrecv.backend import ReceiverBackend
from fastrecv.options import Options
from fastrecv.sockets import Address

HEADER = np.dtype([("version", ">u2"), ("count", ">u2")])


def columns(batch: Batch) -> None:
    assert_type(batch.data, NDArray[np.uint8])
    assert_type(batch.offsets, NDArray[np.int64])
    assert_type(batch.lengths, NDArray[np.int32])
    assert_type(batch.flags, NDArray[np.uint8])
    assert_type(batch.sources, NDArray[np.void] | None)
    assert_type(batch.timestamps, NDArray[np.int64] | None)
    assert_type(batch.records(HEADER), NDArray[Any])
    assert_type(batch.drops, int | None)
    assert_type(batch[0], memoryview)
    assert_type(batch.source(0), Address | None)
    for view, source in batch:
        assert_type(view, memoryview)
        assert_type(source, Address | None)
    for payload, _ in batch.datagrams():
        assert_type(payload, bytes)
    with batch.copy() as twin:
        assert_type(twin, Batch)
    data, offsets = batch.packed(np.int64)
    assert_type(data, NDArray[np.uint8])
    print(offsets[batch.flags & fastrecv.TRUNCATED != 0])


def service(sock: socket.socket) -> int:
    options: Options = {"batch_size": 256, "timestamps": True, "gro": True}
    answered = 0
    with Receiver(sock, **options) as first, Receiver.bind(("::", 53), reuse_port=True, **options) as second:
        assert_type(second, Receiver)
        batch = first.recv(timeout=0.5)
        assert_type(batch, Batch)
        answered += first.reply(batch, [b"yes" if len(view) else None for view, _ in batch])
        answered += second.send([b"a", bytearray(b"b")], ("192.0.2.1", 53))
        answered += second.send(batch, batch.sources)
        assert_type(first.statistics(), Statistics)
    return answered


def forward(backend: ReceiverBackend) -> Iterator[int]:
    for batch in backend:
        yield int(batch.lengths.sum())


def start() -> None:
    try:
        receiver = Receiver.bind("/run/service.sock")
    except NotSupported as error:
        print(error.feature, error.requires)
        return
    backend: ReceiverBackend = receiver
    print(sum(forward(backend)))
