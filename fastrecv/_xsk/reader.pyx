"""The one loop that takes frames off AF_XDP rings: rows of a batch, without the GIL, and no copy.

The program in the interface has judged each frame by the same parser that runs here again (bpf/frame.h), since what is in a
ring lies in memory of ours and is not believed unseen. What is left to user space is the UDP checksum.
"""

import os
import socket
import time

import numpy

from fastrecv._recv.door import GLANCE, closed_error, deadline_of
from fastrecv.errors import XdpError

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from fastrecv._recv.arena cimport Arena, Lease, lease, map4, nothing
from fastrecv._recv.batch cimport new_batch
from fastrecv._recv.door cimport Door, wait
from fastrecv._recv.linux cimport (
    AF_INET, AF_INET6, MSG_DONTWAIT, SOL_SOCKET, close, getpid, getsockopt, ntohl, socklen_t,
)
from fastrecv._xsk.umem cimport Queue, Umem
from fastrecv._xsk.xdp cimport *
from libc.errno cimport EINTR, EBADF, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset


cdef enum:
    _ROWS = 1024    # of a batch at most
    _QUEUES = 256
    _AHEAD = 8      # frames whose headers are fetched while one is read: another CPU's cache has them
    _VLANS = 4096   # IEEE 802.1Q: 12 bits
    _LINKS = 1      # RTMGRP_LINK, include/uapi/linux/rtnetlink.h

MAX_BATCH = <int>_ROWS
MAX_QUEUES = <int>_QUEUES


cdef enum Checksums:
    TRUST_THEM
    VERIFY_THEM
    PARTIAL_TOO

TRUST = <int>Checksums.TRUST_THEM
VERIFY = <int>Checksums.VERIFY_THEM
PARTIAL = <int>Checksums.PARTIAL_TOO


cdef enum Row:
    FULL
    UNREADABLE
    MARTIAN
    BAD_CHECKSUM


@cython.no_gc_clear  # its end needs the Umem
cdef class Reader(Door):
    """Receives from the sockets of a Umem, and closes them.

    checksums : TRUST, VERIFY or PARTIAL. busy : drive the driver before each look (busy polling).
    Everything else: fastrecv.XdpReceiver.

    Any number of threads may receive at once. The rings of received frames have a lock; all else is the GIL's.
    """

    def __cinit__(self, Umem umem not None, *, int checksums, bint busy):
        cdef epoll_event event
        self.umem = umem
        self.changes = -1
        self.checksums, self.busy = checksums, busy
        self.interfaces = <uint32_t *>calloc(_VLANS, sizeof(uint32_t))
        self.lock = <pthread_mutex_t *>calloc(1, sizeof(pthread_mutex_t))
        if self.interfaces == NULL or self.lock == NULL:
            raise MemoryError
        pthread_mutex_init(self.lock, NULL)
        self.open(epoll_create1(EPOLL_CLOEXEC))
        if self.fd < 0:
            raise OSError(errno, os.strerror(errno))
        memset(&event, 0, sizeof(event))
        event.events = EPOLLIN
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE) as changes:
            changes.bind((0, _LINKS))
            self.changes = changes.detach()
        for fd in (self.changes, *umem.descriptors):
            if epoll_ctl(self.fd, EPOLL_CTL_ADD, fd, &event) < 0:
                raise OSError(errno, os.strerror(errno))

    def place(self, dict interfaces not None, martians):
        """What is known of the host, from now on.

        interfaces : the index of the interface by the number of the VLAN, 0 for untagged frames. martians : IPv4
        addresses that nobody may send from.
        """
        cdef uint32_t[::1] ordered = numpy.array(sorted(map(int, martians)), numpy.uint32)
        cdef uint32_t *table = <uint32_t *>calloc(<size_t>(len(ordered) + 1), sizeof(uint32_t))
        if table == NULL:
            raise MemoryError
        for i in range(len(ordered)):
            table[i] = ordered[i]
        with nogil:
            pthread_mutex_lock(self.lock)
            table, self.martians = self.martians, table
            self.martian_count = <int>ordered.shape[0]
            pthread_mutex_unlock(self.lock)
        free(table)
        for vlan, index in interfaces.items():
            self.interfaces[<int>vlan & (_VLANS - 1)] = <uint32_t>index

    def recv(self, timeout):
        """One batch; fastrecv.XdpReceiver.recv."""
        cdef double deadline = deadline_of(timeout), seconds
        cdef bint waits = timeout is None or timeout > 0, waited = False, late
        cdef uint64_t[_ROWS] refused
        cdef uint32_t[_QUEUES] taken
        cdef Lease held
        cdef Tally tally
        cdef int polled
        self.enter()
        try:
            while True:
                held = lease(self.umem.take(), self.umem)  # from here on its frames go back however this ends
                with nogil:
                    self.look(held.arena, refused, taken, &tally)
                self.settle(refused, taken, &tally)
                if held.arena.rows:
                    break
                held = None  # nobody needs one to wait
                if self.umem.starving():
                    raise BufferError(
                        f"{self.umem.held:,} of {self.umem.frames:,} frames are held by batches or views of them and a "
                        "queue has none to receive into: release() or copy() some, or give more frames"
                    )
                late = not waits or (seconds := min(deadline - time.monotonic(), GLANCE)) <= 0
                if late or waited:
                    self.gone()
                if late:
                    return new_batch(nothing(&self.umem.layout), -1)
                if not tally.refused:
                    with nogil:
                        polled = wait(self.fd, self.wake, seconds)
                    if polled < 0 and polled != -EINTR:
                        raise OSError(-polled, os.strerror(-polled))
                    waited = True
                PyErr_CheckSignals()
                if self.closed:
                    raise closed_error()
        finally:
            self.leave()
        self.batches += 1
        self.datagrams += held.arena.rows
        return new_batch(held, -1)

    cdef void look(self, Arena *arena, uint64_t *refused, uint32_t *taken, Tally *tally) noexcept nogil:
        """Take what the rings have, up to a batch, beginning with another queue each time."""
        cdef now_timespec now
        cdef Queue *queue
        cdef int i, number
        memset(tally, 0, sizeof(Tally))
        clock_gettime(CLOCK_REALTIME, &now)
        pthread_mutex_lock(self.lock)
        for i in range(self.umem.count):
            number = (self.turn + i) % self.umem.count
            queue = &self.umem.queues[number]
            if self.busy:
                recvfrom(queue.fd, NULL, 0, MSG_DONTWAIT, NULL, NULL)
            taken[number] = 0
            self.drain(queue, arena, refused, &taken[number], now.tv_sec * 1000000000 + now.tv_nsec, tally)
        self.turn = (self.turn + 1) % self.umem.count
        pthread_mutex_unlock(self.lock)

    cdef void drain(
        self, Queue *queue, Arena *arena, uint64_t *refused, uint32_t *taken, long long now, Tally *tally
    ) noexcept nogil:
        cdef const xdp_desc *found
        cdef uint32_t index = 0, i
        cdef uint32_t room = <uint32_t>min(arena.layout.rows - arena.rows, _ROWS - tally.refused)
        cdef int outcome
        taken[0] = xsk_ring_cons__peek(&queue.received, room, &index)
        for i in range(min(taken[0], <uint32_t>_AHEAD)):
            fetch(self.umem.memory + xsk_ring_cons__rx_desc(&queue.received, index + i).addr)
        for i in range(taken[0]):
            if i + _AHEAD < taken[0]:
                fetch(self.umem.memory + xsk_ring_cons__rx_desc(&queue.received, index + i + _AHEAD).addr)
            found = xsk_ring_cons__rx_desc(&queue.received, index + i)
            outcome = self.row(arena, found.addr, found.len, now)
            if outcome == Row.FULL:
                tally.bytes += arena.lengths[arena.rows - 1]
                continue
            tally.unreadable += outcome == Row.UNREADABLE
            tally.martian += outcome == Row.MARTIAN
            tally.bad_checksum += outcome == Row.BAD_CHECKSUM
            refused[tally.refused] = found.addr & ~<uint64_t>(self.umem.frame_size - 1)
            tally.refused += 1
        xsk_ring_cons__release(&queue.received, taken[0])

    cdef int row(self, Arena *arena, uint64_t address, uint32_t length, long long now) noexcept nogil:
        """Make the frame the next row of the arena, if it is what it should be."""
        cdef const uint8_t *at = self.umem.memory + address
        cdef frame parsed
        cdef int row = arena.rows
        cdef uint32_t interface
        memset(&parsed, 0, sizeof(parsed))
        if address + length > <uint64_t>self.umem.size or frame_parse(at, at + length, length, &parsed) != TAKEN:
            return Row.UNREADABLE
        if parsed.version == 4 and self.is_martian(parsed.network + 12):
            return Row.MARTIAN
        if self.checksums != TRUST_THEM and not checksum_right(&parsed, self.checksums == PARTIAL_TOO):
            return Row.BAD_CHECKSUM
        interface = self.interfaces[parsed.vlan]
        arena.offsets[row] = parsed.transport + FRAME_UDP - self.umem.memory
        arena.lengths[row] = parsed.length - FRAME_UDP
        arena.flags[row] = 0
        arena.prefixes[row] = <uint8_t>(parsed.transport + FRAME_UDP - at)
        arena.sources[row].port = frame_word(parsed.transport)
        arena.destinations[row].port = parsed.port
        arena.destinations[row].scope = interface
        arena.sources[row].scope = 0
        if parsed.version == 4:
            arena.sources[row].family = arena.destinations[row].family = <uint16_t>AF_INET
            map4(arena.sources[row].address, parsed.network + 12)
            map4(arena.destinations[row].address, parsed.network + 16)
            memcpy(&arena.replies4[row], parsed.network + 16, 4)
        else:
            arena.sources[row].family = arena.destinations[row].family = <uint16_t>AF_INET6
            memcpy(arena.sources[row].address, parsed.network + 8, 16)
            memcpy(arena.destinations[row].address, parsed.network + 24, 16)
            arena.replies4[row] = 0
            if parsed.network[8] == 0xFE and parsed.network[9] & 0xC0 == 0x80:  # link-local
                arena.sources[row].scope = interface
        if arena.timestamps != NULL:
            arena.timestamps[row] = now
        if arena.tos != NULL:
            arena.tos[row] = parsed.tos
        arena.rows = row + 1
        return Row.FULL

    cdef bint is_martian(self, const uint8_t *address) noexcept nogil:
        cdef uint32_t wanted
        cdef int low = 0, high = self.martian_count, middle
        memcpy(&wanted, address, 4)
        wanted = ntohl(wanted)
        while low < high:
            middle = (low + high) // 2
            if self.martians[middle] < wanted:
                low = middle + 1
            else:
                high = middle
        return low < self.martian_count and self.martians[low] == wanted

    cdef void settle(self, const uint64_t *refused, const uint32_t *taken, const Tally *tally) noexcept:
        """Account for a look, and let the kernel have frames for those it gave."""
        cdef int i
        for i in range(self.umem.count):
            self.umem.queues[i].out -= taken[i]
        for i in range(tally.refused):
            self.umem.put(refused[i])
        self.bytes += tally.bytes
        self.bad_checksum += tally.bad_checksum
        self.unreadable += tally.unreadable
        self.martian += tally.martian
        self.umem.refill()

    cdef int gone(self) except -1:
        """Raise ENETDOWN where the interface is no more, each time: the kernel says it once, and its sockets poll as
        nothing then (xsk_poll, net/xdp/xsk.c), which is why the changes are watched."""
        cdef int code = 0
        cdef socklen_t size = sizeof(code)
        while recvfrom(self.changes, NULL, 0, MSG_DONTWAIT, NULL, NULL) >= 0:
            pass
        if getsockopt(self.umem.queues[0].fd, SOL_SOCKET, SO_ERROR, &code, &size) == 0 and code:
            self.lost = code
        if self.lost:
            raise XdpError(self.lost, f"the interface {self.umem.interface} is gone: {os.strerror(self.lost)}")
        return 0

    cdef int part(self) except -1:
        raise XdpError(EBADF, "an XdpReceiver is of the process that made it: make another one after a fork")

    def close(self):
        if self.process != getpid() and not self.closed:  # a child closes what it has inherited, and nobody waits there
            self.closed = True
            self.shut()
        else:
            Door.close(self)

    cdef void shut(self) noexcept:
        Door.shut(self)
        if self.lock != NULL:  # else a door's end that follows ours
            self.umem.detach()
            if self.changes >= 0:
                close(self.changes)
            self.changes = -1

    def __dealloc__(self):
        self.shut()
        if self.lock != NULL:
            pthread_mutex_destroy(self.lock)
        free(self.lock)
        self.lock = NULL
        free(self.interfaces)
        free(self.martians)
