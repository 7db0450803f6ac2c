"""What all sinks have in common: their patience, and that they are open between open() and close()."""

from __future__ import annotations

import contextlib
import math
from types import TracebackType
from typing import Self

__all__ = ["BaseSink"]


class BaseSink:
    """A start for sinks of one's own; nothing asks for it (fastrecv.sinks.Sink is a protocol).

    patience : seconds that publish() waits at most, and that the end of a `with` block waits for what is published.
    """

    def __init__(self, patience: float) -> None:
        if not (math.isfinite(patience) and patience >= 0):
            raise ValueError(f"patience {patience}: give seconds, 0 or more")
        self.patience = patience
        self._opened = self._closed = False

    def open(self) -> None:
        raise NotImplementedError

    def close(self, timeout: float | None = None) -> None:
        raise NotImplementedError

    def _opening(self) -> None:
        if self._opened:
            raise ValueError("the sink was opened before: make a new one")
        self._opened = True

    def _check(self, shard: int = 0) -> None:
        """ValueError unless the sink is open, and for a shard that is none."""
        if not self._opened or self._closed:
            raise ValueError("the sink is closed" if self._closed else "the sink is not open: call open() first")
        if shard < 0:
            raise ValueError(f"shard {shard}: give 0 or more")

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(TimeoutError) if error is not None else contextlib.nullcontext():
            self.close(self.patience)
