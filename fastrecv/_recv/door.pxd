cdef int wait(int fd, int wake, double seconds) noexcept nogil


cdef class Door:
    cdef int fd, wake, inside, process
    cdef readonly bint closed
    cdef int open(self, int fd) except -1
    cpdef tuple enter(self)
    cpdef int leave(self) except -1
    cdef int part(self) except -1
    cdef void shut(self) noexcept
