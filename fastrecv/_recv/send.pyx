"""The one loop that sends: sendmmsg(2), source addresses, and UDP_SEGMENT for runs to one peer, without the GIL."""

import time
from collections.abc import Sequence

import numpy

from fastrecv._recv.arena import ENDPOINT
from fastrecv._recv.door import closed_error, deadline_of

cimport numpy as cnp
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from fastrecv._recv.arena cimport Arena, Endpoint, Lease, Path
from fastrecv._recv.batch cimport Batch
from fastrecv._recv.linux cimport *
from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, EMSGSIZE, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

cnp.import_array()

cdef enum:
    _CHUNK = 256        # messages of one sendmmsg(2)
    _CONTROL = 64       # CMSG_SPACE(struct in6_pktinfo) + CMSG_SPACE(uint16_t), and some
    _RUN = 4            # equal datagrams to one peer from which on a run is left to the kernel to cut
    _SEGMENTS = 64      # UDP_MAX_SEGMENTS of the oldest kernels that have UDP_SEGMENT, include/linux/udp.h
    _TRAIN_BYTES = 65000  # below the 65,507 bytes of one UDP payload


cdef struct Row:
    # One datagram to be sent.
    const uint8_t *data
    Py_ssize_t size
    Endpoint to
    const Path *path         # instead of `to`, for AF_UNIX
    const Endpoint *source   # the address to send from; NULL: the kernel's choice
    uint32_t reply4          # where it is another than `source` says (groups, broadcast)
    uint8_t header[8]        # of UDP, for a raw socket


cdef struct Outbox:
    # One sendmmsg(2) in the making.
    mmsghdr headers[_CHUNK]
    int rows[_CHUNK]         # how many rows a message carries
    uint8_t names[_CHUNK][112]
    uint8_t controls[_CHUNK][_CONTROL]
    iovec vectors[_CHUNK * 2]


cdef socklen_t name_of(const Row *row, bint raw, uint8_t *to) noexcept nogil:
    """Write the struct sockaddr; its length, 0 for a connected socket."""
    cdef sockaddr_in *four = <sockaddr_in *>to
    cdef sockaddr_in6 *six = <sockaddr_in6 *>to
    memset(to, 0, sizeof(sockaddr_un))
    if row.path != NULL:
        (<sockaddr_un *>to).sun_family = <sa_family_t>AF_UNIX
        memcpy((<sockaddr_un *>to).sun_path, row.path.path, row.path.length)
        return <socklen_t>(SUN_PATH + row.path.length)
    if row.to.family == AF_INET:
        four.sin_family = <sa_family_t>AF_INET
        four.sin_port = 0 if raw else htons(row.to.port)
        memcpy(&four.sin_addr, row.to.address + 12, 4)
        return sizeof(sockaddr_in)
    if row.to.family == AF_INET6:
        six.sin6_family = <sa_family_t>AF_INET6
        six.sin6_port = 0 if raw else htons(row.to.port)
        six.sin6_scope_id = row.to.scope
        memcpy(&six.sin6_addr, row.to.address, 16)
        return sizeof(sockaddr_in6)
    return 0


cdef inline size_t append(msghdr *message, size_t used, int level, int kind, const void *data, size_t size) noexcept nogil:
    """Append a control message; the bytes used now."""
    cdef cmsghdr *added = <cmsghdr *>(<uint8_t *>message.msg_control + used)
    added.cmsg_level = level
    added.cmsg_type = kind
    added.cmsg_len = CMSG_LEN(size)
    memcpy(CMSG_DATA(added), data, size)
    return used + CMSG_SPACE(size)


cdef size_t source_of(const Row *row, msghdr *message) noexcept nogil:
    """Name the address to send from, which the datagram that is answered was sent to; bytes of control."""
    cdef in_pktinfo four
    cdef in6_pktinfo six
    if row.source == NULL or row.source.family == 0:
        return 0
    if row.source.family == AF_INET:
        memset(&four, 0, sizeof(four))
        memcpy(&four.ipi_spec_dst, row.source.address + 12, 4)
        if row.reply4:
            four.ipi_spec_dst.s_addr = row.reply4
        return append(message, 0, IPPROTO_IP, IP_PKTINFO, &four, sizeof(four))
    memset(&six, 0, sizeof(six))
    if row.source.address[0] == 0xFF:  # a group: from any address of the interface it came in by
        six.ipi6_ifindex = row.source.scope
    else:
        memcpy(&six.ipi6_addr, row.source.address, 16)
        if row.reply4:  # IPv4 over a dual-stack socket
            memcpy(<uint8_t *>&six.ipi6_addr + 12, &row.reply4, 4)
        if row.source.address[0] == 0xFE and row.source.address[1] & 0xC0 == 0x80:  # link-local
            six.ipi6_ifindex = row.source.scope
    return append(message, 0, IPPROTO_IPV6, IPV6_PKTINFO, &six, sizeof(six))


cdef uint64_t sum16(const uint8_t *data, Py_ssize_t size, uint64_t total) noexcept nogil:
    """Add 16-bit words in memory order (RFC 1071: any order will do); an odd byte is padded with 0."""
    cdef uint16_t word
    cdef Py_ssize_t i
    for i in range(0, size - 1, 2):
        memcpy(&word, data + i, 2)
        total += word
    if size & 1:
        word = 0
        memcpy(&word, data + size - 1, 1)
        total += word
    return total


cdef void header_of(Row *row) noexcept nogil:
    """The UDP header (RFC 768) of a datagram that leaves through a raw socket; IPv6 checksums are the kernel's."""
    cdef uint16_t[4] header
    cdef uint64_t total
    header[0] = htons(row.source.port)
    header[1] = htons(row.to.port)
    header[2] = htons(<uint16_t>(8 + row.size))
    header[3] = 0
    if row.to.family == AF_INET:
        total = sum16(row.data, row.size, <uint64_t>htons(<uint16_t>IPPROTO_UDP) + header[2])
        total = sum16(row.source.address + 12, 4, sum16(row.to.address + 12, 4, total))
        total = sum16(<uint8_t *>header, 8, total)
        while total > 0xFFFF:
            total = (total & 0xFFFF) + (total >> 16)
        header[3] = <uint16_t>(~total & 0xFFFF)
        if header[3] == 0:
            header[3] = 0xFFFF
    memcpy(row.header, header, 8)


cdef inline bint alike(const Row *first, const Row *other) noexcept nogil:
    """Whether `other` can follow `first` in a train: the same peer, the same own address, no larger."""
    if other.path != NULL or memcmp(&first.to, &other.to, sizeof(Endpoint)) or not 0 < other.size <= first.size:
        return False
    if first.source == NULL or other.source == NULL:
        return first.source == other.source
    return memcmp(first.source, other.source, sizeof(Endpoint)) == 0 and first.reply4 == other.reply4


cdef int run_of(const Row *rows, int count) noexcept nogil:
    """How many rows from the first on may leave as one train: all of one size, but for a smaller last one."""
    cdef Py_ssize_t total = rows[0].size
    cdef int n = 1
    while n < min(count, <int>_SEGMENTS) and alike(rows, &rows[n]) and total + rows[n].size <= _TRAIN_BYTES:
        total += rows[n].size
        n += 1
        if rows[n - 1].size < rows[0].size:
            break
    return n


cdef int compose(Outbox *outbox, Row *rows, int count, bint raw, bint trains) noexcept nogil:
    """Messages for as many rows as fit; how many messages."""
    cdef msghdr *message
    cdef int i, n, run, vectors = 0, row = 0
    cdef uint16_t segment
    for i in range(_CHUNK):
        if row == count:
            return i
        run = run_of(&rows[row], count - row) if trains else 1
        if run < _RUN:
            run = 1
        if vectors + 2 * run > 2 * _CHUNK:
            return i
        message = &outbox.headers[i].msg_hdr
        memset(message, 0, sizeof(msghdr))
        message.msg_name = outbox.names[i]
        message.msg_namelen = name_of(&rows[row], raw, outbox.names[i])
        if message.msg_namelen == 0:
            message.msg_name = NULL
        message.msg_iov = &outbox.vectors[vectors]
        message.msg_control = outbox.controls[i]
        message.msg_controllen = source_of(&rows[row], message)
        if run > 1:
            segment = <uint16_t>rows[row].size
            message.msg_controllen = append(message, message.msg_controllen, IPPROTO_UDP, UDP_SEGMENT, &segment, 2)
        for n in range(row, row + run):
            if raw:
                header_of(&rows[n])
                outbox.vectors[vectors].iov_base = rows[n].header
                outbox.vectors[vectors].iov_len = 8
                vectors += 1
            outbox.vectors[vectors].iov_base = <void *>rows[n].data
            outbox.vectors[vectors].iov_len = <size_t>rows[n].size
            vectors += 1
        message.msg_iovlen = <size_t>(&outbox.vectors[vectors] - message.msg_iov)
        outbox.rows[i] = run
        row += run
    return _CHUNK


cdef bint wait_to_send(int fd, int wake, double seconds) noexcept nogil:
    """Wait for room in the send buffer; whether the Receiver was closed meanwhile."""
    cdef pollfd[2] polled
    cdef timespec limit
    limit.tv_sec = <long>seconds
    limit.tv_nsec = <long>((seconds - limit.tv_sec) * 1e9)
    polled[0].fd = fd
    polled[0].events = <short>POLLOUT
    polled[1].fd = wake
    polled[1].events = <short>POLLIN
    return ppoll(polled, 2, &limit, NULL) > 0 and polled[1].revents != 0


cdef cnp.ndarray whole(endpoints):
    """The array without gaps."""
    if endpoints.dtype != ENDPOINT or endpoints.ndim != 1:
        raise TypeError(f"destinations are a one-dimensional array of ENDPOINT, not of {endpoints.dtype}")
    return numpy.ascontiguousarray(endpoints)


def in_sequence(payloads):
    """The payloads as a tuple; refuses what is no sequence of them."""
    if isinstance(payloads, Sequence) and not isinstance(payloads, (bytes, bytearray, memoryview, str)):
        return tuple(payloads)
    raise TypeError(f"payloads are a list of datagrams, [b'...'], or a Batch, not {type(payloads).__name__}")


cdef Py_ssize_t rows_of(object given) except -1:
    return (<Lease>given).arena.rows if isinstance(given, Lease) else len(given)


cdef class Letters:
    """Datagrams to be sent, with the buffers they lie in.

    payloads : a Batch, or a sequence of bytes-like objects, None for nothing to be sent.
    to : a Batch (its senders), an array of ENDPOINT or a list of AF_UNIX paths (bytes), of one item for all or of one
    for each payload; None on a connected socket. source : a Batch (its destinations), an array of ENDPOINT, or None.
    chosen : rows to be sent, or None for all.
    """

    cdef Row *rows
    cdef int count, held
    cdef Py_buffer *buffers
    cdef Path *paths
    cdef object keeps

    def __cinit__(self):
        self.rows = NULL
        self.buffers = NULL
        self.paths = NULL

    def __init__(self, payloads, to, source, chosen):
        cdef bint batched = isinstance(payloads, Batch)
        if not batched:
            payloads = in_sequence(payloads)  # nobody else can change its length
        if isinstance(to, list):
            to = tuple(to)
        cdef Py_ssize_t n = len(payloads), i
        cdef Row *row
        cdef Arena *arena
        self.rows = <Row *>calloc(<size_t>(n + 1), sizeof(Row))
        self.buffers = <Py_buffer *>calloc(<size_t>(n + 1), sizeof(Py_buffer))
        self.paths = <Path *>calloc(<size_t>(n + 1), sizeof(Path))
        if self.rows == NULL or self.buffers == NULL or self.paths == NULL:
            raise MemoryError
        # Leases, not batches: release() in another thread must not pull the memory away.
        payloads, to, source = ((<Batch>given).held() if isinstance(given, Batch) else given
                                for given in (payloads, to, source))
        self.keeps = [payloads, to, source]
        if isinstance(to, numpy.ndarray):
            to = whole(to)
        if isinstance(source, numpy.ndarray):
            source = whole(source)
            self.keeps.append(source)
        if to is not None and rows_of(to) not in (1, n):
            raise ValueError(f"{n} payloads for {rows_of(to)} destinations: give one for each")
        if source is not None and rows_of(source) != n:
            raise ValueError(f"{n} payloads for {rows_of(source)} sources: give one for each")
        for i in range(n) if chosen is None else chosen:
            if not 0 <= i < n or self.count == n:
                raise IndexError(f"row {i} of {n} payloads")
            row = &self.rows[self.count]
            if batched:
                arena = (<Lease>payloads).arena
                row.data = arena.data + arena.offsets[i]
                row.size = arena.lengths[i]
            elif payloads[i] is None:
                continue
            else:
                try:
                    PyObject_GetBuffer(payloads[i], &self.buffers[self.held], PyBUF_SIMPLE)
                except TypeError:
                    raise TypeError(f"payload {i} is a {type(payloads[i]).__name__}: give a bytes-like object") from None
                row.data = <const uint8_t *>self.buffers[self.held].buf
                row.size = self.buffers[self.held].len
                self.held += 1
            if to is not None:
                self.address(row, to, i if rows_of(to) > 1 else 0)
            if isinstance(source, Lease):
                arena = (<Lease>source).arena
                if arena.destinations == NULL:
                    raise ValueError("the batch does not say where its datagrams were sent to")
                row.source = &arena.destinations[i]
                row.reply4 = arena.replies4[i]
            elif source is not None:
                row.source = &(<Endpoint *>cnp.PyArray_DATA(<cnp.ndarray>source))[i]
            self.count += 1

    cdef int address(self, Row *row, object to, Py_ssize_t i) except -1:
        cdef Arena *arena
        cdef Path *path = &self.paths[self.count]
        cdef bytes name
        if isinstance(to, Lease):
            arena = (<Lease>to).arena
            if arena.sources != NULL:
                row.to = arena.sources[i]
                return 0
            path[0] = arena.paths[i]
        elif isinstance(to, numpy.ndarray):
            row.to = (<Endpoint *>cnp.PyArray_DATA(<cnp.ndarray>to))[i]
            return 0
        else:
            name = to[i]
            if len(name) > <Py_ssize_t>sizeof(path.path):
                raise ValueError(f"{name!r} is too long for the path of a socket: {sizeof(path.path)} bytes at most")
            path.length = <uint32_t>len(name)
            memcpy(path.path, <const uint8_t *>name, path.length)
        row.path = path
        return 0

    def __dealloc__(self):
        while self.held:
            self.held -= 1
            PyBuffer_Release(&self.buffers[self.held])
        free(self.rows)
        free(self.buffers)
        free(self.paths)


def send(
    int fd, payloads, to, source=None, chosen=None, *, bint raw=False, bint tolerant=False, timeout=0, int wake=-1
):
    """Send datagrams, in order; what they are: Letters. (sent, failed, errno of the first that failed).

    raw : the socket is a raw one; UDP headers, with source ports, are written here. tolerant : go on after a datagram
    that the kernel refuses. timeout : seconds to wait for room in the send buffer; None for ever. wake : a descriptor
    that becomes readable when the wait is to end.
    """
    cdef double deadline = deadline_of(timeout), seconds
    cdef Letters letters = Letters(payloads, to, source, chosen)
    cdef int row = 0, messages, done, i, code, failed = 0, first = 0
    cdef int domain = AF_UNIX
    cdef socklen_t size = sizeof(domain)
    cdef bint trains, closed
    cdef Outbox *outbox = <Outbox *>malloc(sizeof(Outbox))  # written as far as it is used
    if outbox == NULL:
        raise MemoryError
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size)
    trains = not raw and domain != AF_UNIX
    try:
        while row < letters.count:
            with nogil:
                messages = compose(outbox, letters.rows + row, letters.count - row, raw, trains)
                done = sendmmsg(fd, outbox.headers, <unsigned int>messages, MSG_DONTWAIT | MSG_NOSIGNAL)
                code = errno
            if done >= 0:
                for i in range(done):
                    row += outbox.rows[i]
                continue
            if code == EINTR:
                PyErr_CheckSignals()
            elif code == EAGAIN and not (tolerant and letters.rows[row].path != NULL):
                seconds = min(deadline - time.monotonic(), 1.0)
                if seconds <= 0:
                    break
                if letters.rows[row].path != NULL:
                    seconds = min(seconds, 0.001)
                with nogil:
                    # To a path it is the peer's queue that is full, which no poll of ours tells of: unix(7).
                    closed = wait_to_send(-1 if letters.rows[row].path != NULL else fd, wake, seconds)
                PyErr_CheckSignals()
                if closed:
                    raise closed_error()
            elif outbox.rows[0] > 1 and code in (EIO, EINVAL, EMSGSIZE):
                # No trains this way: a segment beyond the path's MTU, or a device without checksums; udp(7).
                trains = False
            else:
                first = first or code
                if not tolerant:
                    break
                failed += 1
                row += 1
    finally:
        free(outbox)
    return row - failed, failed, first
