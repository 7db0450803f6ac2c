"""What a receiver backend is: the part of Receiver to rely on wherever batches may come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fastrecv._recv import Batch
from fastrecv.replies import Buffer
from fastrecv.sockets import Address

__all__ = ["Address", "Buffer", "ReceiverBackend"]


@runtime_checkable
class ReceiverBackend(Protocol):
    """Receives and answers datagrams in batches. Receiver is the one over recvmmsg(2), and says what each member does.

    fastrecv.aio.batches takes any; Batch.of(payloads, sources) makes the batches of one that has no socket (a replay, a
    test). isinstance() looks for the members only, not for their types.
    """

    @property
    def batch_size(self) -> int: ...

    @property
    def closed(self) -> bool: ...

    def recv(self, timeout: float | None = None) -> Batch: ...

    def recv_nowait(self) -> Batch: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def send(
        self,
        payloads: Batch | Sequence[Buffer],
        destinations: NDArray[np.void] | np.void | Address | Sequence[Address] | None = None,
        timeout: float | None = None,
    ) -> int: ...

    def reply(self, batch: Batch, payloads: Batch | Sequence[Buffer | None], timeout: float | None = None) -> int: ...

    def fileno(self) -> int: ...

    def watched(self) -> AbstractContextManager[tuple[int, ...]]: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
