"""The one loop that receives: recvmmsg(2), control messages and the split of GRO trains, without the GIL.

recvmmsg's own timeout is never used: it is looked at only after a datagram has arrived (recvmmsg(2), BUGS). What waits is
ppoll(2), and the receive itself does not block.
"""

import math
import os
import time

from cpython.exc cimport PyErr_CheckSignals
from fastrecv._recv.arena cimport Arena, Column, Endpoint, Layout, Lease, Path, Pool, arena_grow, lease, new_pool
from fastrecv._recv.batch cimport Batch, new_batch
from fastrecv._recv.linux cimport *
from libc.errno cimport EAGAIN, EBADF, EINTR, ENOMEM, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

MAX_BATCH = 1024  # UIO_MAXIOV, include/uapi/linux/uio.h: what recvmmsg(2) takes at most
MAX_SLOT = 1 << 20
_MAX_DATAGRAM = 65535
_TRAIN = 128  # UDP_MAX_SEGMENTS, include/linux/udp.h: the rows that a GRO train is expected to make at most
_LINE = 64  # a cache line
_GLANCE = 1.0  # seconds between looks for a signal that came just before the wait, or to another thread


cdef enum Flag:
    TRUNCATED_ROW = 1
    CONTROL_TRUNCATED_ROW = 2

TRUNCATED = <int>Flag.TRUNCATED_ROW
CONTROL_TRUNCATED = <int>Flag.CONTROL_TRUNCATED_ROW


cdef struct Control:
    # What the control messages of one datagram, or of one GRO train, say.
    int64_t timestamp
    int64_t hardware
    Endpoint destination
    uint32_t reply4
    uint32_t drops
    bint has_drops
    int segment
    uint8_t tos


cdef struct Round:
    # What one recvmmsg(2) brought.
    int64_t bytes
    int truncated
    int control_truncated
    uint32_t drops
    bint has_drops


cdef inline void map4(uint8_t *address, const void *four) noexcept nogil:
    """An IPv4 address as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2)."""
    memset(address, 0, 10)
    address[10] = address[11] = 0xFF
    memcpy(address + 12, four, 4)


cdef inline void endpoint(const void *name, Endpoint *to) noexcept nogil:
    """The row of a struct sockaddr_in or sockaddr_in6."""
    cdef const sockaddr_in *four = <const sockaddr_in *>name
    cdef const sockaddr_in6 *six = <const sockaddr_in6 *>name
    to.family = four.sin_family
    if four.sin_family == AF_INET:
        to.port = ntohs(four.sin_port)
        to.scope = 0
        map4(to.address, &four.sin_addr)
    elif four.sin_family == AF_INET6:
        to.port = ntohs(six.sin6_port)
        to.scope = six.sin6_scope_id
        memcpy(to.address, &six.sin6_addr, 16)
    else:  # the kernel gave no name
        memset(to, 0, sizeof(Endpoint))


cdef inline int64_t nanoseconds(const void *at) noexcept nogil:
    cdef __kernel_timespec when
    memcpy(&when, at, sizeof(when))
    return when.tv_sec * 1000000000 + when.tv_nsec


cdef void read_control(msghdr *message, Control *control) noexcept nogil:
    """Read every control message that is there and whole, whoever asked the socket for it."""
    cdef cmsghdr *part = CMSG_FIRSTHDR(message)
    cdef uint8_t *data
    cdef size_t size
    cdef in_pktinfo info4
    cdef in6_pktinfo info6
    cdef sockaddr_in6 name
    cdef int number
    memset(control, 0, sizeof(Control))
    while part != NULL:
        data = CMSG_DATA(part)
        size = part.cmsg_len - CMSG_LEN(0)
        if part.cmsg_level == SOL_SOCKET:
            if part.cmsg_type == SO_RXQ_OVFL and size >= 4:
                memcpy(&control.drops, data, 4)
                control.has_drops = True
            elif part.cmsg_type in (SO_TIMESTAMPNS_NEW, SO_TIMESTAMPNS_OLD) and size >= sizeof(__kernel_timespec):
                control.timestamp = nanoseconds(data)
            elif (
                part.cmsg_type in (SO_TIMESTAMPING_NEW, SO_TIMESTAMPING_OLD)
                and size >= 3 * sizeof(__kernel_timespec)
            ):
                # struct scm_timestamping64: software, deprecated, hardware; include/uapi/linux/errqueue.h
                control.hardware = nanoseconds(data + 2 * sizeof(__kernel_timespec))
        elif part.cmsg_level == IPPROTO_IP:
            if part.cmsg_type == IP_PKTINFO and size >= sizeof(info4):
                memcpy(&info4, data, sizeof(info4))
                map4(control.destination.address, &info4.ipi_addr)
                control.destination.family = AF_INET
                control.destination.scope = <uint32_t>info4.ipi_ifindex
                control.reply4 = info4.ipi_spec_dst.s_addr
            elif part.cmsg_type == IP_RECVORIGDSTADDR and size >= sizeof(sockaddr_in):
                memcpy(&name, data, sizeof(sockaddr_in))
                map4(control.destination.address, &(<sockaddr_in *>&name).sin_addr)
                control.destination.port = ntohs((<sockaddr_in *>&name).sin_port)
                control.destination.family = AF_INET
            elif part.cmsg_type == IP_TOS and size >= 1:
                control.tos = data[0]
        elif part.cmsg_level == IPPROTO_IPV6:
            if part.cmsg_type == IPV6_PKTINFO and size >= sizeof(info6):
                memcpy(&info6, data, sizeof(info6))
                memcpy(control.destination.address, &info6.ipi6_addr, 16)
                control.destination.family = AF_INET6
                control.destination.scope = info6.ipi6_ifindex
            elif part.cmsg_type == IPV6_RECVORIGDSTADDR and size >= sizeof(sockaddr_in6):
                memcpy(&name, data, sizeof(sockaddr_in6))
                memcpy(control.destination.address, &name.sin6_addr, 16)
                control.destination.port = ntohs(name.sin6_port)
                control.destination.family = AF_INET6
            elif part.cmsg_type == IPV6_TCLASS and size >= 4:
                memcpy(&number, data, 4)
                control.tos = <uint8_t>number
        elif part.cmsg_level == IPPROTO_UDP and part.cmsg_type == UDP_GRO and size >= 4:
            memcpy(&control.segment, data, 4)
        part = CMSG_NXTHDR(message, part)


cdef int fill(int fd, Arena *arena, Round *round) noexcept nogil:
    """One recvmmsg(2) into a free arena. The datagrams it brought, or a negative errno."""
    cdef const Layout *layout = &arena.layout
    cdef msghdr *message
    cdef Control control
    cdef Path *path
    cdef int64_t start
    cdef int i, count, length, piece, row = 0
    cdef uint8_t flags
    arena.rows = 0
    for i in range(arena.used):  # only what the last round has written
        message = &arena.headers[i].msg_hdr
        message.msg_namelen = <socklen_t>layout.name_size
        message.msg_controllen = <size_t>layout.control_size
    arena.used = 0
    count = recvmmsg(fd, arena.headers, <unsigned int>layout.slots, MSG_DONTWAIT, NULL)
    if count < 0:
        arena.used = 1  # no more than the first can have been written before the call failed
        return -errno
    arena.used = count
    memset(&control, 0, sizeof(control))
    for i in range(count):
        message = &arena.headers[i].msg_hdr
        length = <int>arena.headers[i].msg_len
        flags = 0
        if message.msg_flags & MSG_TRUNC:
            flags |= Flag.TRUNCATED_ROW
            round.truncated += 1
        if message.msg_flags & MSG_CTRUNC:
            flags |= Flag.CONTROL_TRUNCATED_ROW
            round.control_truncated += 1
        if layout.control_size:
            read_control(message, &control)
            if control.has_drops:
                round.drops = control.drops
                round.has_drops = True
        round.bytes += length
        start = i * layout.stride
        while True:
            piece = length
            if layout.segmented and 0 < control.segment < length:
                piece = control.segment
            if row == arena.room and arena_grow(arena, 2 * row) < 0:
                arena.rows = 0
                return -ENOMEM
            arena.offsets[row] = start
            arena.lengths[row] = piece
            arena.flags[row] = flags
            if arena.sources != NULL:
                endpoint(message.msg_name, &arena.sources[row])
            elif arena.paths != NULL:
                path = &arena.paths[row]
                path.length = 0
                if message.msg_namelen > SUN_PATH:
                    path.length = <uint32_t>(message.msg_namelen - SUN_PATH)
                    path.length = min(path.length, <uint32_t>sizeof(path.path))
                    memcpy(path.path, <uint8_t *>message.msg_name + SUN_PATH, path.length)
            if arena.timestamps != NULL:
                arena.timestamps[row] = control.timestamp
            if arena.hardware != NULL:
                arena.hardware[row] = control.hardware
            if arena.destinations != NULL:
                arena.destinations[row] = control.destination
                if control.destination.family:  # IPv4 over a dual-stack socket: named as its sender is
                    arena.destinations[row].family = arena.sources[row].family
                arena.replies4[row] = control.reply4
            if arena.tos != NULL:
                arena.tos[row] = control.tos
            row += 1
            arena.rows = row
            start += piece
            length -= piece
            if length <= 0:
                break
    return count


cdef void forget_errors(int fd) noexcept nogil:
    """Empty the error queue of a socket with IP_RECVERR, which polls as ready until that is done; ip(7).

    The errors themselves have come from recvmmsg by now.
    """
    cdef msghdr nothing
    memset(&nothing, 0, sizeof(nothing))
    while recvmsg(fd, &nothing, MSG_ERRQUEUE | MSG_DONTWAIT) >= 0:
        pass


cdef int wait(int fd, int wake, double seconds) noexcept nogil:
    """Wait until something may be received, the receiver is closed, a signal comes or the time is over."""
    cdef pollfd[2] polled
    cdef timespec limit
    limit.tv_sec = <long>seconds
    limit.tv_nsec = <long>((seconds - limit.tv_sec) * 1e9)
    polled[0].fd = fd
    polled[1].fd = wake
    polled[0].events = polled[1].events = <short>POLLIN
    if ppoll(polled, 2, &limit, NULL) < 0:
        return -errno
    return 0


cdef class Reader:
    """Receives from one socket into a pool of arenas.

    fd : the socket; it stays the caller's, the Reader works on a descriptor of its own for it.
    control_size : bytes of control messages a datagram may bring. columns : which of Column.
    segmented : the socket has UDP_GRO on. Everything else: fastrecv.Receiver.

    Any number of threads may receive at once, each into an arena of its own. What counts is done under the GIL.
    """

    def __cinit__(self):
        self.fd = self.wake = -1

    def __init__(
        self, int fd, int family, int batch_size, int slot_size, int arenas, int max_arenas,
        int control_size, int columns, bint segmented, bint counting,
    ):
        cdef Layout layout
        self.family = family
        self.counting = counting
        memset(&layout, 0, sizeof(layout))
        layout.slots = batch_size
        layout.slot_size = max(slot_size, _MAX_DATAGRAM) if segmented else slot_size
        layout.stride = (layout.slot_size + _LINE - 1) // _LINE * _LINE
        layout.control_size = control_size
        layout.name_size = sizeof(sockaddr_un) if family == AF_UNIX else sizeof(sockaddr_in6)
        layout.rows = batch_size * (_TRAIN if segmented else 1)
        layout.columns = columns | (Column.PATHS if family == AF_UNIX else Column.SOURCES)
        layout.segmented = segmented
        self.pool = new_pool(&layout, arenas, max_arenas)
        self.fd = os.dup(fd)
        self.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.wake < 0:
            raise OSError(errno, os.strerror(errno))

    @property
    def slot_size(self):
        return self.pool.layout.slot_size

    @property
    def batch_size(self):
        return self.pool.layout.slots

    @property
    def arenas(self):
        """How many arenas there are now."""
        return self.pool.made

    def fileno(self):
        if self.closed:
            raise closed_error()
        return self.fd

    def recv(self, timeout):
        """One batch; fastrecv.Receiver.recv."""
        cdef double deadline = math.inf, seconds
        cdef bint waits = True
        cdef Arena *arena
        cdef Lease held
        cdef Round round
        cdef int count
        if timeout is not None:
            seconds = timeout
            if not seconds >= 0:  # NaN too
                raise ValueError(f"timeout is {timeout!r}: give seconds, 0 not to wait, None to wait for ever")
            waits = seconds > 0
            if waits:
                deadline = time.monotonic() + seconds
        if self.closed:
            raise closed_error()
        arena = self.pool.take()
        held = lease(arena, self.pool)  # from here on it goes back however this ends
        memset(&round, 0, sizeof(round))
        self.inside += 1
        try:
            while True:
                with nogil:
                    count = fill(self.fd, arena, &round)
                    if count == -EAGAIN:
                        forget_errors(self.fd)
                if count > 0:
                    break
                if count == -EINTR:
                    PyErr_CheckSignals()
                elif count < 0 and count != -EAGAIN:
                    raise MemoryError if count == -ENOMEM else OSError(-count, os.strerror(-count))
                elif not waits or (seconds := min(deadline - time.monotonic(), _GLANCE)) <= 0:
                    break
                else:
                    with nogil:
                        count = wait(self.fd, self.wake, seconds)
                    PyErr_CheckSignals()
                    if count < 0 and count != -EINTR:
                        raise OSError(-count, os.strerror(-count))
                    if self.closed:
                        raise closed_error()
        finally:
            self.leave()
        if count > 0:
            self.batches += 1
            self.datagrams += arena.rows
            self.bytes += round.bytes
            self.truncated += round.truncated
            self.control_truncated += round.control_truncated
            if round.has_drops:
                self.advance(round.drops)
        return new_batch(held, self.total_drops if self.counting else -1)

    def enter(self):
        """Two descriptors to wait for, which stay open until leave(): the socket's, and one that tells of close()."""
        if self.closed:
            raise closed_error()
        self.inside += 1
        return self.fd, self.wake

    cdef void advance(self, uint32_t drops) noexcept:
        """Carry the kernel's 32-bit counter on in 64; a second thread may bring an older reading."""
        cdef int32_t more = <int32_t>(drops - self.last_drops)
        if more > 0:
            self.total_drops += more
            self.last_drops = drops

    def close(self):
        """Wake whoever waits in recv, and close the descriptor: at once, or when the last of them has left."""
        if not self.closed:
            self.closed = True
            self.inside += 1
            if self.wake >= 0:
                os.write(self.wake, (1).to_bytes(8, "little"))  # never read: it wakes them all
            self.leave()

    cpdef int leave(self) except -1:
        """Somebody is done with the descriptors; the last one after close() closes them."""
        self.inside -= 1
        if self.closed and self.inside == 0:
            for fd in (self.fd, self.wake):
                if fd >= 0:
                    os.close(fd)
            self.fd = self.wake = -1
        return 0

    def __dealloc__(self):
        # Nobody is inside recv, which holds a reference.
        if self.fd >= 0:
            os.close(self.fd)
        if self.wake >= 0:
            os.close(self.wake)


def closed_error():
    return OSError(EBADF, "the Receiver is closed")
