"""What a service can be asked at its control socket: the requests, the answer, and both ends of it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Protocol

import msgspec

from fastrecv.errors import StateError
from fastrecv.local import connect
from fastrecv.workers.settings import MAX_WORKERS
from fastrecv.workers.status import Service

__all__ = [
    "Answer",
    "Controlled",
    "End",
    "Request",
    "Restart",
    "Scale",
    "Status",
    "Stop",
    "answer",
    "answered",
    "ask",
    "asked",
    "ended",
]

_LONGEST_ANSWER = 1 << 20  # bytes: 128 workers take some 60 KB
_PATIENCE = 10.0  # seconds: a supervisor that starts many workers at once is slow


class Request(msgspec.Struct, frozen=True, tag_field="command", tag=str.lower, forbid_unknown_fields=True):
    """One of the below, as {"command": "status"}."""


class Status(Request, frozen=True):
    """How it stands."""


class Restart(Request, frozen=True):
    """New workers in the place of all, one after the other."""


class Scale(Request, frozen=True):
    """So many workers."""

    workers: Annotated[int, msgspec.Meta(ge=1, le=MAX_WORKERS)]


class Stop(Request, frozen=True):
    """Stop; now : without reading queues to their end."""

    now: bool = False


class End(Request, frozen=True):
    """Nothing; answered when the service has ended, with how it stood then."""


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of service and error one is there: how it stands, what was asked for having been begun, or why it was not."""

    service: Service | None = None
    error: str | None = None


class Controlled(Protocol):
    """What the requests ask for: a Supervisor."""

    def status(self) -> Service: ...

    def restart(self) -> None: ...

    def scale(self, workers: int) -> None: ...

    def stop(self, *, now: bool) -> None: ...


def answered(raw: bytes, service: Controlled) -> bytes | None:
    """The answer to a request; None: it is to be given when the service has ended."""
    try:
        request = msgspec.json.decode(raw, type=Status | Restart | Scale | Stop | End)
        _do(request, service)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, StateError) as error:
        return msgspec.json.encode(Answer(error=str(error)))
    return None if isinstance(request, End) else ended(service)


def ended(service: Controlled) -> bytes:
    """The answer that says how it stands, or stood at its end."""
    return msgspec.json.encode(Answer(service.status()))


def _do(request: Status | Restart | Scale | Stop | End, service: Controlled) -> None:
    """Begin what is asked for. StateError where that cannot be."""
    if isinstance(request, Restart | Scale) and service.status().state == "stopping":
        raise StateError("the service is stopping")
    if isinstance(request, Restart):
        service.restart()
    elif isinstance(request, Scale):
        service.scale(request.workers)
    elif isinstance(request, Stop):
        service.stop(now=request.now)


def ask(path: Path, request: Request) -> Service:
    """Ask the service whose control socket is at `path`. Its user's, or root's, to do.

    StateError where nobody is there or the service refuses; PermissionError.
    """
    with asked(path, request) as sock:
        return answer(sock, path)


def asked(path: Path, request: Request) -> socket.socket:
    """A connection by which the service has been asked. Errors as those of `ask`."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        sock.settimeout(_PATIENCE)
        with _explained(path):
            connect(sock, path, _PATIENCE)
            sock.send(msgspec.json.encode(request))
        stack.pop_all()
        return sock


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise PermissionError(error.errno, error.strerror, str(path)) from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise StateError(f"no service is at {path}") from None
    except (TimeoutError, BlockingIOError):
        raise StateError(f"the service at {path} has not answered within {_PATIENCE:.0f} s") from None
    except OSError as error:
        raise StateError(f"the service at {path} has not answered: {error.strerror}") from None


def answer(sock: socket.socket, path: Path) -> Service:
    """What the service answers. Errors as those of `ask`."""
    with _explained(path):
        raw = sock.recv(_LONGEST_ANSWER)
    if not raw:
        why = f"uid {os.geteuid()} may not control it, or it has just ended"
        raise StateError(f"the service at {path} has hung up: {why}")
    try:
        found = msgspec.json.decode(raw, type=Answer)
    except msgspec.DecodeError:
        raise StateError(f"what answers at {path} is no service of this version of fastrecv") from None
    if found.service is None:
        raise StateError(found.error or f"{path} answers nothing")
    return found.service
