from libc.stdint cimport int64_t


cdef class Memory:
    cdef void *at
    cdef Py_ssize_t length
    cdef int64_t room

    cdef void hold(self, void *at, int64_t length, int64_t room) noexcept


cdef void *claim(int64_t room)
cdef void give_back(void *at, int64_t room)
