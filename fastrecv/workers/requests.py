"""What a service can be asked at its control socket: the requests, the answer, and both ends of it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Protocol

import msgspec

from fastrecv.errors import StateError
from fastrecv.local import connect
from fastrecv.workers.settings import MAX_WORKERS
from fastrecv.workers.status import Service

__all__ = ["Answer", "Controlled", "Request", "Restart", "Scale", "Status", "Stop", "answered", "ask"]

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


def answered(raw: bytes, service: Controlled) -> bytes:
    """The answer to a request."""
    try:
        request = msgspec.json.decode(raw, type=Status | Restart | Scale | Stop)
        _do(request, service)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, StateError) as error:
        return msgspec.json.encode(Answer(error=str(error)))
    return msgspec.json.encode(Answer(service.status()))


def _do(request: Status | Restart | Scale | Stop, service: Controlled) -> None:
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
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(_PATIENCE)
        try:
            connect(sock, path, _PATIENCE)
            sock.send(msgspec.json.encode(request))
            raw = sock.recv(_LONGEST_ANSWER)
        except PermissionError as error:
            raise PermissionError(error.errno, error.strerror, str(path)) from None
        except (FileNotFoundError, ConnectionRefusedError):
            raise StateError(f"no service is at {path}") from None
        except (TimeoutError, BlockingIOError):
            raise StateError(f"the service at {path} has not answered within {_PATIENCE:.0f} s") from None
        except OSError as error:
            raise StateError(f"the service at {path} has not answered: {error.strerror}") from None
    if not raw:
        why = f"uid {os.geteuid()} may not control it, or it has just ended"
        raise StateError(f"the service at {path} has hung up: {why}")
    try:
        answer = msgspec.json.decode(raw, type=Answer)
    except msgspec.DecodeError:
        raise StateError(f"what answers at {path} is no service of this version of fastrecv") from None
    if answer.service is None:
        raise StateError(answer.error or f"{path} answers nothing")
    return answer.service
