"""The workers of a service as they are wanted: one more or less, new ones in the place of old ones, none."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable

import msgspec

from fastrecv.errors import StateError
from fastrecv.sockets import drops
from fastrecv.workers import opening, slots, snapshots
from fastrecv.workers.counters import Counters
from fastrecv.workers.process import Process, ending
from fastrecv.workers.settings import MAX_WORKERS, Settings, Task
from fastrecv.workers.slots import Slot
from fastrecv.workers.steering import Steering

__all__ = ["Fleet", "Record"]


_REST = 1.0  # seconds


class Record(msgspec.Struct, frozen=True):
    """What the next supervisor of the same process id must know. rolling : numbers of slots; rolled : a process."""

    slots: list[slots.Record]
    wanted: int
    begun: bool
    stopping: bool
    rolling: list[int]
    rolled: int | None
    sharing: set[int]


class Fleet:
    """Slots 0 to n - 1, their processes, and who has senders.

    task : what the worker of a slot is told first. wanted : how many workers there shall be. begun : all have read at
    some time, but for those that were given up. stopping : all are leaving. failure : why the last restart or change of
    their number came to no good end.
    """

    def __init__(
        self, settings: Settings, steering: Steering, counters: Counters, log: logging.Logger,
        task: Callable[[Slot], Task],
    ) -> None:  # fmt: skip
        self._settings, self._steering, self._counters, self._log, self._task = settings, steering, counters, log, task
        self.slots: list[Slot] = []
        self.wanted = 0
        self.begun = self.stopping = False
        self.failure: str | None = None
        self._rolling: deque[Slot] = deque()
        self._rolled: Process | None = None
        self._sharing: set[int] = set()
        self._share_at = 0.0

    def hold(self, members: list[socket.socket], passed: list[socket.socket]) -> None:
        """Take the sockets, which all have senders. passed : those that are another's."""
        self.slots = [self._slot(number, sock, sock not in passed) for number, sock in enumerate(members)]
        self.wanted = len(members)
        self._sharing = set(range(len(members)))

    def begin(self) -> None:
        """Start a worker for each. StateError."""
        for slot in self.slots:
            if not slot.begin():
                raise StateError(f"worker {slot.number} cannot be started: {slot.cause}")

    def resume(self, record: Record, members: list[socket.socket]) -> None:
        """Be as another was before this program was executed. members : the slots' sockets."""
        for one, sock in zip(record.slots, members, strict=True):
            slot = self._slot(one.number, sock, one.own, one.snapshots)
            slot.resume(one)
            self.slots.append(slot)
        self.wanted, self.begun, self.stopping = record.wanted, record.begun, record.stopping
        self._rolling.extend(slot for number in record.rolling for slot in self.slots if slot.number == number)
        self._rolled = next((one for slot in self.slots for one in slot.processes if one.pid == record.rolled), None)
        self._sharing = set(record.sharing)

    def record(self) -> Record:
        return Record(
            [slot.record() for slot in self.slots], self.wanted, self.begun, self.stopping,
            [slot.number for slot in self._rolling], None if self._rolled is None else self._rolled.pid, self._sharing,
        )  # fmt: skip

    def _slot(self, number: int, sock: socket.socket, own: bool, kept: int | None = None) -> Slot:
        row = self._counters.row(number)
        kept = snapshots.begun(row) if kept is None else kept
        return Slot(number, sock, own, row, kept, self._spawn, self._log, self._settings.graceful_timeout)

    def _spawn(self, slot: Slot) -> Process:
        return Process.begin(self._task(slot))

    # What is asked for

    def restart(self) -> None:
        """New workers in the place of all, one after the other."""
        self.failure = None
        self._rolling.extend(slot for slot in self.slots if slot not in self._rolling)

    @property
    def restarting(self) -> int:
        """How many are still to be restarted."""
        return len(self._rolling)

    def scale(self, workers: int) -> None:
        """So many workers, within what can be; one change after the other."""
        self.failure = None
        self.wanted = min(max(workers, 1), MAX_WORKERS)

    def stop(self) -> None:
        """Stop the flow, then let every queue be read to its end."""
        self.stopping = True
        self._rolling.clear()
        self._steering.end(
            {slot.number: slot.sock for slot in self.slots if slot.own},
            {slot.number for slot in self.slots if not slot.own},
        )
        for slot in self.slots:
            slot.leave()

    # How it stands

    @property
    def stopped(self) -> bool:
        return all(slot.finished for slot in self.slots)

    @property
    def given_up(self) -> bool:
        return all(slot.abandoned for slot in self.slots)

    @property
    def unread(self) -> list[int]:
        """Slots whose queues end with this process, and have not been read to their end."""
        return [slot.number for slot in self.slots if slot.unread]

    # What happens

    def watched(self) -> dict[int, tuple[Slot, Process]]:
        """Descriptors to poll, and what to hand to `heard` then."""
        return {fd: (slot, process) for slot in self.slots for process in slot.processes for fd in process.descriptors}

    def heard(self, slot: Slot, process: Process) -> None:
        """The process has said something, or has ended. StateError where the service cannot begin."""
        slot.heard(process)
        if process.ended:
            slot.ended(process)
            if not self.begun and process.failure is not None:
                raise StateError(process.failure)

    def kill(self) -> None:
        """At once, and wait until all have ended."""
        processes = [process for slot in self.slots for process in slot.processes]
        for process in processes:
            process.kill()
        for process in processes:
            process.reap()
        for slot in self.slots:
            slot.row.settle()

    def close(self) -> None:
        """Leave nothing behind."""
        self.kill()
        for slot in self.slots:
            slot.close()

    def act(self) -> None:
        """Do what the time has come for."""
        now = time.monotonic()
        for slot in self.slots:
            slot.act(now, self._settings.timeout)
        self.begun = self.begun or all(slot.reader is not None or slot.given_up for slot in self.slots)
        if not self.stopping:
            self._guard()
            self._roll()
            self._resize()
            self._share()

    def _guard(self) -> None:
        """Put another socket in the place of each that has left the group for good."""
        for number in self._steering.look({slot.number: slot.sock for slot in self.slots if not slot.leaving}):
            slot = self.slots[number]
            if not slot.own:
                continue
            self._steering.leave(number, slot.sock)  # or it could take the datagrams of all
            if slot.reader is None or slot.reader.told is not None:
                continue  # its queue is to have a reader before it is given up
            others = [other.sock for other in self.slots if other is not slot]
            try:
                slot.renew(opening.another(self._settings, [*others, slot.sock]))
                self._steering.join(number, slot.sock)
            except OSError as error:
                self._log.error("worker %d has no socket in the group: %s", number, error.strerror or error)
            else:
                self._log.info("worker %d gets another socket", number)

    def _roll(self) -> None:
        """The rolling restart: the first of those who are left, until its successor reads."""
        while self._rolling and (self._rolling[0].leaving or self._rolling[0] not in self.slots):
            self._rolled_one()
        if not self._rolling:
            return
        slot = self._rolling[0]
        if self._rolled is None:
            if slot.successor is None:  # else it was started before, perhaps with code of before
                if not slot.begin():
                    self._rolls_no_more(slot, slot.cause)
                self._rolled = slot.successor
        elif slot.reader is self._rolled:
            self._rolled_one()
        elif self._rolled.state == "dead":
            self._rolls_no_more(slot, self._rolled.failure or ending(self._rolled.status))

    def _rolls_no_more(self, slot: Slot, why: str | None) -> None:
        self._fails(f"no more workers are restarted, the others stay: the new worker {slot.number}: {why}")
        self._rolling.clear()
        self._rolled = None

    def _rolled_one(self) -> None:
        """The first is new, or leaves."""
        self._rolling.popleft()
        self._rolled = None
        if not self._rolling:
            self._log.info("all workers are new")

    def _resize(self) -> None:
        """One worker more or less, where that is wanted, one change at a time."""
        last = self.slots[-1]
        if last.leaving:
            if last.finished:
                self._remove(last)
        elif len(self.slots) < self.wanted and not last.new:
            self._add()
        elif len(self.slots) > self.wanted:
            if not self._sharers(last):
                self._fails(f"worker {last.number} stays: nobody else could take its senders")
                self.wanted = len(self.slots)
                return
            if not self._share(last):  # before its queue is read to its end
                return
            if last.own:
                self._steering.leave(last.number, last.sock)
            last.leave()

    def _add(self) -> None:
        """A socket, which has a slot and a worker before it has senders."""
        number = len(self.slots)
        try:
            with contextlib.ExitStack() as stack:
                kept = snapshots.begun(self._counters.row(number))
                stack.callback(os.close, kept)
                sock = stack.enter_context(opening.another(self._settings, [slot.sock for slot in self.slots]))
                self._steering.join(number, sock)
                stack.pop_all()
        except OSError as error:
            self._fails(f"no worker more: {error.strerror or error}")
            self.wanted = number
            return
        slot = self._slot(number, sock, True, kept)
        slot.new = True
        self.slots.append(slot)
        slot.begin()

    def _fails(self, why: str) -> None:
        self.failure = why
        self._log.error("%s", why)

    def _remove(self, slot: Slot) -> None:
        said, how = (self._log.error, ", with its queue unread") if slot.unread else (self._log.info, "")
        slot.row.closed(drops(slot.sock))
        slot.close()
        self.slots.remove(slot)
        said("worker %d has left%s", slot.number, how)

    def _sharers(self, but: Slot | None = None) -> set[int]:
        """The slots that are to have senders. but : this one is not."""
        moving = self._settings.given_up == "move"
        return {
            slot.number for slot in self.slots
            if not (slot is but or slot.leaving or slot.new or (slot.given_up and moving))
        }  # fmt: skip

    def _share(self, but: Slot | None = None) -> bool:
        """Let those have senders who are to have them, where it is not so; an only one keeps what nobody else takes.

        False where the kernel refuses it now: it is asked again after a while.
        """
        wanted = self._sharers(but)
        if not wanted or wanted == self._sharing:
            return True
        if time.monotonic() < self._share_at:
            return False
        try:
            shared = self._steering.share(wanted, self.slots[0].sock)
        except OSError as error:
            self._share_at = time.monotonic() + _REST
            self._log.error("the senders stay as they are for now: %s", error.strerror or error)
            return False
        self._sharing = wanted
        if shared:
            self._log.info("workers %s share the senders", ", ".join(map(str, sorted(wanted))))
        else:
            self._log.warning("without a balancer no senders move: those of workers that were given up wait")
        return True
