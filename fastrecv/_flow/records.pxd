from fastrecv._flow.columns cimport Moment, Step, Store
from fastrecv._flow.exporters cimport Counts
from libc.stdint cimport int64_t, uint8_t, uint32_t


cdef enum:
    MOST_STEPS = 512


cdef struct Layout:
    # How records are put into columns. store : NULL where they are counted only. length : of a record, 0 where it varies.
    Store *store
    Step *steps
    int count
    uint32_t shortest
    uint32_t length


cdef struct Origin:
    # What all records of a datagram share. exporter : its number.
    Counts *counts
    int exporter
    int version
    Moment moment


cdef int64_t put_records(
    const Layout *layout, const Origin *origin, const uint8_t *at, int64_t length, int64_t *used,
) noexcept nogil
