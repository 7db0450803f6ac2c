from fastrecv._recv.arena cimport Arena, Pool
from fastrecv._xsk.xdp cimport xsk_ring_cons, xsk_ring_prod, xsk_socket, xsk_umem
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t


cdef struct Queue:
    # The AF_XDP socket of one queue of the interface.
    xsk_socket *socket
    int fd
    uint32_t out             # frames of ours that the kernel may fill, or has filled
    xsk_ring_prod fill
    xsk_ring_cons completed
    xsk_ring_cons received
    xsk_ring_prod sent       # of the first queue only


cdef class Umem(Pool):
    cdef uint8_t *memory
    cdef readonly int64_t size
    cdef readonly int frame_size, frames, ring_size
    cdef xsk_umem *umem
    cdef Queue *queues
    cdef readonly str interface
    cdef readonly tuple numbers  # of the queues
    cdef bint need_wakeup
    cdef int count, process, turn
    cdef uint64_t *free
    cdef readonly int idle_frames
    cdef int sending         # frames that are in the ring of what is sent
    cdef void put(self, uint64_t frame) noexcept
    cdef void refill(self) noexcept
    cdef bint starving(self) noexcept
    cdef void detach(self) noexcept
