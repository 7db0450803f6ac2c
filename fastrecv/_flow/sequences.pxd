from fastrecv._flow.exporters cimport Counts
from libc.stdint cimport int64_t, uint32_t


cdef void understood(Counts *counts, uint32_t sequence, int64_t records, int64_t flows) noexcept nogil
cdef void not_understood(Counts *counts, uint32_t sequence) noexcept nogil
