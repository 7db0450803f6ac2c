"""Where a service can be asked: its control socket and its HTTP endpoint, as far as it shall have them."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fastrecv.closing import Closing
from fastrecv.workers import control
from fastrecv.workers.requests import Controlled, answered, ended
from fastrecv.workers.settings import Settings, parsed
from fastrecv.workers.succession import Record

__all__ = ["Doors"]


class Doors(Closing):
    """Opened when this returns: OSErrors say why they cannot be. No thread runs until `begin`.

    service : what is asked, in the loop that polls `watched`. name : of the control socket in its folder,
    unless the settings give a path. before : of a service that goes on: with the control socket that it has, if
    need be without an HTTP endpoint.
    """

    def __init__(
        self, settings: Settings, name: str, service: Controlled, log: logging.Logger, before: Record | None
    ) -> None:
        with contextlib.ExitStack() as stack:
            self._control: control.Control | None = None
            listener = _listener(settings, name, log) if before is None else _inherited(before)
            if listener is not None:
                answers = partial(answered, service=service), partial(ended, service)
                self._control = stack.enter_context(control.Control(listener, *answers, log))
            self._endpoint = None
            if settings.metrics is not None:
                from fastrecv.workers.metrics import Endpoint  # noqa: PLC0415 - workers import this, and serve no HTTP

                try:
                    self._endpoint = stack.enter_context(Endpoint(*parsed(settings.metrics), service.status))
                    log.info("metrics at %s/metrics", self._endpoint.where)
                except OSError as error:
                    if before is None:
                        raise
                    log.error("no metrics: %s", error)
            self._stack = stack.pop_all()

    @property
    def control(self) -> int | None:
        """The descriptor of the control socket."""
        return None if self._control is None else self._control.fileno()

    def begin(self) -> None:
        """Start threads: whatever privileges are to be given up must be by now."""
        if self._endpoint is not None:
            self._endpoint.begin()

    def watched(self) -> dict[int, Callable[[], object]]:
        """Descriptors to poll for reading, and what to call then."""
        found: dict[int, Callable[[], object]] = {}
        for door in (self._control, self._endpoint):
            if door is not None:
                found |= door.watched()
        return found

    def close(self) -> None:
        self._stack.close()


def _inherited(before: Record) -> socket.socket | None:
    return None if before.control is None else socket.socket(fileno=before.control)


def _listener(settings: Settings, name: str, log: logging.Logger) -> socket.socket | None:
    path = control.default_path(name) if settings.control is None else Path(settings.control)
    if path is None:
        log.warning("no control socket: there is no folder for one, give its path to have it")
        return None
    made = control.listener(path)
    log.info("control socket %s", path)
    return made
