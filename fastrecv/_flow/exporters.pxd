from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef enum Malformed:
    # What is wrong with a datagram.
    HEADER    # shorter than one
    VERSION   # neither 5, nor 9, nor 10
    LENGTH    # another one than its header says
    SET       # goes beyond the datagram, or has a number that is reserved
    TEMPLATE  # describes nothing that can be
    DATA      # a set without a record, or a record that goes beyond its set
    MALFORMED_KINDS


cdef struct Counts:
    # What is known of an exporter, and counted; EXPORTER is its dtype, and says more.
    uint8_t address[16]
    uint32_t domain
    uint16_t version
    uint8_t followed
    uint8_t behind
    uint32_t sequence
    uint32_t due
    uint32_t late_due
    int8_t habit
    uint8_t reserved[3]
    int64_t heard
    uint64_t datagrams
    uint64_t flows
    uint64_t octets
    uint64_t packets
    uint64_t options
    uint64_t lost
    uint64_t late
    uint64_t unknown
    uint64_t malformed[MALFORMED_KINDS]


cdef struct Known:
    # A template of an exporter.
    uint16_t name
    int32_t layout


cdef struct Templates:
    Known *known
    int count
    int room


cdef class Exporters:
    cdef Counts *counts
    cdef Templates *templates
    cdef int32_t *slots
    cdef int count
    cdef uint64_t seed

    cdef int slot(self, const uint8_t *address, uint32_t domain, int version) noexcept nogil
    cdef int find(self, const uint8_t *address, uint32_t domain, int version) noexcept nogil
    cdef int layout(self, int exporter, int name) noexcept nogil
