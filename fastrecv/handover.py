"""Sockets handed over by processes that may not register them: SCM_RIGHTS over an AF_UNIX socket, checked by uid.

One request a connection: the label, with the descriptors beside it. One answer: "ok ..." or "no ...".
"""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from fastrecv import listeners
from fastrecv.errors import SocketRefusedError, StateError
from fastrecv.rules import RuleSetError
from fastrecv.sockets import path_of, remove_path

__all__ = ["Server", "hand_over"]

_MAX_LABEL = 255
_MAX_DESCRIPTORS = 253  # SCM_MAX_FD, unix(7)
_MAX_ANSWER = 4096
_PATIENCE = 5.0  # seconds for a peer to say what it wants

Register = Callable[[str, list[socket.socket]], str]


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Takes sockets from local processes, and registers those whose peer may register for the label.

    path : of the socket, which anybody may connect to: what counts is who the kernel says the peer is (SO_PEERCRED).
    owners : label -> uids that may register for it; root, and who runs the server, always may. register : called with
    the label and the sockets, gives the answer; what it raises is the peer's refusal. log : called with a line for
    every request.
    """

    socket_type = socket.SOCK_SEQPACKET
    daemon_threads = True

    def __init__(
        self, path: str | Path, owners: Mapping[str, Collection[int]], register: Register, log: Callable[[str], None]
    ) -> None:
        self.owners, self.register, self.log = owners, register, log
        self._owned: tuple[int, int, int] | None = None  # the path, once it is ours
        _remove_stale(Path(path))
        try:
            super().__init__(str(path), _Request)
        except OSError as error:
            raise StateError(f"cannot serve {path}: {error.strerror or error}") from None
        self._owned = path_of(self.socket)
        Path(path).chmod(0o666)

    def server_close(self) -> None:
        remove_path(self.socket, self._owned)
        super().server_close()


def _remove_stale(path: Path) -> None:
    """Remove the socket file of a server that has ended; OSError where one is listening, or it is something else."""
    if not path.is_socket():
        return  # bind says what is wrong with it
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise StateError(f"{path} is served already")


class _Request(socketserver.BaseRequestHandler):
    server: Server
    request: socket.socket

    def handle(self) -> None:
        self.request.settimeout(_PATIENCE)
        credentials = self.request.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", credentials)
        label = "?"
        with contextlib.ExitStack() as stack:
            try:
                said, descriptors, flags, _ = socket.recv_fds(self.request, _MAX_LABEL + 1, _MAX_DESCRIPTORS)
                for fd in descriptors:
                    stack.callback(os.close, fd)
                label = said.decode()
                answer = "ok " + self._answer(label, uid, descriptors, flags, stack)
            except (OSError, RuleSetError, UnicodeDecodeError) as error:
                answer = f"no {error}"
            with contextlib.suppress(OSError):
                self.request.send(answer.encode()[:_MAX_ANSWER])
        self.server.log(f"{label} from process {pid}, uid {uid}: {answer}")

    def _answer(self, label: str, uid: int, descriptors: list[int], flags: int, stack: contextlib.ExitStack) -> str:
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise SocketRefusedError(f"too much: {_MAX_LABEL} bytes of label and {_MAX_DESCRIPTORS} sockets at most")
        if uid not in (0, os.geteuid()) and uid not in self.server.owners.get(label, ()):
            raise SocketRefusedError(f"uid {uid} may not register for {label!r}")
        if not descriptors:
            raise SocketRefusedError("no socket came with the request")
        return self.server.register(label, stack.enter_context(listeners.of_descriptors(descriptors)))


def hand_over(path: str | Path, label: str, sockets: Sequence[socket.socket]) -> str:
    """Have sockets registered for a label by the server at `path`; its answer. SocketRefusedError with its reason.

    Needs no privilege but the server's consent. The sockets stay open here, and serve as long as they are.
    """
    if not label or len(label.encode()) > _MAX_LABEL:
        raise RuleSetError(f"label {label!r}: give 1 to {_MAX_LABEL} bytes")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(4 * _PATIENCE)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            raise StateError(f"nobody serves {path}: start `fastrecv lookup serve {path}`") from None
        socket.send_fds(connection, [label.encode()], [sock.fileno() for sock in sockets])
        word, _, answer = connection.recv(_MAX_ANSWER + 4).decode().partition(" ")
    if word != "ok":
        raise SocketRefusedError(answer or "the server ended before it answered")
    return answer
