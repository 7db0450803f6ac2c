"""Supervisor: owns the sockets and who gets which sender, and keeps a worker at each; never reads a datagram itself."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable

from fastrecv import privileges
from fastrecv.policies import Policy
from fastrecv.sockets import receive_buffer_limit
from fastrecv.steerable import described
from fastrecv.workers import logs, opening, succession
from fastrecv.workers.counters import Counters
from fastrecv.workers.doors import Doors
from fastrecv.workers.fleet import Fleet
from fastrecv.workers.notify import Manager
from fastrecv.workers.settings import Settings, Task, attributes, identity
from fastrecv.workers.signals import Signals
from fastrecv.workers.slots import Slot
from fastrecv.workers.status import Service, in_rings, taken
from fastrecv.workers.steering import Steering
from fastrecv.workers.succession import Check, Record
from fastrecv.workers.taking import Taking

__all__ = ["Supervisor"]

_TICK = 0.1  # seconds between two looks at the time
_WELL = "exit code 0"  # of a check
_STOPPING = (signal.SIGTERM, signal.SIGINT)
_SIGNALS = (*_STOPPING, signal.SIGQUIT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR2)


class Supervisor:
    """Runs a service, in the process's main thread, until it is told to stop.

    SIGTERM, SIGINT: the flow is stopped, queues are read to their end, workers leave; a second one, and SIGQUIT: at
    once. SIGHUP: new workers in the place of all, one after the other, with the code as it is then. SIGTTIN, SIGTTOU:
    one worker more, or less. SIGUSR2: the code and the configuration of now in the place of this process's, by the
    command line that it was started with, where a child finds that they can; workers go on meanwhile.

    The calling process gives up all capabilities but those that restarting and resizing take: `_kept`. SettingError for
    settings that cannot be; OSErrors, with nothing left behind, where the service cannot begin: StateError also where
    its handler cannot be imported; privileges.OtherThreadsError where the process has threads.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._identity = identity(settings.user, settings.group)
        self._attributes = attributes(settings)
        self._policy = Policy.parse(settings.policy)
        self._log = logs.opened(settings.log_format)
        self._at_once = False
        self._end_by = 0.0
        self._check: Check | None = None
        self._taking: Taking | None = None
        self._began = time.monotonic()

    def run(self) -> int:
        """Exit code: 0 stopped as told; 1 all workers were given up, or had to be killed with their queues unread."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited SIG_IGN would leave nobody to wait for (waitid(2))
        privileges.refuse_threads()
        privileges.check_becoming(self._identity.user, self._identity.group)
        self._attributes.check()
        before = succession.inherited(self._settings)
        if before is not None and before.checking:
            self._resume(before)
            return 0
        with contextlib.ExitStack() as stack:
            signals = stack.enter_context(Signals(_SIGNALS))
            self._manager = stack.enter_context(Manager())
            if before is None:
                self._open(stack)
            else:
                self._resume(before)
                self._manager.resume(self._fleet)
            stack.callback(self._close)
            self._doors = stack.enter_context(Doors(self._settings, self._name, self, self._log, before))
            privileges.keep_only(*self._kept(), inherited=True)
            self._doors.begin()
            self._report()
            if before is None:
                self._fleet.begin()
            else:
                self._log.info("took over from the program before")
            while not self._over():
                self._wait(signals)
                self._fleet.act()
                self._manager.act(self._fleet, self._counters)
            return self._result()

    # Beginning and end

    def _open(self, stack: contextlib.ExitStack) -> None:
        """The sockets, and who gets which sender."""
        passed = opening.inherited()
        for sock in passed:
            stack.enter_context(sock)
        members = opening.members(self._settings, passed)
        try:
            self._taking = Taking.begin(self._settings, len(members), self._log)
            self._steering = Steering.begin(self._policy, members, self._log, passed=bool(passed))
        except BaseException:
            for sock in members:
                sock.close()
            self._let_go()
            raise
        self._counters = Counters()
        self._fleet = self._made()
        self._fleet.hold(members, passed)

    def _let_go(self) -> None:
        """Of the interface."""
        if self._taking is not None:
            self._taking.close()

    def _resume(self, record: Record) -> None:
        """Go on from where the program before this one was."""
        self._taking = None if record.taking is None else Taking(record.taking)
        members = [socket.socket(fileno=slot.sock) for slot in record.fleet.slots]
        self._steering = Steering.resume(record.steering, self._policy, members[0], self._log)
        self._counters = Counters(record.counters)
        self._end_by, self._began = record.end_by, record.began
        self._fleet = self._made()
        self._fleet.resume(record.fleet, members)
        if self._settings.workers not in (None, record.workers):
            self.scale(self._settings.workers)

    @property
    def _port(self) -> int:
        port: int = self._fleet.slots[0].sock.getsockname()[1]
        return port

    @property
    def _name(self) -> str:
        """What tells the service from others on this host."""
        listens = self._fleet.slots[0].sock.type == socket.SOCK_STREAM
        return f"tcp-{self._port}" if listens else str(self._port)

    @property
    def _address(self) -> str:
        return described(self._fleet.slots[0].sock)

    def _made(self) -> Fleet:
        return Fleet(self._settings, self._steering, self._counters, self._log, self._task)

    def _record(self) -> Record:
        """All that the program after this one must know."""
        settings = self._settings
        return Record(
            fixed=succession.fixed(settings), workers=settings.workers, counters=self._counters.fd,
            control=self._doors.control, steering=self._steering.record(),
            taking=None if self._taking is None else self._taking.record(), fleet=self._fleet.record(),
            began=self._began, end_by=self._end_by,
        )  # fmt: skip

    def _report(self) -> None:
        count = len(self._fleet.slots)
        self._log.info("process %d: %s, %d worker%s", os.getpid(), self._address, count, "s" if count > 1 else "")
        if (os.geteuid() if self._identity.user is None else self._identity.user) == 0:
            self._log.warning("workers run as root, though without capabilities: give them a user")

    def _kept(self) -> list[int]:
        """The capabilities that restarting and resizing take."""
        found = self._attributes.privileges
        if self._identity.group is not None:
            found.append(privileges.CAP_SETGID)
        if self._identity.user is not None:  # whose processes only who may can kill
            found += [privileges.CAP_SETUID, privileges.CAP_KILL]
        if privileges.is_privileged_port(self._port):
            found.append(privileges.CAP_NET_BIND_SERVICE)
        if self._taking is not None:
            found += [privileges.CAP_NET_RAW, privileges.CAP_IPC_LOCK]
        if (self._settings.receive_buffer or 0) > receive_buffer_limit():
            found.append(privileges.CAP_NET_ADMIN)
        return found

    def _close(self) -> None:
        """Leave nothing behind."""
        if self._check is not None:
            self._check.close()
        self._let_go()
        self._steering.close()
        self._fleet.close()
        self._counters.close()

    def _task(self, slot: Slot) -> Task:
        return Task(
            self._settings, slot.number, self._counters.fd, slot.sock.fileno(), slot.own, slot.snapshots,
            self._identity, self._attributes, None if self._taking is None else self._taking.queues(slot.number),
        )  # fmt: skip

    def _over(self) -> bool:
        if self._at_once:
            return True
        if self._fleet.stopping:
            return self._fleet.stopped or time.monotonic() >= self._end_by
        return self._fleet.given_up

    def _result(self) -> int:
        self._manager.stopping()
        self._fleet.kill()
        self._fleet.failure = None
        rows = self._counters.read()
        total = {name: int(rows[name].sum()) for name in ("datagrams", "handled", "failed", "killed")}
        self._log.info(
            "stopped: %(datagrams)d datagrams received, %(handled)d handled, %(failed)d failed, "
            "%(killed)d in the hands of workers that died", total,
        )  # fmt: skip
        if lost := in_rings(self._counters, self._taking):
            self._log.error("%d datagrams are lost that were in rings of workers that died", lost)
        if self._at_once:
            return 0
        if not self._fleet.stopping:
            self._fleet.failure = "all workers were given up"
            self._log.error("%s", self._fleet.failure)
            return 1
        if self._fleet.unread:
            self._fleet.failure = f"unread queues of workers {', '.join(map(str, self._fleet.unread))} are lost"
            self._log.error("%s", self._fleet.failure)
            return 1
        return 0

    # The loop

    def _wait(self, signals: Signals) -> None:
        """Wait for whatever comes next, and deal with it."""
        doors: dict[int, Callable[[], object]] = {signals.fileno(): lambda: self._signalled(signals)}
        doors |= self._doors.watched()
        if self._check is not None:
            doors[self._check.fileno()] = lambda: self._succeed(signals)
        workers = self._fleet.watched()
        poll = select.poll()
        for fd in (*doors, *workers):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(1000 * _TICK)}
        for slot, process in {workers[fd] for fd in ready & workers.keys()}:
            self._fleet.heard(slot, process)
        for fd in ready & doors.keys():
            doors[fd]()
        if self._check is not None and self._check.overdue:
            self._succeed(signals)

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
        elif number == signal.SIGUSR2:
            self._look_for_successor()
        elif number == signal.SIGHUP:
            self.restart()
        else:
            self.scale(fleet.wanted + (1 if number == signal.SIGTTIN else -1))

    def _look_for_successor(self) -> None:
        """Begin a check, where none goes on."""
        try:
            self._check = self._check or Check(self._record())
        except OSError as error:
            self._log.error("the supervisor stays as it is: its successor cannot be looked at: %s", error.strerror)

    def _succeed(self, signals: Signals) -> None:
        """The check has ended: be the code of now, or stay."""
        assert self._check is not None
        result = self._check.result()
        if result is None:
            return
        self._check = None
        if result != _WELL:
            self._log.error("the supervisor stays as it is: its successor would not do (%s)", result)
            return
        with signals.held():
            self._signalled(signals)
            if self._over() or self._check is not None:
                return
            try:
                succession.execute(self._record())
            except OSError as error:
                self._log.error("the supervisor stays as it is: %s", error)

    # What it can be asked

    def status(self) -> Service:
        """How it stands."""
        return taken(
            self._fleet, self._counters, self._steering, self._taking, began=self._began, address=self._address,
            policy=self._settings.policy, handler=self._settings.handler,
        )  # fmt: skip

    def restart(self) -> None:
        """New workers in the place of all, one after the other."""
        self._fleet.restart()
        self._manager.reloading()

    def scale(self, workers: int) -> None:
        """So many workers, within what can be."""
        if self._taking is None or workers == self._fleet.wanted:
            self._fleet.scale(workers)
        else:
            self._fleet.failure = "with AF_XDP the number of workers stays: stop the service, start it with another one"
            self._log.error("%s", self._fleet.failure)

    def stop(self, *, now: bool) -> None:
        """Stop when queues have been read to their end; now : at once."""
        if now:
            self._at_once = True
        elif not self._fleet.stopping:
            self._end_by = time.monotonic() + self._settings.graceful_timeout
            self._fleet.stop()
