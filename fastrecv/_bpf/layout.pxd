from fastrecv._bpf.libbpf cimport btf
from libc.stdint cimport uint32_t

cdef object dtype_of(const btf *types, uint32_t id)
cdef object section_type(const btf *types, str section)
cdef object struct_type(const btf *types, str name)
