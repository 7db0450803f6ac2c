from fastrecv._bpf.handle cimport Descriptor
from fastrecv._bpf.libbpf cimport bpf_map, bpf_object, bpf_program

cdef class _Variable:
    cdef unsigned char *place
    cdef object dtype
    cdef bint constant

cdef class Object:
    cdef bpf_object *ptr
    cdef bytes data
    cdef readonly str name
    cdef readonly bint loaded
    cdef readonly dict programs
    cdef readonly dict maps
    cdef dict sections

    cdef int alive(self) except -1
    cdef int share_variables(self) except -1
    cdef _Variable variable(self, str name)

cdef class Program(Descriptor):
    cdef readonly Object owner
    cdef bpf_program *ptr

    cdef attach(self, int target, int kind, unsigned int flags, str where)

cdef bpf_map *map_named(Object owner, str name) except NULL
