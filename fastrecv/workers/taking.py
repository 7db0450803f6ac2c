"""Taking: what a service takes off an interface by AF_XDP, before the sockets that it has anyway.

Who has what:

- The supervisor attaches the program (fastrecv.redirect) before it gives its privileges up, and holds its link, which
  the program that follows it inherits: when the supervisor has ended, on whatever way, the interface is without it. It
  keeps CAP_NET_RAW and CAP_IPC_LOCK, for workers that are still to be started.
- A worker registers its memory and opens its AF_XDP sockets, bound to nothing, before it gives its privileges up
  (fastrecv.workers.rings). It binds them, which takes none, when its predecessor has closed its own, and puts them into
  the program's map, whose descriptor it inherits: who may run code in a worker may do so to the queues of others.
- Each queue of the interface has one worker, and the worker of a slot has the same queues as long as the service
  lives, so their number cannot change. More workers than queues there cannot be.

What the program does not take goes on to the stack, and to the slots' sockets: what it cannot judge, and all
datagrams of a queue whose worker is not there. Those find the socket of that worker's slot by classic BPF, the policy
"queue"; so a restart loses nothing, and a sender stays with his worker.

But memory and rings are a process's own. What the rings of a worker hold when it is killed is lost with it, 2048
datagrams a queue at most, when nothing of a socket's queue is. Nobody can look into them afterwards; but the program
counts what it takes, and workers what they read, or see dropped, so the difference is what was lost, with what found no
room in the rings of a worker that hung before it was killed.
"""

from __future__ import annotations

import logging
from ipaddress import ip_address

import msgspec
import numpy as np

from fastrecv.bpf import Link, Map
from fastrecv.choosing import interface_of
from fastrecv.closing import Closing
from fastrecv.errors import StateError
from fastrecv.interfaces import Interface
from fastrecv.redirect import Redirect
from fastrecv.workers.settings import Queues, SettingError, Settings, parsed, without_xdp

__all__ = ["Record", "Taking"]

_TAKEN = 0  # enum outcome, bpf/frame.h


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What the next supervisor of the same process id must know.

    queues : how many the interface has; workers : how many share them. first : the slot of queue 0. link, sockets,
    outcomes : descriptors.
    """

    interface: str
    mode: str
    frame_size: int
    queues: int
    workers: int
    first: int
    link: int
    sockets: int
    outcomes: int

    def descriptors(self) -> list[int]:
        return [self.link, self.sockets, self.outcomes]


class Taking(Closing):
    """The program of a service in its interface. Begun with CAP_BPF, CAP_NET_ADMIN and CAP_NET_RAW; Linux 5.18."""

    def __init__(self, record: Record) -> None:
        """Of a record, whose descriptors are its own from now on."""
        self._told = record
        self._link = Link.take(record.link)
        self._sockets = Map.inherited(record.sockets)
        self._outcomes = Map.inherited(record.outcomes, np.uint32, np.uint64)

    @classmethod
    def begin(cls, settings: Settings, workers: int, log: logging.Logger) -> Taking | None:
        """Attach it, where the settings want it. SettingError, OSError.

        None where they do not; and where they leave it open, and it cannot be, or in generic mode only.
        """
        if settings.backend == "socket":
            return None
        try:
            if settings.backend == "auto" and (why := without_xdp(settings)):
                raise SettingError(*why)
            made = cls._begun(settings, workers)
        except (OSError, SettingError) as error:
            if settings.backend == "xdp":
                raise
            log.info("datagrams come by sockets alone: %s", error)
            return None
        log.info("datagrams come by AF_XDP on %s", made)
        return made

    @classmethod
    def _begun(cls, settings: Settings, workers: int) -> Taking:
        try:
            from fastrecv.xdp_options import MODES, in_best  # noqa: PLC0415 - workers run without libxdp
        except ImportError as error:
            raise StateError(str(error)) from None
        assert settings.bind is not None, "by its settings"
        host, port = parsed(settings.bind)
        interface = Interface.named(interface_of(ip_address(host)))
        if workers > interface.queues:
            raise SettingError(
                "workers",
                f"interface {interface.name} has {interface.queues} queues, and each has one worker: give as many at "
                "most, or the interface more (ethtool -L)",
            )
        modes = MODES if settings.backend == "xdp" else MODES[:-1]
        with Redirect(interface.name, port, addresses=[host]) as redirect:
            mode, _ = in_best(modes, lambda mode: _attached(redirect, mode))
            record = Record(
                interface=interface.name, mode=mode, frame_size=redirect.frame_size, queues=interface.queues,
                workers=workers, first=_first(interface), **redirect.copies(),
            )  # fmt: skip
        return cls(record)

    def record(self) -> Record:
        return self._told

    def queues(self, slot: int) -> Queues:
        """What the worker of a slot is told."""
        told = self._told
        mine = [queue for queue in range(told.queues) if (queue + told.first) % told.workers == slot]
        return Queues(told.interface, mine, told.mode == "zero-copy", told.frame_size, self._sockets.fileno())

    @property
    def taken(self) -> int:
        """Datagrams that were taken off the interface."""
        return int(self._outcomes.lookup([_TAKEN]).sum())

    def close(self) -> None:
        """Detach it: from now on the stack has everything."""
        for one in (self._link, self._sockets, self._outcomes):
            one.close()

    def __str__(self) -> str:
        return f"{self._told.interface}, in {self._told.mode} mode"


def _attached(redirect: Redirect, mode: str) -> str:
    """Attach it in this mode, where sockets can be opened in it, all queues' in turn: nobody has theirs yet."""
    from fastrecv.xdp_options import XdpOptions, reserved  # noqa: PLC0415 - workers run without libxdp

    for queue in range(redirect.interface.queues):
        umem = reserved(redirect.interface, [queue], redirect.frame_size, XdpOptions())
        try:
            umem.open(zero_copy=mode == "zero-copy")
        finally:
            umem.close()
    redirect.attach("generic" if mode == "generic" else "native")
    return mode


def _first(interface: Interface) -> int:
    """What classic BPF reads as the queue of a datagram that has come by the first one.

    Drivers record it one higher (skb_record_rx_queue, include/linux/skbuff.h), so that 0 is none. A veth leaves the
    number of the queue that the other end sent by (seen on Linux 6.18).
    """
    return 0 if interface.kind == "veth" else 1
