"""Sockets handed over by processes that may not register them: SCM_RIGHTS over an AF_UNIX socket, checked by uid.

One request a connection: the label, with the descriptors beside it. One answer: "ok ..." or "no ...".
"""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrecv import listeners
from fastrecv.errors import SocketRefusedError, StateError
from fastrecv.local import connect, peer, remove_stale
from fastrecv.rules import RuleSetError
from fastrecv.sockets import path_of, remove_path
from fastrecv.state import check_label
from fastrecv.threads import BoundedThreads

__all__ = ["Server", "hand_over"]

_MAX_LABEL = 255
_MAX_DESCRIPTORS = 253  # SCM_MAX_FD, unix(7)
_MAX_ANSWER = 4096
_PATIENCE = 5.0  # seconds for a peer to say what it wants

Register = Callable[[str, list[socket.socket]], str]


class Server(BoundedThreads, socketserver.UnixStreamServer):
    """Takes sockets from local processes, and registers those whose peer may register for the label.

    path : of the socket, which anybody may connect to: what counts is who the kernel says the peer is (SO_PEERCRED).
    owners : label -> uids that may register for it; root, and who runs the server, always may. register : called with
    the label and the sockets, gives the answer; what it raises is the peer's refusal. log : called with a line for
    every request.
    """

    socket_type = socket.SOCK_SEQPACKET

    def __init__(
        self, path: str | Path, owners: Mapping[str, Collection[int]], register: Register, log: Callable[[str], None]
    ) -> None:
        self.owners, self.register, self.log = owners, register, log
        self._owned: tuple[int, int, int] | None = None  # the path, once it is ours
        remove_stale(Path(path))
        before = os.umask(0)  # open to all from the first moment; a chmod of the path could hit another file
        try:
            super().__init__(str(path), _Request)
        except OSError as error:
            raise StateError(f"cannot serve {path}: {error.strerror or error}") from None
        finally:
            os.umask(before)
        self._owned = path_of(self.socket)

    def verify_request(self, request: Any, _client_address: object) -> bool:
        """Whether the peer may register for any label at all; the others cost no thread."""
        _, uid = peer(request)
        if uid in (0, os.geteuid()) or any(uid in uids for uids in self.owners.values()):
            return True
        request.setblocking(False)
        with contextlib.suppress(OSError):
            request.send(f"no uid {uid} may not register for any label".encode())
        self.log(f"? from process {peer(request)[0]}, uid {uid}: refused: it may not register for any label")
        return False

    def server_close(self) -> None:
        with contextlib.suppress(PermissionError):  # in another's directory; who serves next removes it
            remove_path(self.socket, self._owned)
        super().server_close()


class _Request(socketserver.BaseRequestHandler):
    server: Server
    request: socket.socket

    def handle(self) -> None:
        self.request.settimeout(_PATIENCE)
        pid, uid = peer(self.request)
        label = "?"
        with contextlib.ExitStack() as stack:  # which has closed every copy before the peer is told
            try:
                said, descriptors, flags, _ = socket.recv_fds(self.request, _MAX_LABEL + 1, _MAX_DESCRIPTORS)
                for fd in descriptors:
                    stack.callback(os.close, fd)
                if not said:
                    return  # it only looked whether anybody is here
                check_label(said.decode())
                label = said.decode()
                answer = "ok " + self._answer(label, uid, descriptors, flags, stack)
            except (OSError, RuleSetError, UnicodeDecodeError) as error:
                answer = f"no {error}"
        word, _, text = answer.partition(" ")
        self.server.log(f"{label} from process {pid}, uid {uid}: {'registered' if word == 'ok' else 'refused:'} {text}")
        with contextlib.suppress(OSError):
            self.request.send(answer.encode()[:_MAX_ANSWER])

    def _answer(self, label: str, uid: int, descriptors: list[int], flags: int, stack: contextlib.ExitStack) -> str:
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise SocketRefusedError(f"too much: {_MAX_LABEL} bytes of label and {_MAX_DESCRIPTORS} sockets at most")
        if uid not in (0, os.geteuid()) and uid not in self.server.owners.get(label, ()):
            raise SocketRefusedError(f"uid {uid} may not register for {label!r}")
        if not descriptors:
            raise SocketRefusedError("the request came without a socket")
        return self.server.register(label, stack.enter_context(listeners.of_descriptors(descriptors)))


def hand_over(path: str | Path, label: str, sockets: Sequence[socket.socket]) -> str:
    """Have sockets registered for a label by the server at `path`; its answer. SocketRefusedError with its reason.

    Needs no privilege but the server's consent. The sockets stay open here, and serve as long as they are.
    """
    check_label(label)
    if len(sockets) > _MAX_DESCRIPTORS:
        raise SocketRefusedError(f"{len(sockets)} sockets, {_MAX_DESCRIPTORS} at most are handed over at once")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(4 * _PATIENCE)
        try:
            connect(connection, path, _PATIENCE)
        except OSError as error:
            raise StateError(f"nobody serves {path} ({error.strerror}): start `fastrecv lookup serve {path}`") from None
        try:
            socket.send_fds(connection, [label.encode()], [sock.fileno() for sock in sockets])
            word, _, answer = connection.recv(_MAX_ANSWER).decode(errors="replace").partition(" ")
        except ConnectionError:  # it has hung up before it was asked
            raise SocketRefusedError(f"uid {os.geteuid()} may not register for any label") from None
        except TimeoutError:
            raise StateError(
                f"{path} has not answered within {4 * _PATIENCE:.0f} s: see whether it registers"
            ) from None
    if word != "ok":
        raise SocketRefusedError(answer or "the server ended before it answered")
    return answer
