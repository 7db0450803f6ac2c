"""What a fresh interpreter runs: `python -m fastrecv.workers.worker FD`, the descriptor of its end of the orders.

It becomes who it shall be and gives every capability up before it imports the service's code.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import msgspec

from fastrecv import privileges
from fastrecv.sockets import drop_everything
from fastrecv.workers import logs
from fastrecv.workers.counters import Counters
from fastrecv.workers.handlers import Handler, HandlerError, load
from fastrecv.workers.orders import LONGEST, Orders
from fastrecv.workers.reading import Reading
from fastrecv.workers.settings import Identity, Task

if TYPE_CHECKING:
    from fastrecv.workers.rings import Rings

__all__ = ["FAILED", "main"]

FAILED = 3
"""Exit code of a worker that could not begin; it has said why."""


def main(fd: int) -> int:
    """Work until told to stop; the exit code."""
    with socket.socket(fileno=fd) as sock:
        task = msgspec.json.decode(sock.recv(LONGEST), type=Task)
        for inherited in (fd, *task.descriptors()):  # not by what the service's code executes
            os.set_inheritable(inherited, False)
        for number in (signal.SIGINT, signal.SIGTERM):  # the supervisor says when; what is executed has its own way
            signal.signal(number, _ignore)
        orders = Orders(sock, lambda: _forsaken(task))
        try:
            task.attributes.apply(task.slot)
            with contextlib.closing(_rings(task)) if task.queues is not None else contextlib.nullcontext() as rings:
                become(task.identity)
                _watch_parent(task)
                sys.path.insert(0, str(Path.cwd()))
                _work(task, load(task.settings.handler), orders, rings)
        except (HandlerError, OSError, privileges.OtherThreadsError) as error:
            if not orders.waiting:
                raise
            orders.say(f"failed {error}")
            return FAILED
    return 0


def _rings(task: Task) -> Rings:
    """What takes privileges of them."""
    from fastrecv.workers.rings import Rings  # noqa: PLC0415 - workers run without libxdp

    assert task.queues is not None
    return Rings(task.queues, task.settings.batch_size)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """The signal has woken nobody."""


def _forsaken(task: Task) -> bool:
    """The supervisor was killed: take no longer than a worker may; whether to read the queue to its end.

    Nothing more comes into it then. A queue of systemd's waits for who comes next.
    """
    _end_by(task)
    log = logs.opened(task.settings.log_format, task.slot)
    log.error("the supervisor is gone: %s", "the queue is read to its end" if task.own else "the queue is systemd's")
    if task.own:
        with socket.socket(fileno=os.dup(task.socket)) as sock:
            if sock.type == socket.SOCK_DGRAM:  # on a listener it takes CAP_NET_ADMIN
                with contextlib.suppress(PermissionError):  # its filters are locked: then until the time is over
                    drop_everything(sock)
    return task.own


def _end_by(task: Task) -> None:
    """From now on a worker has as long as it may have to stop."""
    signal.setitimer(signal.ITIMER_REAL, task.settings.graceful_timeout or 1e-6)


def _watch_parent(task: Task) -> None:
    """So that a handler that hangs does not outlive a supervisor that was killed.

    What hangs in C, and lets no signal handler of Python's run, does.
    """
    signal.signal(signal.SIGRTMAX, lambda _number, _frame: _end_by(task))
    privileges.tell_parents_death(signal.SIGRTMAX)


def become(identity: Identity) -> None:
    """Become the user and the group, for good, without any capability left."""
    if identity.group is not None:
        os.setgroups(identity.groups)
        os.setresgid(identity.group, identity.group, identity.group)
    if identity.user is not None:
        os.setresuid(identity.user, identity.user, identity.user)
    privileges.keep_only()


def _work(task: Task, handler: Handler, orders: Orders, rings: Rings | None) -> None:
    log = logs.opened(task.settings.log_format, task.slot)
    logs.take_uncaught(log)
    with socket.socket(fileno=task.socket) as sock, Counters(task.counters) as counters:
        Reading(task, handler, sock, rings, counters, orders, log).run()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
