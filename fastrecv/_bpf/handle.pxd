# Linux-private errno of a map type that has no batch operation (include/linux/errno.h); libc does not name it.
cdef enum:
    ENOTSUPP = 524

cdef object error(int code, str tried)
cdef void forget_log() noexcept
cdef int check(int result, str tried) except -1
cdef int open_pin(path, bint read_only=*) except -1

cdef class Descriptor:
    cdef int fd
    cdef int alive(self) except -1
