"""The one loop that receives: recvmmsg(2), control messages and the split of GRO trains, without the GIL.

recvmmsg's own timeout is never used: it is looked at only after a datagram has arrived (recvmmsg(2), BUGS). What waits is
ppoll(2), and the receive itself does not block.
"""

import os
import time

from fastrecv._recv.door import GLANCE, closed_error, deadline_of

from cpython.exc cimport PyErr_CheckSignals
from fastrecv._recv.arena cimport Arena, Column, Endpoint, Layout, Lease, Path, Pool, lease, map4, new_pool, nothing
from fastrecv._recv.batch cimport new_batch
from fastrecv._recv.door cimport Door, wait
from fastrecv._recv.linux cimport *
from libc.errno cimport EAGAIN, EINTR, ESHUTDOWN, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

MAX_BATCH = 1024  # UIO_MAXIOV, include/uapi/linux/uio.h: what recvmmsg(2) takes at most
MAX_SLOT = 1 << 20
_MAX_DATAGRAM = 65535


cdef enum:
    _TRAIN = 128  # UDP_MAX_SEGMENTS, include/linux/udp.h: datagrams of a GRO train at most
    _LINE = 64  # a cache line
    _NAP = 1000000  # ns
    _SCM_PIDFD = 4  # include/linux/socket.h, Linux 6.5


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


cdef struct Tally:
    # What one recvmmsg(2) brought.
    int64_t bytes
    int truncated
    int control_truncated
    uint32_t drops
    bint has_drops


cdef inline void endpoint(const void *name, socklen_t size, Endpoint *to) noexcept nogil:
    """The row of a struct sockaddr_in or sockaddr_in6; zeros where the kernel gave neither."""
    cdef const sockaddr_in *four = <const sockaddr_in *>name
    cdef const sockaddr_in6 *six = <const sockaddr_in6 *>name
    if size < sizeof(sockaddr_in):  # what stands there is from another round
        memset(to, 0, sizeof(Endpoint))
        return
    to.family = four.sin_family
    if four.sin_family == AF_INET:
        to.port = ntohs(four.sin_port)
        to.scope = 0
        map4(to.address, &four.sin_addr)
    elif four.sin_family == AF_INET6:
        to.port = ntohs(six.sin6_port)
        to.scope = six.sin6_scope_id
        memcpy(to.address, &six.sin6_addr, 16)
    else:
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
            if part.cmsg_type in (SCM_RIGHTS, _SCM_PIDFD):
                # A stranger may send descriptors wherever there is room for them: nobody here wants any.
                while size >= sizeof(int):
                    memcpy(&number, data, sizeof(int))
                    close(number)
                    data += sizeof(int)
                    size -= sizeof(int)
            elif part.cmsg_type == SO_RXQ_OVFL and size >= 4:
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


cdef int fill(int fd, Arena *arena, Tally *tally) noexcept nogil:
    """One recvmmsg(2) into a free arena. The datagrams it brought, or a negative errno."""
    cdef const Layout *layout = &arena.layout
    cdef msghdr *message
    cdef Control control
    cdef Path *path
    cdef int64_t start
    cdef int i, count, length, piece, pieces, row = 0
    cdef uint8_t flags
    arena.rows = 0
    for i in range(arena.used):  # only what the last round has written
        message = &arena.headers[i].msg_hdr
        message.msg_namelen = <socklen_t>layout.name_size
        message.msg_controllen = <size_t>layout.control_size
    arena.used = 0
    count = recvmmsg(fd, arena.headers, <unsigned int>layout.slots, MSG_DONTWAIT | MSG_CMSG_CLOEXEC, NULL)
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
            tally.truncated += 1
        if message.msg_flags & MSG_CTRUNC:
            flags |= Flag.CONTROL_TRUNCATED_ROW
            tally.control_truncated += 1
        if layout.control_size:
            read_control(message, &control)
            if control.has_drops:
                tally.drops = control.drops
                tally.has_drops = True
        tally.bytes += length
        start = i * layout.stride
        pieces = 0
        while True:
            piece = length
            pieces += 1
            if layout.segmented and 0 < control.segment < length and pieces < _TRAIN:
                piece = control.segment
            arena.offsets[row] = start
            arena.lengths[row] = piece
            arena.flags[row] = flags
            if arena.sources != NULL:
                endpoint(message.msg_name, message.msg_namelen, &arena.sources[row])
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


cdef int next_error(int fd) noexcept nogil:
    """Take one report off the error queue of a socket with IP_RECVERR, ip(7); its errno, 0 where there is none.

    Such a socket polls as ready until its queue is empty.
    """
    cdef msghdr report
    cdef uint8_t[512] control
    cdef cmsghdr *part
    cdef sock_extended_err error
    memset(&report, 0, sizeof(report))
    report.msg_control = control
    report.msg_controllen = sizeof(control)
    if recvmsg(fd, &report, MSG_ERRQUEUE | MSG_DONTWAIT) < 0:
        return 0
    part = CMSG_FIRSTHDR(&report)
    while part != NULL:
        if (
            (part.cmsg_level == IPPROTO_IP and part.cmsg_type == IP_RECVERR)
            or (part.cmsg_level == IPPROTO_IPV6 and part.cmsg_type == IPV6_RECVERR)
        ) and part.cmsg_len >= CMSG_LEN(sizeof(error)):
            memcpy(&error, CMSG_DATA(part), sizeof(error))
            if error.ee_origin in (SO_EE_ORIGIN_LOCAL, SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6):
                return <int>error.ee_errno
        part = CMSG_NXTHDR(&report, part)
    return 0


cdef void nap() noexcept nogil:
    cdef timespec time
    time.tv_sec = 0
    time.tv_nsec = _NAP
    nanosleep(&time, NULL)


cdef class Reader(Door):
    """Receives from one socket into a pool of arenas.

    fd : the socket; it stays the caller's, the Reader works on a descriptor of its own for it.
    control_size : bytes of control messages a datagram may bring. columns : which of Column.
    segmented : the socket has UDP_GRO on. reporting : it has IP_RECVERR on, and its error queue is nobody else's.
    drops : the kernel's counter of them as it stands, -1 not to count. Everything else: fastrecv.Receiver.

    Any number of threads may receive at once, each into an arena of its own. What counts is done under the GIL.
    """

    def __cinit__(
        self, int fd, int family, int batch_size, int slot_size, int arenas, int max_arenas,
        int control_size, int columns, bint segmented, bint reporting, long long drops,
    ):
        cdef Layout layout
        self.reporting = reporting
        self.counting = drops >= 0
        self.last_drops = <uint32_t>(drops if drops >= 0 else 0)
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
        self.open(os.dup(fd))

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

    def recv(self, timeout):
        """One batch; fastrecv.Receiver.recv."""
        cdef double deadline = deadline_of(timeout), seconds
        cdef bint waits = timeout is None or timeout > 0
        cdef Lease held
        cdef Tally tally
        cdef int count, code, polled = 0
        memset(&tally, 0, sizeof(tally))
        if self.closed:
            raise closed_error()
        self.inside += 1
        try:
            while True:
                held = lease(self.pool.take(), self.pool)  # from here on it goes back however this ends
                with nogil:
                    count = fill(self.fd, held.arena, &tally)
                    code = next_error(self.fd) if count < 0 and count != -EINTR and self.reporting else 0
                if count > 0:
                    break
                held = None  # nobody needs an arena to wait
                if count == -EINTR:
                    PyErr_CheckSignals()
                    continue
                if count < 0 and count != -EAGAIN:
                    raise OSError(-count, os.strerror(-count))
                if code:
                    raise OSError(code, os.strerror(code))
                if polled & POLLRDHUP:
                    raise OSError(ESHUTDOWN, "the socket was shut down for receiving")
                if not waits or (seconds := min(deadline - time.monotonic(), GLANCE)) <= 0:
                    return new_batch(nothing(&self.pool.layout), self.total_drops if self.counting else -1)
                if self.process != getpid():
                    self.part()
                    self.inside = 1
                with nogil:
                    if polled & POLLERR:
                        nap()  # somebody else's error queue: until he empties it the socket polls as ready
                    polled = wait(self.fd, self.wake, seconds)
                PyErr_CheckSignals()
                if polled < 0 and polled != -EINTR:
                    raise OSError(-polled, os.strerror(-polled))
                polled = max(polled, 0)
                if self.closed:
                    raise closed_error()
        finally:
            self.leave()
        self.batches += 1
        self.datagrams += held.arena.rows
        self.bytes += tally.bytes
        self.truncated += tally.truncated
        self.control_truncated += tally.control_truncated
        if tally.has_drops:
            self.advance(tally.drops)
        return new_batch(held, self.total_drops if self.counting else -1)

    cdef void advance(self, uint32_t drops) noexcept:
        """Carry the kernel's 32-bit counter on in 64; a second thread may bring an older reading."""
        cdef int32_t more = <int32_t>(drops - self.last_drops)
        if more > 0:
            self.total_drops += more
            self.last_drops = drops
