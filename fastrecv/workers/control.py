"""The control socket of a service: one request and one answer a connection, both JSON, over AF_UNIX (SOCK_SEQPACKET).

The supervisor serves it in its own loop, and nobody at the other end can make it wait: who says nothing is hung up on
after a while, there are never more than so many, and an answer is sent at once or not at all.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from fastrecv.closing import Closing
from fastrecv.errors import StateError
from fastrecv.local import peer, remove_stale
from fastrecv.sockets import path_of, remove_path

__all__ = ["SUFFIX", "Control", "default_path", "folders", "listener"]

SUFFIX = ".sock"
_LONGEST_REQUEST = 4096  # bytes
_AT_ONCE = 16  # connections; others wait in the listening socket's queue
_PATIENCE = 2.0  # seconds for a client to say what it wants
_REST = 0.5  # seconds without accepting where no descriptor is free
_SYSTEM = Path("/run/fastrecv")


def folders(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Where control sockets are unless something else is said; a service takes the first that it may have.

    $RUNTIME_DIRECTORY is systemd's (systemd.exec(5)); $XDG_RUNTIME_DIR the user's.
    """
    found = []
    if environment.get("RUNTIME_DIRECTORY"):
        found.append(Path(environment["RUNTIME_DIRECTORY"].split(":")[0]))
    found.append(_SYSTEM)
    if environment.get("XDG_RUNTIME_DIR"):
        found.append(Path(environment["XDG_RUNTIME_DIR"], "fastrecv"))
    return list(dict.fromkeys(found))


def default_path(name: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The path for a service of this name, in a folder that is there now; None where there can be none."""
    for folder in folders(environment):
        if folder == _SYSTEM and os.geteuid() != 0:
            continue
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700 if folder != _SYSTEM else 0o755, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
                return folder / f"{name}{SUFFIX}"
    return None


def listener(path: Path) -> socket.socket:
    """A listening socket at `path`, its owner's alone from the first moment (0600). OSErrors say why there can be none.

    The file of a service that has ended is replaced; one where a service answers, or that is no socket, is refused.
    The umask of the process changes for a moment: it must have no other threads yet.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.umask(0o177)
    try:
        remove_stale(path)
        if os.path.lexists(path):
            raise StateError(f"{path} is there and is no socket: remove it, or give another path")
        sock.bind(str(path))
        sock.listen()
        sock.setblocking(False)
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError) and not isinstance(error, StateError):
            raise OSError(error.errno, f"cannot make the control socket {path}: {error.strerror}") from None
        raise
    finally:
        os.umask(before)
    return sock


class Control(Closing):
    """Serves a `listener`, which it closes, in the loop of others, who poll `watched`.

    answer : called with a request, gives the answer; None: it is given at the end. ended : that answer. Only root, and
    who runs the service, are answered.
    """

    def __init__(
        self, sock: socket.socket, answer: Callable[[bytes], bytes | None], ended: Callable[[], bytes],
        log: logging.Logger,
    ) -> None:  # fmt: skip
        self._sock, self._answer, self._ended, self._log = sock, answer, ended, log
        self._owned = path_of(sock)
        self._clients: dict[socket.socket, float] = {}  # and until when each is waited for; inf: it waits
        self._rest_until = 0.0

    def fileno(self) -> int:
        return self._sock.fileno()

    def watched(self) -> dict[int, Callable[[], object]]:
        """Descriptors to poll for reading, and what to call then; who has said nothing for too long is hung up on."""
        now = time.monotonic()
        for client in [client for client, until in self._clients.items() if now >= until]:
            self._hang_up(client)
        doors: dict[int, Callable[[], object]] = {
            client.fileno(): partial(self._heard, client) for client in self._clients
        }
        if len(self._clients) < _AT_ONCE and now >= self._rest_until:
            doors[self._sock.fileno()] = self._accept
        return doors

    def _accept(self) -> None:
        try:
            client, _ = self._sock.accept()
        except BlockingIOError:  # it has gone again
            return
        except OSError:  # no descriptor is free: without a pause it would be asked for again at once
            self._rest_until = time.monotonic() + _REST
            return
        client.setblocking(False)
        self._clients[client] = time.monotonic() + _PATIENCE
        pid, uid = peer(client)
        if uid not in (0, os.geteuid()):
            self._log.warning("process %d of uid %d may not control this service", pid, uid)
            self._hang_up(client)

    def _heard(self, client: socket.socket) -> None:
        try:
            request = client.recv(_LONGEST_REQUEST + 1)
            answer = self._answer(request) if request and self._clients[client] < math.inf else b""
            if answer is None:
                self._clients[client] = math.inf
                return
            if answer:
                client.send(answer)
        except OSError:  # it has gone, or does not read
            pass
        self._hang_up(client)

    def _hang_up(self, client: socket.socket) -> None:
        del self._clients[client]
        client.close()

    def close(self) -> None:
        """Hang up on all, and remove the file, unless it is another's by now."""
        for client, until in list(self._clients.items()):
            if until == math.inf:
                with contextlib.suppress(OSError):
                    client.send(self._ended())
            self._hang_up(client)
        if self._sock.fileno() >= 0:
            with contextlib.suppress(PermissionError):  # in another's folder; who serves next removes it
                remove_path(self._sock, self._owned)
            self._sock.close()
