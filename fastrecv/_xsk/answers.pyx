"""Answers through the ring of what is sent: each has the headers of the frame that it answers, turned round.

What cannot leave this way (too long for a frame or the MTU, no frame idle, the ring full, a batch of another receiver, or
a copy, whose headers stayed behind) is said, and is the caller's to send otherwise.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from fastrecv._recv.arena cimport Arena, Lease
from fastrecv._recv.batch cimport Batch
from fastrecv._recv.linux cimport MSG_DONTWAIT, htons
from fastrecv._xsk.umem cimport Queue, Umem
from fastrecv._xsk.xdp cimport *
from libc.errno cimport EAGAIN, EBUSY, ENOBUFS, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset


cdef enum:
    _TRIES = 64      # calls for what the kernel takes 32 of at once: TX_BATCH_SIZE, net/xdp/xsk.c
    _HOPS = 64       # RFC 1700's default, and Linux's


cdef void write16(uint8_t *at, uint16_t value) noexcept nogil:
    value = htons(value)
    memcpy(at, &value, 2)


cdef int compose(const uint8_t *received, uint32_t prefix, uint8_t *to, uint32_t size, uint32_t mtu) noexcept nogil:
    """Headers in front of the `size` bytes of payload that stand at to + prefix; bytes of the frame, or -1.

    received : a frame that was taken, whose headers are `prefix` bytes.
    """
    cdef frame parsed
    cdef uint8_t *network
    cdef uint8_t *transport
    cdef uint16_t checksum
    cdef uint32_t length = FRAME_UDP + size
    memset(&parsed, 0, sizeof(parsed))
    if frame_parse(received, received + prefix + 65535, prefix + 65535, &parsed) != TAKEN:  # the payload is there, as it was judged
        return -1
    network = to + (parsed.network - received)
    transport = to + (parsed.transport - received)
    if length + <uint32_t>(transport - network) > mtu:
        return -1
    memcpy(to, received, prefix)
    memcpy(to, received + 6, 6)
    memcpy(to + 6, received, 6)
    if parsed.version == 4:
        memcpy(network + 12, parsed.network + 16, 4)
        memcpy(network + 16, parsed.network + 12, 4)
        memset(network + 1, 0, 11)
        write16(network + 2, <uint16_t>(FRAME_IP4 + length))
        network[6] = 0x40  # not to be fragmented, so it needs no number: RFC 6864
        network[8], network[9] = _HOPS, 17
        checksum = ~checksum_folded(checksum_of(network, FRAME_IP4, 0))
        memcpy(network + 10, &checksum, 2)
    else:
        memcpy(network + 8, parsed.network + 24, 16)
        memcpy(network + 24, parsed.network + 8, 16)
        network[0] = 0x60
        memset(network + 1, 0, 3)
        write16(network + 4, <uint16_t>length)
        network[7] = _HOPS
    memcpy(transport, parsed.transport + 2, 2)
    memcpy(transport + 2, parsed.transport, 2)
    write16(transport + 4, <uint16_t>length)
    memset(transport + 6, 0, 2)
    parsed.network, parsed.transport = network, transport
    checksum = ~checksum_folded(checksum_of(transport, length, checksum_pseudo(&parsed, <uint16_t>length)))
    if checksum == 0:
        checksum = 0xFFFF
    memcpy(transport + 6, &checksum, 2)
    return <int>(prefix + size)


cdef void reap(Umem umem) noexcept:
    """Take back the frames that have left."""
    cdef Queue *queue = umem.queues
    cdef uint32_t index = 0, i, count
    count = xsk_ring_cons__peek(&queue.completed, <uint32_t>umem.ring_size, &index)
    for i in range(count):
        umem.put(xsk_ring_cons__comp_addr(&queue.completed, index + i)[0] & ~<uint64_t>(umem.frame_size - 1))
    xsk_ring_cons__release(&queue.completed, count)
    umem.sending -= <int>count


cdef int hurry(int fd) noexcept nogil:
    """Have the kernel send what is in the ring; 0 or an errno."""
    cdef int i
    for i in range(_TRIES):
        if sendto(fd, NULL, 0, MSG_DONTWAIT, NULL, 0) >= 0:
            return 0
        if errno not in (EAGAIN, EBUSY, ENOBUFS):
            return errno
    return 0  # whoever polls the socket sends the rest


cdef bint enqueue(Umem umem, const Arena *arena, int row, const uint8_t *data, Py_ssize_t size, uint32_t mtu) noexcept:
    """One answer into the ring; whether it found room."""
    cdef Queue *queue = umem.queues
    cdef uint32_t prefix = arena.prefixes[row], index = 0
    cdef uint64_t at
    cdef xdp_desc *descriptor
    cdef int length
    if prefix + size > umem.frame_size or umem.idle_frames == 0:
        return False
    at = umem.free[umem.idle_frames - 1]
    memcpy(umem.memory + at + prefix, data, <size_t>size)
    length = compose(arena.data + arena.offsets[row] - prefix, prefix, umem.memory + at, <uint32_t>size, mtu)
    if length < 0 or xsk_ring_prod__reserve(&queue.sent, 1, &index) == 0:
        return False
    umem.idle_frames -= 1
    umem.sending += 1
    descriptor = xsk_ring_prod__tx_desc(&queue.sent, index)
    descriptor.addr, descriptor.len, descriptor.options = at, <uint32_t>length, 0
    xsk_ring_prod__submit(&queue.sent, 1)
    return True


def answer(Umem umem not None, Batch batch not None, payloads, uint32_t mtu):
    """Answer the senders of a batch: (how many answers are on their way, rows that are not).

    payloads : a Batch, or a tuple of bytes-like objects, None for no answer; as many as the batch has. mtu : bytes of an
    IP packet at most.
    """
    cdef Lease held = batch.held(), given = None
    cdef Py_buffer buffer
    cdef int row, sent = 0, fd
    cdef bint entered
    left = []
    if isinstance(payloads, Batch):
        given = (<Batch>payloads).held()
    if umem.count == 0 or held.pool is not umem:
        return 0, [row for row in range(held.arena.rows) if given is not None or payloads[row] is not None]
    reap(umem)
    for row in range(held.arena.rows):
        if given is not None:
            entered = enqueue(umem, held.arena, row, given.arena.data + given.arena.offsets[row],
                              given.arena.lengths[row], mtu)
        elif payloads[row] is None:
            continue
        else:
            try:
                PyObject_GetBuffer(payloads[row], &buffer, PyBUF_SIMPLE)
            except TypeError:
                raise TypeError(f"payload {row} is a {type(payloads[row]).__name__}: give a bytes-like object") from None
            entered = enqueue(umem, held.arena, row, <const uint8_t *>buffer.buf, buffer.len, mtu)
            PyBuffer_Release(&buffer)
        if entered:
            sent += 1
        else:
            left.append(row)
    if sent:
        fd = umem.queues[0].fd
        with nogil:
            hurry(fd)
        reap(umem)
    umem.refill()
    return sent, left
