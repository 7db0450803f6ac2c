"""How a supervisor is followed by newer code of its own: a child checks that code, then it is executed in place.

The process id stays, so workers stay children; sockets and maps are inherited descriptors; all else is a record in a
memfd, whose number is in the environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import msgspec

from fastrecv.errors import StateError
from fastrecv.workers import fleet, steering, taking
from fastrecv.workers.process import ending, executed, exit_status
from fastrecv.workers.settings import Settings

__all__ = ["FORMAT", "Check", "Record", "execute", "fixed", "inherited"]

FORMAT = 2
"""Of a Record: to be counted up with every change of it."""
_VARIABLE = "FASTRECV_SUCCESSION"  # the memfd's number
_PATIENCE = 60.0  # seconds that a check may take


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What the next supervisor must know.

    fixed : settings that cannot change (`fixed`). workers : the setting. counters, control : descriptors. began,
    end_by : time.monotonic(), when the service began, and when all is to stop. checking : it shall only look whether it
    could go on.
    """

    format: int = FORMAT
    fixed: dict[str, str | None]
    workers: int | None
    counters: int
    control: int | None
    steering: steering.Record
    taking: taking.Record | None
    fleet: fleet.Record
    began: float
    end_by: float
    checking: bool = False

    def descriptors(self) -> Iterator[int]:
        """All that it inherits."""
        yield self.counters
        if self.control is not None:
            yield self.control
        yield from self.steering.descriptors()
        if self.taking is not None:
            yield from self.taking.descriptors()
        for slot in self.fleet.slots:
            yield from (slot.sock, slot.snapshots)
            for process in (slot.reader, slot.successor, *slot.going):
                if process is not None:
                    yield from (process.pidfd, process.orders)


def fixed(settings: Settings) -> dict[str, str | None]:
    """Settings that sockets, maps and paths were made by."""
    return {"bind": settings.bind, "backend": settings.backend, "policy": settings.policy, "control": settings.control}


def inherited(settings: Settings) -> Record | None:
    """What the one before has left; None where there was none. StateError.

    settings : as they are now.
    """
    number = os.environ.pop(_VARIABLE, None)
    if number is None:
        return None
    try:
        with os.fdopen(int(number), "rb") as file:
            record = _decoded(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0))
    except (OSError, ValueError) as error:
        raise StateError(f"{_VARIABLE} names no record of a supervisor ({error}): unset it") from None
    for name, now in fixed(settings).items():
        before = record.fixed[name]
        if before != now:
            raise StateError(f"{name} was {before} when the service began: to make it {now}, stop it and start it anew")
    for fd in record.descriptors():
        os.set_inheritable(fd, False)
    return record


def _decoded(data: bytes) -> Record:
    found = msgspec.json.decode(data)
    if isinstance(found, dict) and found.get("format") != FORMAT:
        raise StateError("the running supervisor is of a version that this one cannot follow: stop it, start this one")
    return msgspec.convert(found, Record)


@contextlib.contextmanager
def _written(record: Record) -> Iterator[int]:
    """A memfd that has it."""
    fd = os.memfd_create("fastrecv-succession", os.MFD_CLOEXEC)
    try:
        os.write(fd, msgspec.json.encode(record))
        yield fd
    finally:
        os.close(fd)


def _command() -> list[str]:
    return [sys.executable, *sys.orig_argv[1:]]


class Check:
    """A child that looks whether the code of now could go on from a record; it says itself why it could not.

    OSError where there is no room for one.
    """

    def __init__(self, record: Record) -> None:
        with _written(msgspec.structs.replace(record, checking=True)) as fd:
            _, self._pidfd = executed(_command(), (fd, *record.descriptors()), os.environ | {_VARIABLE: str(fd)})
        self._deadline = time.monotonic() + _PATIENCE

    def fileno(self) -> int:
        """Readable when it has ended."""
        return self._pidfd

    @property
    def overdue(self) -> bool:
        return time.monotonic() > self._deadline

    def result(self) -> str | None:
        """None while it goes on; else how it has ended: "exit code 0" is well."""
        if self.overdue:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        status = exit_status(self._pidfd, os.WNOHANG)
        if status is None:
            return None
        os.close(self._pidfd)
        return ending(status)

    def close(self) -> None:
        """End it, where it goes on."""
        self._deadline = 0.0
        while self.result() is None:
            time.sleep(0.01)


def execute(record: Record) -> NoReturn:
    """Be the code of now. The caller has blocked the signals that it takes. OSError where nothing has changed."""
    with _written(record) as fd:
        kept = (fd, *record.descriptors())
        for one in kept:
            os.set_inheritable(one, True)
        try:
            os.execve(sys.executable, _command(), os.environ | {_VARIABLE: str(fd)})  # noqa: S606 - ourselves
        finally:
            for one in kept:
                os.set_inheritable(one, False)
