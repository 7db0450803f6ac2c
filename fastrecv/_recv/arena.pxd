from fastrecv._recv.linux cimport iovec, mmsghdr, socklen_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset


cdef struct Endpoint:
    # One row of `sources` and `destinations`; ENDPOINT is its dtype.
    uint8_t address[16]
    uint16_t port
    uint16_t family
    uint32_t scope


cdef struct Path:
    # Where an AF_UNIX datagram came from; length 0: an unnamed socket.
    uint32_t length
    uint8_t path[108]


cdef enum Column:
    # Which columns an arena has beside offsets, lengths and flags.
    SOURCES = 1
    TIMESTAMPS = 2
    HARDWARE = 4
    DESTINATIONS = 8
    TOS = 16
    PATHS = 32
    PREFIXES = 64


cdef struct Layout:
    int slots           # datagrams of one recvmmsg(2)
    int slot_size       # bytes that a datagram may have
    int64_t stride      # bytes from slot to slot
    int control_size    # room for control messages, a slot
    int name_size       # room for the sender's address, a slot
    int rows            # rows the columns have room for
    int columns         # which of Column
    bint segmented      # a slot may bring a GRO train: several rows


cdef struct Arena:
    Layout layout
    int64_t size        # bytes of data
    uint8_t *data
    bint lent           # the data is somebody else's to free
    int64_t *offsets
    int32_t *lengths
    uint8_t *flags
    Endpoint *sources
    Path *paths
    Endpoint *destinations
    uint32_t *replies4  # IPv4 address to answer from: the destination, unless that was a group or broadcast
    int64_t *timestamps
    int64_t *hardware
    uint8_t *tos
    uint8_t *prefixes   # bytes of headers before the payload, where those were received, too
    int rows            # rows that hold a datagram
    mmsghdr *headers
    iovec *vectors
    uint8_t *names
    uint8_t *controls
    int used            # headers that the last recvmmsg(2) has written


cdef inline void map4(uint8_t *address, const void *four) noexcept nogil:
    """An IPv4 address as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2)."""
    memset(address, 0, 10)
    address[10] = address[11] = 0xFF
    memcpy(address + 12, four, 4)


cdef Arena *arena_new(const Layout *layout, int64_t size) noexcept nogil
cdef uint8_t *map_slots(int64_t size) noexcept nogil
cdef void unmap_slots(uint8_t *at, int64_t size) noexcept nogil
cdef Arena *arena_over(const Layout *layout, uint8_t *data, int64_t size) noexcept nogil
cdef int64_t size_of(const Arena *arena) noexcept nogil
cdef void pack(const Arena *arena, uint8_t *to, int64_t *bounds) noexcept nogil


cdef class Pool:
    cdef Layout layout
    cdef Arena **idle
    cdef int idling, made, limit
    cdef Arena *take(self) except NULL
    cdef void give(self, Arena *arena) noexcept


cdef class Lease:
    cdef Arena *arena
    cdef Pool pool  # None: the arena is this lease's own


cdef Lease lease(Arena *arena, Pool pool)
cdef Lease copied(Lease held)
cdef Lease nothing(const Layout *layout)
cdef Pool new_pool(const Layout *layout, int arenas, int limit)
