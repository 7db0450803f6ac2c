from fastrecv._recv.arena cimport Pool
from fastrecv._recv.door cimport Door
from libc.stdint cimport uint32_t


cdef class Reader(Door):
    cdef Pool pool
    cdef bint counting, reporting
    cdef uint32_t last_drops
    cdef long long total_drops
    cdef readonly long long batches, datagrams, bytes, truncated, control_truncated
    cdef void advance(self, uint32_t drops) noexcept
