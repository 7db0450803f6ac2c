"""Rings: the AF_XDP sockets of a worker's queues, read together with the socket of its slot.

What comes by them and when, so that nothing is lost between two workers, and no sender's datagrams change their order
(fastrecv.workers.taking says who has what):

1. memory is registered with privileges; the predecessor may still read;
2. the predecessor has closed its own: the sockets are bound, but the program does not know them yet;
3. the slot's socket is read until it is empty, a second at most: it holds what has come meanwhile;
4. the program knows them: what comes by the queues comes by the rings;
5. told to stop, or to drain: it knows them no more, and what comes goes to the slot's socket again. A grace period
   later nobody writes to the rings; they are read to the end, and closed. Then what the socket holds is read, too, with
   "drain" all of it, else for a second at most; the successor has the rest.

While nobody reads, as rings are closed and bound, some 50 ms in all (seen on a veth, Linux 6.18), datagrams wait in the
socket: what the stack gets behind an XDP program may take 4 KiB each of its receive buffer, so give it room.
"""

from __future__ import annotations

import logging
import select
import time
from collections import deque
from collections.abc import Callable
from errno import ENODEV
from functools import partial

import numpy as np

from fastrecv._recv import Batch
from fastrecv.bpf import Map
from fastrecv.closing import Closing
from fastrecv.errors import XdpError
from fastrecv.interfaces import Interface
from fastrecv.receiver import Receiver, Statistics
from fastrecv.workers.settings import Queues
from fastrecv.xdp_options import Reader, Umem, XdpOptions, grace_period, reader_of, reserved

__all__ = ["Rings"]

_BEHIND = 1.0  # seconds that a socket's queue is read before the rings, or after them, at most


class Rings(Closing):
    """Received from as from a Receiver, by one thread. Made with CAP_NET_RAW; it locks 8 MiB of memory a queue.

    After that no privilege is needed. A queue that cannot be had is said, and its datagrams come by the socket. So
    is an interface that is gone, or goes: the socket stays, and serves whatever has its address later.
    """

    def __init__(self, queues: Queues, batch_size: int) -> None:
        """Register the memory; queues.sockets is this object's from now on. XdpError."""
        self._options = XdpOptions(batch_size=batch_size)
        self._zero_copy = queues.zero_copy
        self._umems: list[Umem] = []
        self._readers: list[Reader] = []
        self._dropped = 0
        self._gone: str | None = None  # why the interface is no more
        self._told = False
        self._poll = select.epoll()
        self._sockets = Map.inherited(queues.sockets, np.uint32, np.uint32)
        self._known = self._left = False
        try:
            self._interface = Interface.named(queues.interface)
            for number in queues.numbers:
                self._umems.append(reserved(self._interface, [number], queues.frame_size, self._options))
        except BaseException as error:
            if not isinstance(error, XdpError) or error.errno != ENODEV:
                self.close()
                raise
            self._gone = str(error)

    def begin(self, receiver: Receiver, log: logging.Logger) -> None:
        """Bind the sockets. receiver : of the slot's socket, which stays the caller's to close."""
        self._receiver, self._log = receiver, log
        self._tell()
        for umem in list(self._umems):
            try:
                umem.open(zero_copy=self._zero_copy)
            except XdpError as error:
                log.error("%s: its datagrams come by the socket", error)
                self._umems.remove(umem)
                umem.close()
            else:
                self._readers.append(reader_of(umem, self._interface, self._options))
        for fd in (receiver.fileno(), *(reader.fileno() for reader in self._readers)):
            self._poll.register(fd, select.EPOLLIN)
        self._sources: deque[Callable[[], Batch]] = deque([receiver.recv_nowait])
        self._until = time.monotonic() + _BEHIND

    def fileno(self) -> int:
        """The descriptor to poll for readability."""
        return self._poll.fileno()

    def recv_nowait(self) -> Batch:
        """A batch of the socket or of a ring, in turn; an empty one where none has anything."""
        for _ in range(len(self._sources)):
            batch = self._sources[0]()
            if len(batch) and self._left:
                break  # this one to its end
            self._sources.rotate(-1)
            if len(batch):
                break
        if self._left:
            if self._umems and not len(batch):
                self._close_rings()
                return self._receiver.recv_nowait()
        elif not self._known and (not len(batch) or time.monotonic() > self._until):
            self._be_known()
        return batch

    def _be_known(self) -> None:
        self._known = True
        for umem in self._umems:
            self._sockets.update(umem.numbers, umem.descriptors)
        self._sources.extend(self._rings())

    def _rings(self) -> list[Callable[[], Batch]]:
        return [partial(self._by_ring, reader) for reader in self._readers]

    def _by_ring(self, reader: Reader) -> Batch:
        """What a ring has; nothing where the interface is gone."""
        try:
            return reader.recv(0)
        except XdpError as error:
            self._gone = str(error)
            self._tell()
            return Batch.of([])

    def _tell(self) -> None:
        if self._gone is not None and not self._told:
            self._told = True
            self._log.error("%s: datagrams come by sockets alone until the service is started anew", self._gone)

    def leave(self, *, to_the_end: bool) -> bool:
        """Let nothing more come by the rings; whether to receive again, as long as there is something.

        What they hold is received, and then, to_the_end or a second at most, what the socket holds: not to let it run
        over until the successor reads.
        """
        if not self._left:
            self._left = True
            if self._known:
                for umem in self._umems:
                    self._sockets.delete(umem.numbers)
                grace_period()
            self._sources = deque(self._rings() or [self._receiver.recv_nowait])
        return to_the_end or bool(self._umems) or time.monotonic() < self._until

    def _close_rings(self) -> None:
        """They have been received to the end, or never will be."""
        self.look()
        for reader in self._readers:
            reader.close()
        for umem in self._umems:
            umem.close()
        self._umems = []
        self._sources = deque([self._receiver.recv_nowait])
        self._until = time.monotonic() + _BEHIND

    def statistics(self) -> Statistics:
        """Of the socket and the rings together."""
        batches, datagrams, size, *others = self._receiver.statistics()
        for reader in self._readers:
            batches, datagrams, size = batches + reader.batches, datagrams + reader.datagrams, size + reader.bytes
        return Statistics(batches, datagrams, size, *others)

    def look(self) -> None:
        """Ask the kernel what it has dropped."""
        if self._umems:  # else it has been asked
            kernel = [umem.statistics() for umem in self._umems]
            self._dropped = sum(one.dropped + one.ring_full for one in kernel)
            self._dropped += sum(reader.bad_checksum + reader.martian + reader.unreadable for reader in self._readers)

    def counts(self) -> tuple[int, int]:
        """Datagrams that have come by the rings; and those, at the last look, that were taken for them and dropped."""
        return sum([reader.datagrams for reader in self._readers]), self._dropped

    def close(self) -> None:
        """Close the sockets; what they still hold is lost. Batches stay good."""
        for reader in self._readers:
            reader.close()
        for umem in self._umems:
            umem.close()
        self._umems = []
        self._poll.close()
        self._sockets.close()
