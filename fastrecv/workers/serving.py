"""Serving: a worker whose handler has a loop of its own, which neither says that it lives nor hears an order."""

from __future__ import annotations

import os
import signal
import threading
import time

from fastrecv.workers.counters import Row
from fastrecv.workers.orders import Orders

__all__ = ["Watch"]


class Watch:
    """While the service's own loop runs: a thread that gives signs of life, and makes the order to stop a SIGTERM."""

    def __init__(self, row: Row, orders: Orders, idle: float) -> None:
        self._row, self._orders, self._idle = row, orders, idle
        self._ended = threading.Event()
        self._woken, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="fastrecv-orders", daemon=True)

    def _watch(self) -> None:
        while not (self._orders.stop or self._orders.drain):
            self._row.beat(time.monotonic_ns())
            self._orders.idle(self._idle, self._woken)
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
