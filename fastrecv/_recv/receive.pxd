from fastrecv._recv.arena cimport Pool
from libc.stdint cimport uint32_t


cdef class Reader:
    cdef readonly int family
    cdef int fd, wake, inside
    cdef readonly bint closed
    cdef Pool pool
    cdef bint counting
    cdef uint32_t last_drops
    cdef long long total_drops
    cdef readonly long long batches, datagrams, bytes, truncated, control_truncated
    cdef void advance(self, uint32_t drops) noexcept
    cpdef int leave(self) except -1
