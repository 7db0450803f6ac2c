"""Receiving: what every receiver does alike over the door that its datagrams come in by."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from fastrecv._recv import Batch
from fastrecv.closing import Closing

__all__ = ["Receiving"]


class _Door(Protocol):
    """The Reader of _recv, or that of _xsk."""

    @property
    def closed(self) -> bool: ...

    def recv(self, timeout: float | None) -> Batch: ...

    def enter(self) -> tuple[int, int]: ...

    def leave(self) -> int: ...


_Reader = TypeVar("_Reader", bound=_Door)


class Receiving(Closing, Generic[_Reader]):
    """The base of Receiver and XdpReceiver.

    reason : why Receiver.open has chosen it.
    """

    reason = ""
    _reader: _Reader

    @abstractmethod
    def recv(self, timeout: float | None = None) -> Batch: ...

    def recv_nowait(self) -> Batch:
        """recv(0)."""
        return self._reader.recv(0)

    def __iter__(self) -> Iterator[Batch]:
        """Batches, until the receiver is closed."""
        while True:
            try:
                yield self.recv()  # no name for it: the batch is the caller's alone
            except OSError:
                if self.closed:
                    return
                raise

    @contextlib.contextmanager
    def watched(self) -> Iterator[tuple[int, ...]]:
        """Descriptors for somebody else's event loop: any of them is readable when recv_nowait has something to say.

        They stay open while the block lasts, even when close() is called meanwhile, which makes one of them readable. A
        loop that watched fileno() alone would not be woken by close(), and would be left with a number that is no more.
        """
        descriptors = self._reader.enter()
        try:
            yield descriptors
        finally:
            self._reader.leave()

    @property
    def closed(self) -> bool:
        return self._reader.closed
