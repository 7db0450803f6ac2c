from fastrecv._recv.arena cimport Pool
from libc.stdint cimport uint32_t


cdef class Reader:
    cdef int fd, wake, inside, process
    cdef readonly bint closed
    cdef Pool pool
    cdef bint counting, reporting
    cdef uint32_t last_drops
    cdef long long total_drops
    cdef readonly long long batches, datagrams, bytes, truncated, control_truncated
    cpdef tuple enter(self)
    cpdef int leave(self) except -1
    cdef int part(self) except -1
    cdef void shut(self) noexcept
    cdef void advance(self, uint32_t drops) noexcept
