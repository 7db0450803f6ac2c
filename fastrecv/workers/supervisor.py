"""Supervisor: owns the sockets and who gets which sender, and keeps a worker at each; never reads a datagram itself."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable

from fastrecv import privileges
from fastrecv.policies import Policy
from fastrecv.sockets import receive_buffer_limit
from fastrecv.steerable import described
from fastrecv.workers import logs, opening
from fastrecv.workers.counters import Counters
from fastrecv.workers.doors import Doors
from fastrecv.workers.fleet import Fleet
from fastrecv.workers.settings import Settings, Task, identity
from fastrecv.workers.signals import Signals
from fastrecv.workers.slots import Slot
from fastrecv.workers.status import Service, taken
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

    The calling process gives up all capabilities but those that restarting and resizing take: `_kept`. ValueError for
    settings that cannot be; OSErrors, with nothing left behind, where the service cannot begin: StateError also where
    its handler cannot be imported; privileges.OtherThreadsError where the process has threads.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._identity = identity(settings.user, settings.group)
        self._policy = Policy.parse(settings.policy)
        self._log = logs.opened("supervisor")
        self._at_once = False
        self._end_by = 0.0
        self._began = time.monotonic()

    def run(self) -> int:
        """Exit code: 0 stopped as told; 1 all workers were given up, or had to be killed with their queues unread."""
        privileges.refuse_threads()
        privileges.check_becoming(self._identity.user, self._identity.group)
        with contextlib.ExitStack() as stack:
            signals = stack.enter_context(Signals(_SIGNALS))
            self._counters = stack.enter_context(Counters())
            self._fleet = self._open(stack)
            while not self._over():
                self._wait(signals)
                self._fleet.act()
            return self._result()

    # Beginning and end

    def _open(self, stack: contextlib.ExitStack) -> Fleet:
        """The sockets, who gets which sender, and the first workers, when capabilities are given up."""
        passed = opening.inherited()
        for sock in passed:
            stack.enter_context(sock)
        members = opening.members(self._settings, passed)
        port = members[0].getsockname()[1]
        try:
            self._doors = stack.enter_context(Doors(self._settings, port, self, self._log))
            self._steering = Steering(self._policy, members, self._log, passed=bool(passed))
        except BaseException:
            for sock in members:
                sock.close()
            raise
        fleet = Fleet(self._settings, self._steering, self._counters, self._log, self._task)
        stack.callback(fleet.close)
        stack.callback(self._steering.close)
        privileges.keep_only(*self._kept(port))
        self._address, count = described(members[0]), len(members)
        self._log.info("process %d: %s, %d worker%s", os.getpid(), self._address, count, "s" if count > 1 else "")
        if (os.geteuid() if self._identity.user is None else self._identity.user) == 0:
            self._log.warning("workers run as root, though without capabilities: give them a user")
        self._doors.begin()
        fleet.begin(members, passed)
        return fleet

    def _kept(self, port: int) -> list[int]:
        """The capabilities that restarting and resizing take."""
        found = []
        if self._identity.group is not None:
            found.append(privileges.CAP_SETGID)
        if self._identity.user is not None:  # whose processes only who may can kill
            found += [privileges.CAP_SETUID, privileges.CAP_KILL]
        if privileges.is_privileged_port(port):
            found.append(privileges.CAP_NET_BIND_SERVICE)
        if (self._settings.receive_buffer or 0) > receive_buffer_limit():
            found.append(privileges.CAP_NET_ADMIN)
        return found

    def _task(self, slot: Slot) -> Task:
        return Task(self._settings, slot.number, self._counters.fd, slot.sock.fileno(), self._identity)

    def _over(self) -> bool:
        if self._at_once:
            return True
        if self._fleet.stopping:
            return self._fleet.stopped or time.monotonic() >= self._end_by
        return self._fleet.given_up

    def _result(self) -> int:
        self._fleet.kill()
        rows = self._counters.read()
        total = {name: int(rows[name].sum()) for name in ("datagrams", "handled", "failed", "killed")}
        self._log.info(
            "stopped: %(datagrams)d datagrams received, %(handled)d handled, %(failed)d failed, "
            "%(killed)d in the hands of workers that died", total,
        )  # fmt: skip
        if self._at_once:
            return 0
        if not self._fleet.stopping:
            self._log.error("all workers were given up")
            return 1
        if self._fleet.unread:
            self._log.error("unread queues of workers %s are lost", self._fleet.unread)
            return 1
        return 0

    # The loop

    def _wait(self, signals: Signals) -> None:
        """Wait for whatever comes next, and deal with it."""
        doors: dict[int, Callable[[], object]] = {signals.fileno(): lambda: self._signalled(signals)}
        doors |= self._doors.watched()
        workers = self._fleet.watched()
        poll = select.poll()
        for fd in (*doors, *workers):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(1000 * _TICK)}
        for slot, process in {workers[fd] for fd in ready & workers.keys()}:
            self._fleet.heard(slot, process)
        for fd in ready & doors.keys():
            doors[fd]()

    def _signalled(self, signals: Signals) -> None:
        for number in signals.come():
            self._log.info("%s", number.name)
            self._told(number)

    def _told(self, number: signal.Signals) -> None:
        fleet = self._fleet
        if number == signal.SIGQUIT or number in _STOPPING:
            self.stop(now=number == signal.SIGQUIT or fleet.stopping)
        elif fleet.stopping:
            return
        elif number == signal.SIGHUP:
            self.restart()
        else:
            self.scale(fleet.wanted + (1 if number == signal.SIGTTIN else -1))

    # What it can be asked

    def status(self) -> Service:
        """How it stands."""
        return taken(
            self._fleet, self._counters, began=self._began, address=self._address, policy=self._settings.policy,
            chooser=self._steering.chooser, handler=self._settings.handler,
        )  # fmt: skip

    def restart(self) -> None:
        """New workers in the place of all, one after the other."""
        self._fleet.restart()

    def scale(self, workers: int) -> None:
        """So many workers, within what can be."""
        self._fleet.scale(workers)

    def stop(self, *, now: bool) -> None:
        """Stop when queues have been read to their end; now : at once."""
        if now:
            self._at_once = True
        elif not self._fleet.stopping:
            self._end_by = time.monotonic() + self._settings.graceful_timeout
            self._fleet.stop()
