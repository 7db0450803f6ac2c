"""The log of a service, on standard error: a line an event for people, or a JSON object a line."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal

__all__ = ["Limited", "LogFormat", "about", "opened", "take_uncaught"]

LogFormat = Literal["text", "json"]
_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s {name}: %(message)s"


class _Json(logging.Formatter):
    """An object of time (RFC 3339, UTC), level, name (supervisor, worker), pid of who says it, message.

    Where they apply: slot, whose worker says it or is spoken of; exception, the text of its traceback.
    """

    def __init__(self, slot: int | None) -> None:
        super().__init__()
        self._slot = slot

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        said: dict[str, object] = {
            "time": when.replace("+00:00", "Z"), "level": record.levelname.lower(),
            "name": "supervisor" if self._slot is None else "worker",
            "pid": record.process, "message": record.getMessage(),
        }  # fmt: skip
        slot = getattr(record, "slot", self._slot)
        if slot is not None:
            said["slot"] = slot
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False)


def opened(form: LogFormat, slot: int | None = None) -> logging.Logger:
    """The log of this process: the worker of a slot, or the supervisor.

    What fastrecv's own modules have to say in a worker, its sinks and its collector, stands in the same log.
    """
    log = logging.getLogger("supervisor" if slot is None else f"worker {slot} [{os.getpid()}]")
    if not log.handlers:
        log.addHandler(logging.StreamHandler(sys.stderr))
        log.setLevel(logging.INFO)
        log.propagate = False  # what the service's code does with the root logger is its own affair
        if slot is not None:
            package = logging.getLogger("fastrecv")
            package.addHandler(log.handlers[0])
            package.propagate = False
    text = logging.Formatter(_FORMAT.format(name=log.name), "%Y-%m-%d %H:%M:%S")
    log.handlers[0].setFormatter(_Json(slot) if form == "json" else text)
    return log


def about(slot: int, log: logging.Logger) -> logging.LoggerAdapter[logging.Logger]:
    """The same log, for what is said of the worker of a slot."""
    return logging.LoggerAdapter(log, {"slot": slot})


def take_uncaught(log: logging.Logger) -> None:
    """Let the log say what ends this process, instead of the interpreter."""

    def said(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        log.critical("ended by an exception", exc_info=(kind, error, trace))

    sys.excepthook = said


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
