"""Reuseport groups with a classic program, opened by an ordinary user, and who of their members gets a sender."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from fastrecv.classic import Filter, Instruction
from fastrecv.classic.instructions import packed
from fastrecv.policies import Policy, Sender
from tests.kernel.balancing import FAMILIES
from tests.kernel.privileges import as_user
from tests.kernel.steering import PORT, TCP, Stage

NOBODY = 65534  # an ordinary user
SO_ATTACH_REUSEPORT_CBPF = 51  # include/uapi/asm-generic/socket.h

Option = tuple[int, int, int | bytes]


def serve(stage: Stage, kind: int, family: str, count: int) -> list[socket.socket]:
    return [
        stage.serve(str(number), kind, FAMILIES[family][0], PORT, reuseport=True, only6=family == "ipv6")
        for number in range(count)
    ]


def served_by_nobody(stage: Stage, kind: int, family: str, policy: Policy, count: int) -> Filter:
    """A group that an ordinary user has opened, with the policy's filter that he has attached; stage.servers are it.

    The seed is always the same: whether each member has a sender is not left to chance.
    """
    made = Filter(replace(policy, seed=7), count)
    here, there = socket.socketpair()

    def open_and_attach() -> int:
        try:
            members = serve(stage, kind, family, count)
            made.attach(members[0])
            socket.send_fds(there, [b"done"], [member.fileno() for member in members])
        except OSError as error:
            there.send(str(error).encode())
        return 0

    with here, there:
        os.waitpid(as_user(NOBODY, NOBODY, open_and_attach), 0)
        there.close()
        said, fds, _, _ = socket.recv_fds(here, 200, count)
        for number, fd in enumerate(fds):
            member = stage.servers[str(number)] = stage.stack.enter_context(socket.socket(fileno=fd))
            member.settimeout(5)
        assert said == b"done"
    return made


def attach(sock: socket.socket, instructions: Iterable[Instruction]) -> None:
    """A program that no policy makes."""
    program = packed(instructions)
    buffer = np.frombuffer(program, np.uint8)
    sock.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, struct.pack("@HP", len(program) // 8, buffer.ctypes.data)
    )


def taker(stage: Stage, kind: int, sender: Sender, options: Iterable[Option] = ()) -> int:
    """The member that gets the sender's datagram or connection."""
    with stage.bind(kind, str(sender.source), sender.source_port) as client:
        for option in options:
            client.setsockopt(*option)
        client.connect((str(sender.destination), sender.destination_port))
        client.send(sender.payload)
        return taken(stage, kind)


def taken(stage: Stage, kind: int) -> int:
    """The member that has something to read, and reads it."""
    ready = select.select(stage.servers.values(), [], [], 5)[0]
    (server,) = ready
    (name,) = (name for name, known in stage.servers.items() if known is server)
    if kind == TCP:
        server.accept()[0].close()
    else:
        server.recv(65535)
    return int(name)
