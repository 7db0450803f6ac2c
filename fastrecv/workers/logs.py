"""The log of a service: on standard error, a line an event with time, level and who says it."""

from __future__ import annotations

import logging
import sys
import time

__all__ = ["Limited", "opened"]

_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"


def opened(name: str) -> logging.Logger:
    """The log under this name: "supervisor", or "worker 3 [4711]"."""
    log = logging.getLogger(name)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT, "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False  # what the service's code does with the root logger is its own affair
    return log


class Limited:
    """Exceptions of one place, logged once a second at most."""

    def __init__(self, log: logging.Logger, every: float = 1.0) -> None:
        self._log, self._every, self._next, self._silent = log, every, 0.0, 0

    def exception(self, message: str) -> None:
        """Log the exception that is being handled, and how many were left out since the last."""
        now = time.monotonic()
        if now < self._next:
            self._silent += 1
            return
        left_out = f" ({self._silent} more since the last such line)" if self._silent else ""
        self._log.exception("%s%s", message, left_out)
        self._next, self._silent = now + self._every, 0
