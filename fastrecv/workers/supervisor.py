"""Supervisor: owns the sockets and who gets which sender, and keeps a worker at each; never reads a datagram itself."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections import deque

from fastrecv import privileges
from fastrecv.errors import StateError
from fastrecv.policies import Policy
from fastrecv.sockets import drop_everything, receive_buffer_limit
from fastrecv.steerable import described
from fastrecv.workers import logs, opening
from fastrecv.workers.counters import Counters
from fastrecv.workers.process import Process, ending
from fastrecv.workers.settings import MAX_WORKERS, Settings, Task, identity
from fastrecv.workers.signals import Signals
from fastrecv.workers.slots import Slot
from fastrecv.workers.steering import Steering

__all__ = ["Supervisor"]

_TICK = 0.1  # seconds between two looks at the time
_STOPPING = (signal.SIGTERM, signal.SIGINT)
_SIGNALS = (*_STOPPING, signal.SIGQUIT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU)


class Supervisor:
    """Runs a service, in the process's main thread, until it is told to stop.

    SIGTERM, SIGINT: the flow is stopped, queues are read to their end, workers leave; a second one, and SIGQUIT: at
    once. SIGHUP: new workers in the place of all, one after the other, with the code as it is then. SIGTTIN, SIGTTOU:
    one worker more, or less.

    The calling process gives up all capabilities but those that restarting and resizing take: `kept`. ValueError for
    settings that cannot be; OSErrors, with nothing left behind, where the service cannot begin: StateError also where
    its handler cannot be imported; privileges.OtherThreadsError where the process has threads.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._identity = identity(settings.user, settings.group)
        self._policy = Policy.parse(settings.policy)
        self._log = logs.opened("supervisor")
        self._slots: list[Slot] = []
        self._wanted = 0
        self._begun = self._ending = self._at_once = False
        self._rolling: deque[Slot] = deque()
        self._rolled: Process | None = None
        self._sharing: set[int] = set()

    def run(self) -> int:
        """Exit code: 0 stopped as told; 1 all workers were given up, or had to be killed with their queues unread."""
        privileges.refuse_threads()
        privileges.check_becoming(self._identity.user, self._identity.group)
        with contextlib.ExitStack() as stack:
            signals = stack.enter_context(Signals(_SIGNALS))
            self._counters = stack.enter_context(Counters())
            stack.callback(self._end)
            self._open(stack)
            privileges.keep_only(*self.kept())
            self._report_start()
            for slot in self._slots:
                slot.begin()
            while not self._over():
                self._wait(signals)
                self._act()
            return self._result()

    def kept(self) -> list[int]:
        """The capabilities that restarting and resizing take, so far as the process has them."""
        found = []
        if self._identity.group is not None:
            found.append(privileges.CAP_SETGID)
        if self._identity.user is not None:  # whose processes only who may can kill
            found += [privileges.CAP_SETUID, privileges.CAP_KILL]
        if self._slots and privileges.is_privileged_port(self._slots[0].sock.getsockname()[1]):
            found.append(privileges.CAP_NET_BIND_SERVICE)
        if (self._settings.receive_buffer or 0) > receive_buffer_limit():
            found.append(privileges.CAP_NET_ADMIN)
        return found

    # Beginning and end

    def _open(self, stack: contextlib.ExitStack) -> None:
        passed = opening.inherited()
        for sock in passed:
            stack.enter_context(sock)
        members = opening.members(self._settings, passed)
        self._slots = [self._slot(number, sock, sock not in passed) for number, sock in enumerate(members)]
        self._wanted = len(members)
        self._sharing = set(range(len(members)))
        self._steering = Steering(self._policy, members, self._log, passed=bool(passed))
        stack.callback(self._steering.close)

    def _slot(self, number: int, sock: socket.socket, own: bool) -> Slot:
        row = self._counters.row(number)
        return Slot(number, sock, own, row, self._spawn, self._log, self._settings.graceful_timeout)

    def _spawn(self, slot: Slot) -> Process:
        fd = slot.sock.fileno()
        return Process(Task(self._settings, slot.number, self._counters.fd, fd, self._identity))

    def _report_start(self) -> None:
        where, count = described(self._slots[0].sock), len(self._slots)
        self._log.info("process %d: %s, %d worker%s", os.getpid(), where, count, "s" if count > 1 else "")
        if (os.geteuid() if self._identity.user is None else self._identity.user) == 0:
            self._log.warning("workers run as root, though without capabilities: give them a user")

    def _end(self) -> None:
        """Leave nothing behind."""
        self._kill()
        for slot in self._slots:
            slot.sock.close()

    def _kill(self) -> None:
        processes = [process for slot in self._slots for process in slot.processes]
        for process in processes:
            process.kill()
        for process in processes:
            process.reap()
        for slot in self._slots:
            slot.row.settle()

    def _over(self) -> bool:
        if self._at_once:
            return True
        if self._ending:
            return all(slot.finished for slot in self._slots) or time.monotonic() >= self._end_by
        return all(slot.given_up for slot in self._slots)

    def _result(self) -> int:
        self._kill()
        rows = self._counters.read()
        total = {name: int(rows[name].sum()) for name in ("datagrams", "handled", "failed", "killed")}
        self._log.info(
            "stopped: %(datagrams)d datagrams received, %(handled)d handled, %(failed)d failed, "
            "%(killed)d in the hands of workers that died", total,
        )  # fmt: skip
        if not self._ending and not self._at_once:
            self._log.error("all workers were given up")
            return 1
        unread = [slot.number for slot in self._slots if slot.own and not slot.drained]
        if unread and not self._at_once:
            self._log.error("unread queues of workers %s are lost", unread)
            return 1
        return 0

    # The loop

    def _wait(self, signals: Signals) -> None:
        """Wait for whatever comes next, and deal with it."""
        poll = select.poll()
        poll.register(signals, select.POLLIN)
        watched = {}
        for slot in self._slots:
            for process in slot.processes:
                for fd in process.descriptors:
                    poll.register(fd, select.POLLIN)
                    watched[fd] = slot, process
        ready = {watched[fd] for fd, _ in poll.poll(1000 * _TICK) if fd in watched}
        for slot, process in ready:
            slot.heard(process)
            if process.ended:
                slot.ended(process)
                self._check_start(process)
        for number in signals.come():
            self._told(number)

    def _check_start(self, process: Process) -> None:
        """Before all have begun to read, one that cannot is a service that cannot. StateError."""
        if not self._begun and process.failure is not None:
            raise StateError(process.failure)

    def _told(self, number: signal.Signals) -> None:
        self._log.info("%s", number.name)
        if number == signal.SIGQUIT or (number in _STOPPING and self._ending):
            self._at_once = True
        elif number in _STOPPING:
            self._leave()
        elif self._ending:
            return
        elif number == signal.SIGHUP:
            self._rolling.extend(slot for slot in self._slots if slot not in self._rolling)
        else:
            self._wanted = min(max(self._wanted + (1 if number == signal.SIGTTIN else -1), 1), MAX_WORKERS)

    def _leave(self) -> None:
        """Stop the flow, then let every queue be read to its end."""
        self._ending, self._end_by = True, time.monotonic() + self._settings.graceful_timeout
        self._rolling.clear()
        for slot in self._slots:
            if slot.own:
                drop_everything(slot.sock)
        for slot in self._slots:
            slot.leave()

    def _act(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            slot.act(now, self._settings.timeout)
        self._begun = self._begun or all(slot.reader is not None for slot in self._slots)
        if not self._ending:
            self._roll()
            self._resize()
            self._share()

    def _roll(self) -> None:
        """The rolling restart: the first of those who are left, until its successor reads."""
        while self._rolling and (self._rolling[0].leaving or self._rolling[0] not in self._slots):
            self._rolling.popleft()
            self._rolled = None
        if not self._rolling:
            return
        slot = self._rolling[0]
        if self._rolled is None:
            if slot.successor is None:  # else it was started before, perhaps with code of before
                slot.begin()
                self._rolled = slot.successor
        elif slot.reader is self._rolled:
            self._rolling.popleft()
            self._rolled = None
            if not self._rolling:
                self._log.info("all workers are new")
        elif self._rolled.state == "dead":
            why = self._rolled.failure or ending(self._rolled.status)
            self._log.error("no more workers are restarted, the others stay: the new worker %d: %s", slot.number, why)
            self._rolling.clear()
            self._rolled = None

    def _resize(self) -> None:
        """One worker more or less, where that is wanted, one change at a time."""
        last = self._slots[-1]
        if last.leaving:
            if last.finished:
                self._remove(last)
        elif len(self._slots) < self._wanted and not last.new:
            self._add()
        elif len(self._slots) > self._wanted:
            if not self._sharers(last):
                self._log.error("worker %d stays: nobody else could take its senders", last.number)
                self._wanted = len(self._slots)
                return
            self._share(last)  # before its queue is read to its end
            if last.own:
                self._steering.leave(last.number, last.sock)
            last.leave()

    def _add(self) -> None:
        """A socket, which has a slot and a worker before it has senders."""
        try:
            sock = opening.another(self._settings, [slot.sock for slot in self._slots])
        except OSError as error:
            self._log.error("no worker more: %s", error.strerror or error)
            self._wanted = len(self._slots)
            return
        slot = self._slot(len(self._slots), sock, True)
        slot.new = True
        self._slots.append(slot)
        self._steering.join(slot.number, sock)
        slot.begin()

    def _remove(self, slot: Slot) -> None:
        slot.sock.close()
        self._slots.remove(slot)
        said = self._log.info if slot.drained else self._log.error
        said("worker %d has left%s", slot.number, "" if slot.drained else ", with its queue unread")

    def _sharers(self, but: Slot | None = None) -> set[int]:
        """The slots that are to have senders. but : this one is not."""
        moving = self._settings.given_up == "move"
        return {
            slot.number for slot in self._slots
            if not (slot is but or slot.leaving or slot.new or (slot.given_up and moving))
        }  # fmt: skip

    def _share(self, but: Slot | None = None) -> None:
        """Let those have senders who are to have them, where it is not so; an only one keeps what nobody else takes."""
        wanted = self._sharers(but)
        if not wanted or wanted == self._sharing:
            return
        self._sharing = wanted
        if self._steering.share(wanted, self._slots[0].sock):
            self._log.info("workers %s share the senders", ", ".join(map(str, sorted(wanted))))
        else:
            self._log.warning("without a balancer no senders move: those of workers that were given up wait")
