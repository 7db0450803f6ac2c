"""UMEM: the memory that AF_XDP sockets receive into, the sockets of an interface's queues, and who has which frame.

A frame is with the kernel (in a fill ring or filled), in a batch, on its way out, or idle. A batch's frames come back when
its lease ends, as arenas do, and go to the kernel at once: whoever drops the last view need not call anything.
Frames, fill rings and what counts them are the GIL's.

The kernel has never more of a queue's frames than its ring of received ones holds, so that ring never runs over.
"""

import os
import time
from collections import namedtuple

from fastrecv.errors import XdpError

from fastrecv._recv.arena cimport Arena, Column, Pool, arena_over, map_slots, unmap_slots
from fastrecv._recv.linux cimport MSG_DONTWAIT, getpid, getsockopt, socklen_t
from fastrecv._xsk.xdp cimport *
from libc.errno cimport EBUSY, ENOBUFS, EOPNOTSUPP, EPERM, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

KernelStatistics = namedtuple(
    "KernelStatistics", "dropped invalid_descriptors invalid_sent ring_full fill_ring_empty sent_ring_empty"
)

_PATIENCE = 1.0  # seconds; the kernel lets go of a queue some time after its socket is closed (xp_put_pool is deferred)
_NAP = 0.005

_CURES = {
    EBUSY: "another AF_XDP socket has this queue: close it, or take other queues",
    ENOBUFS: "the memory may not be locked: raise RLIMIT_MEMLOCK, or grant CAP_IPC_LOCK",
    EOPNOTSUPP: "the driver has no zero-copy mode",
    EPERM: "run as root, or with CAP_NET_RAW",
}

libxdp_set_print(NULL)  # what it would print is in the exceptions


cdef object error(int code, str tried):
    """The funnel: what to raise for errno `code` after `tried` failed."""
    message = f"{tried}: {os.strerror(code)}"
    if code in _CURES:
        message += f" ({_CURES[code]})"
    return XdpError(code, message)


def grace_period():
    """Wait until every driver's poll has ended that may have found a socket in a program's map: its ring is whole then.

    A grace period of RCU: membarrier(2), MEMBARRIER_CMD_GLOBAL, which takes no privilege; 8 to 30 ms were seen. Where a
    kernel has none (CPUs of nohz_full) a tenth of a second stands for it.
    """
    cdef long result
    with nogil:
        result = syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0)
    if result < 0:
        time.sleep(0.1)


cdef class Umem(Pool):
    """Frames, and, once they are opened, an AF_XDP socket for each of `queues` of an interface of the calling thread's
    namespace.

    frame_size : 2048 or 4096. frames : how many. ring_size : entries of each ring, a power of two; there are at least as
    many frames for each queue. need_wakeup : XDP_USE_NEED_WAKEUP. columns : which of Column; rows : of a batch.

    To make one takes CAP_NET_RAW, and memory that may be locked.
    """

    def __cinit__(
        self, str interface not None, list queues not None, *, int frame_size, int frames, int ring_size,
        bint need_wakeup, int columns, int rows,
    ):
        cdef xsk_umem_config memory
        cdef int i, result
        self.process = getpid()
        self.interface, self.numbers, self.need_wakeup = interface, tuple(queues), need_wakeup
        self.frame_size, self.frames, self.ring_size = frame_size, frames, ring_size
        self.size = <int64_t>frames * frame_size
        self.layout.rows = rows
        self.layout.columns = columns | Column.SOURCES | Column.DESTINATIONS | Column.PREFIXES
        self.limit = frames + 64  # a batch has a frame; who is about to receive has none yet
        self.idle = <Arena **>calloc(<size_t>self.limit, sizeof(void *))
        self.free = <uint64_t *>calloc(<size_t>frames, sizeof(uint64_t))
        self.queues = <Queue *>calloc(len(queues), sizeof(Queue))
        self.memory = map_slots(self.size)
        if self.idle == NULL or self.free == NULL or self.queues == NULL or self.memory == NULL:
            raise MemoryError(f"no memory for {frames:,} frames of {frame_size:,} bytes")
        for i in range(frames):
            self.put(<uint64_t>i * frame_size)
        memset(&memory, 0, sizeof(memory))
        memory.fill_size = memory.comp_size = <uint32_t>ring_size
        memory.frame_size = <uint32_t>frame_size
        with nogil:
            result = xsk_umem__create(&self.umem, self.memory, self.size, &self.queues[0].fill,
                                      &self.queues[0].completed, &memory)
        if result < 0:
            raise error(-result, f"registering {self.size:,} bytes for AF_XDP")

    def open(self, *, bint zero_copy):
        """Open the sockets, and let the kernel have frames.

        zero_copy : ask for it, else refuse it. The first queue's socket is there already, bound to nothing; each
        further one takes CAP_NET_RAW (xsk_create, net/xdp/xsk.c), to bind none takes any.
        """
        cdef bytes name = os.fsencode(self.interface)
        cdef const char *text = name
        cdef uint32_t wanted
        cdef xsk_socket_config config
        cdef Queue *queue
        cdef int i, result
        memset(&config, 0, sizeof(config))
        config.rx_size = config.tx_size = <uint32_t>self.ring_size
        config.libxdp_flags = XSK_LIBXDP_FLAGS__INHIBIT_PROG_LOAD
        config.bind_flags = (XDP_ZEROCOPY if zero_copy else XDP_COPY) | (XDP_USE_NEED_WAKEUP if self.need_wakeup else 0)
        try:
            for i, number in enumerate(self.numbers):
                queue = &self.queues[i]
                wanted = number
                deadline = time.monotonic() + _PATIENCE
                while True:
                    with nogil:
                        result = xsk_socket__create_shared(
                            &queue.socket, text, wanted, self.umem, &queue.received, &queue.sent if i == 0 else NULL,
                            &queue.fill, &queue.completed, &config,
                        )
                    if result != -EBUSY or time.monotonic() > deadline:
                        break
                    time.sleep(_NAP)
                if result < 0:
                    raise error(-result, f"opening an AF_XDP socket for queue {number} of {self.interface}")
                queue.fd = xsk_socket__fd(queue.socket)
                self.count += 1
        except BaseException:
            self.detach()
            raise
        self.refill()

    def __init__(self, *arguments, **options):
        pass  # a pool's would refuse

    @property
    def descriptors(self):
        """Of the sockets, in the order of the queues."""
        return [self.queues[i].fd for i in range(self.count)]

    @property
    def with_kernel(self):
        """Frames that the kernel may fill, or has filled."""
        cdef int i
        return sum([self.queues[i].out for i in range(self.count)])

    @property
    def held(self):
        """Frames that batches have, or views of them."""
        return self.frames - self.idle_frames - self.sending - self.with_kernel

    @property
    def zero_copy(self):
        """Whether the kernel has granted it: XDP_OPTIONS, Linux 5.3."""
        cdef xdp_options options
        cdef socklen_t size = sizeof(options)
        if self.count == 0 or getsockopt(self.queues[0].fd, SOL_XDP, XDP_OPTIONS, &options, &size) < 0:
            return False
        return bool(options.flags & XDP_OPTIONS_ZEROCOPY)

    def statistics(self):
        """KernelStatistics of all queues together: XDP_STATISTICS, include/uapi/linux/if_xdp.h; Linux 5.9."""
        cdef xdp_statistics one
        cdef socklen_t size
        cdef int i
        total = [0] * 6
        for i in range(self.count):
            memset(&one, 0, sizeof(one))
            size = sizeof(one)
            if getsockopt(self.queues[i].fd, SOL_XDP, XDP_STATISTICS, &one, &size) < 0:
                raise error(errno, "reading the statistics of an AF_XDP socket")
            for place, number in enumerate((one.rx_dropped, one.rx_invalid_descs, one.tx_invalid_descs, one.rx_ring_full,
                                            one.rx_fill_ring_empty_descs, one.tx_ring_empty_descs)):
                total[place] += number
        return KernelStatistics(*total)

    cdef void put(self, uint64_t frame) noexcept:
        self.free[self.idle_frames] = frame  # has room for all
        self.idle_frames += 1

    cdef Arena *take(self) except NULL:
        """Columns for a batch without a row yet; its frames come with the rows."""
        cdef Arena *arena
        if self.idling:
            self.idling -= 1
            return self.idle[self.idling]
        if self.made == self.limit:
            raise BufferError(f"{self.made:,} batches are held: release() or copy() one")
        arena = arena_over(&self.layout, self.memory, self.size)
        if arena == NULL:
            raise MemoryError(f"no memory for {self.layout.rows} rows")
        self.made += 1
        return arena

    cdef void give(self, Arena *arena) noexcept:
        cdef int row
        for row in range(arena.rows):
            self.put(<uint64_t>arena.offsets[row] & ~<uint64_t>(self.frame_size - 1))
        arena.rows = 0
        self.idle[self.idling] = arena
        self.idling += 1
        self.refill()

    cdef void refill(self) noexcept:
        """Let the kernel have what is idle, every queue its share."""
        cdef Queue *queue
        cdef uint32_t index = 0
        cdef int i, k, n, share
        if self.idle_frames == 0 or self.count == 0 or self.process != getpid():  # a child's rings are its parent's
            return
        for i in range(self.count):
            queue = &self.queues[(self.turn + i) % self.count]
            share = (self.idle_frames + self.count - i - 1) // (self.count - i)
            n = min(share, self.ring_size - <int>queue.out)
            n = min(n, <int>xsk_prod_nb_free(&queue.fill, <uint32_t>self.ring_size))  # the kernel says late what it took
            if n <= 0 or xsk_ring_prod__reserve(&queue.fill, <uint32_t>n, &index) == 0:
                continue
            queue.out += <uint32_t>n
            for k in range(n):
                self.idle_frames -= 1  # the frame that came back last: it is warm
                xsk_ring_prod__fill_addr(&queue.fill, index + <uint32_t>k)[0] = self.free[self.idle_frames]
            xsk_ring_prod__submit(&queue.fill, <uint32_t>n)
            if xsk_ring_prod__needs_wakeup(&queue.fill):
                recvfrom(queue.fd, NULL, 0, MSG_DONTWAIT, NULL, NULL)
        self.turn = (self.turn + 1) % self.count

    cdef bint starving(self) noexcept:
        """Whether some queue has nothing to receive into."""
        cdef int i
        for i in range(self.count):
            if self.queues[i].out == 0:
                return True
        return False

    cdef void detach(self) noexcept:
        """Close the sockets; the memory stays for whoever has a view of it."""
        cdef int i
        for i in range(self.count):
            xsk_socket__delete(self.queues[i].socket)
        self.count = 0
        if self.umem != NULL:
            xsk_umem__delete(self.umem)
            self.umem = NULL

    def close(self):
        self.detach()

    def __dealloc__(self):
        self.detach()
        if self.memory != NULL:
            unmap_slots(self.memory, self.size)
        free(self.free)
        free(self.queues)
