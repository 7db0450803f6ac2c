from fastrecv._recv.arena cimport Arena, Endpoint, Lease


cdef class Batch:
    cdef Lease lease  # None once released
    cdef long long drop_count  # -1: not counted
    cdef object view  # a memoryview of all data, made when first sliced
    cdef Arena *alive(self) except NULL
    cdef Lease held(self)
    cdef int row(self, Py_ssize_t index) except -1
    cdef object slice(self, Lease held, int row)


cdef Batch new_batch(Lease held, long long drop_count)
