"""Arenas: the memory that datagrams are received into, and the leases that keep it from being overwritten.

An arena is one block of slots, and columns with a row for each datagram. It is leased to one batch at a time. Every view
of it (numpy array, memoryview, Arrow buffer) holds a reference to the lease, so the interpreter's own reference counts say
when the last of them is gone; only then does the arena go back to its pool.
"""

import numpy

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from fastrecv._recv.linux cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, PROT_NONE, PROT_READ, PROT_WRITE, mmap, mprotect, munmap,
)
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

cdef enum:
    _PAGE = 4096

ENDPOINT = numpy.dtype([("address", "u1", (16,)), ("port", "u2"), ("family", "u2"), ("scope", "u4")])
assert ENDPOINT.itemsize == sizeof(Endpoint)


cdef int add_columns(Arena *arena, int rows) noexcept nogil:
    """Columns with room for `rows` rows, in one block; -1 without memory."""
    cdef int columns = arena.layout.columns
    cdef size_t item = 8 + 4 + 1  # offsets, lengths, flags
    cdef uint8_t *block
    item += 8 * ((columns & Column.TIMESTAMPS != 0) + (columns & Column.HARDWARE != 0))
    item += sizeof(Endpoint) * ((columns & Column.SOURCES != 0) + (columns & Column.DESTINATIONS != 0))
    item += 4 * (columns & Column.DESTINATIONS != 0) + sizeof(Path) * (columns & Column.PATHS != 0)
    item += (columns & Column.TOS != 0) + (columns & Column.PREFIXES != 0)
    block = <uint8_t *>malloc(item * <size_t>rows)
    if block == NULL:
        return -1
    # Wide columns first, so that each starts aligned to its items.
    arena.offsets = <int64_t *>block
    block += 8 * <size_t>rows
    if columns & Column.TIMESTAMPS:
        arena.timestamps = <int64_t *>block
        block += 8 * <size_t>rows
    if columns & Column.HARDWARE:
        arena.hardware = <int64_t *>block
        block += 8 * <size_t>rows
    if columns & Column.SOURCES:
        arena.sources = <Endpoint *>block
        block += sizeof(Endpoint) * <size_t>rows
    if columns & Column.PATHS:
        arena.paths = <Path *>block
        block += sizeof(Path) * <size_t>rows
    if columns & Column.DESTINATIONS:
        arena.destinations = <Endpoint *>block
        block += sizeof(Endpoint) * <size_t>rows
        arena.replies4 = <uint32_t *>block
        block += 4 * <size_t>rows
    arena.lengths = <int32_t *>block
    block += 4 * <size_t>rows
    arena.flags = block
    block += rows
    if columns & Column.TOS:
        arena.tos = block
        block += rows
    if columns & Column.PREFIXES:
        arena.prefixes = block
    return 0


cdef uint8_t *map_slots(int64_t size) noexcept nogil:
    """Zeroed memory that is only there where it is touched, with a page behind it that nobody may touch; or NULL."""
    cdef size_t room = <size_t>(size + _PAGE - 1) // _PAGE * _PAGE
    cdef void *at = mmap(NULL, room + _PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if at == MAP_FAILED:
        return NULL
    mprotect(<uint8_t *>at + room, _PAGE, PROT_NONE)
    return <uint8_t *>at


cdef void unmap_slots(uint8_t *at, int64_t size) noexcept nogil:
    munmap(at, <size_t>((size + _PAGE - 1) // _PAGE * _PAGE + _PAGE))


cdef Arena *arena_new(const Layout *layout, int64_t size) noexcept nogil:
    """An arena of `size` bytes of data, its headers pointing at its slots; NULL without memory.

    Without slots its data is ordinary memory, which the caller fills.
    """
    cdef Arena *arena = <Arena *>calloc(1, sizeof(Arena))
    cdef int i
    if arena == NULL:
        return NULL
    arena.layout = layout[0]
    arena.size = size
    # At least one byte and one row, so that NULL always means that there is no memory.
    arena.data = map_slots(size) if layout.slots else <uint8_t *>malloc(<size_t>(size if size else 1))
    if arena.data == NULL or add_columns(arena, layout.rows if layout.rows else 1) < 0:
        arena_free(arena)
        return NULL
    if layout.slots == 0:
        return arena
    arena.headers = <mmsghdr *>calloc(<size_t>layout.slots, sizeof(mmsghdr))
    arena.vectors = <iovec *>calloc(<size_t>layout.slots, sizeof(iovec))
    arena.names = <uint8_t *>calloc(<size_t>layout.slots, <size_t>layout.name_size)
    # One byte more, so that NULL always means that there is no memory.
    arena.controls = <uint8_t *>calloc(<size_t>layout.slots * layout.control_size + 1, 1)
    if arena.headers == NULL or arena.vectors == NULL or arena.names == NULL or arena.controls == NULL:
        arena_free(arena)
        return NULL
    for i in range(layout.slots):
        arena.vectors[i].iov_base = arena.data + i * layout.stride
        arena.vectors[i].iov_len = <size_t>layout.slot_size
        arena.headers[i].msg_hdr.msg_iov = &arena.vectors[i]
        arena.headers[i].msg_hdr.msg_iovlen = 1
        arena.headers[i].msg_hdr.msg_name = arena.names + i * layout.name_size
        if layout.control_size:
            arena.headers[i].msg_hdr.msg_control = arena.controls + i * layout.control_size
    arena.used = layout.slots  # none of them has its lengths yet
    return arena


cdef Arena *arena_over(const Layout *layout, uint8_t *data, int64_t size) noexcept nogil:
    """An arena without slots over memory that stays its owner's; NULL without memory for the columns."""
    cdef Arena *arena = <Arena *>calloc(1, sizeof(Arena))
    if arena == NULL:
        return NULL
    arena.layout = layout[0]
    arena.size = size
    arena.data = data
    arena.lent = True
    if add_columns(arena, layout.rows) < 0:
        arena_free(arena)
        return NULL
    return arena


cdef void arena_free(Arena *arena) noexcept nogil:
    if arena.lent:
        pass
    elif arena.layout.slots == 0:
        free(arena.data)
    elif arena.data != NULL:
        unmap_slots(arena.data, arena.size)
    free(arena.offsets)  # where the block of all columns begins
    free(arena.headers)
    free(arena.vectors)
    free(arena.names)
    free(arena.controls)
    free(arena)


cdef class Pool:
    """The arenas of one receiver: `arenas` made at once, more on demand up to `limit`."""

    def __cinit__(self):
        self.idle = NULL

    def __init__(self):
        raise TypeError("pools belong to receivers")

    cdef Arena *take(self) except NULL:
        cdef Arena *arena
        if self.idling:
            self.idling -= 1
            return self.idle[self.idling]  # the one given back last: its pages are warm
        if self.made == self.limit:
            raise BufferError(
                f"all {self.limit} arenas are held by batches or views of them: release() or copy() one, "
                "or allow more with max_arenas"
            )
        arena = arena_new(&self.layout, self.layout.slots * self.layout.stride)
        if arena == NULL:
            raise MemoryError(f"no memory for an arena of {self.layout.slots * self.layout.stride:,} bytes")
        self.made += 1
        return arena

    cdef void give(self, Arena *arena) noexcept:
        self.idle[self.idling] = arena  # has room for `limit`
        self.idling += 1

    def __dealloc__(self):
        # Whoever leases an arena holds the pool, so all of them are idle now.
        while self.idling:
            self.idling -= 1
            arena_free(self.idle[self.idling])
        free(self.idle)


cdef Pool new_pool(const Layout *layout, int arenas, int limit):
    cdef Pool pool = Pool.__new__(Pool)
    cdef Arena *arena
    pool.layout = layout[0]
    pool.limit = limit
    pool.idle = <Arena **>calloc(<size_t>limit, sizeof(void *))
    if pool.idle == NULL:
        raise MemoryError
    while pool.made < arenas:
        arena = arena_new(layout, layout.slots * layout.stride)
        if arena == NULL:
            raise MemoryError(f"no memory for an arena of {layout.slots * layout.stride:,} bytes")
        pool.give(arena)
        pool.made += 1
    return pool


@cython.freelist(8)
@cython.no_gc
cdef class Lease:
    """Keeps one arena from being reused while it lives. As a buffer: all of the arena's data, read-only."""

    def __init__(self):
        raise TypeError("leases come with batches")

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.arena == NULL:
            raise BufferError("a lease of nothing")
        PyBuffer_FillInfo(view, self, self.arena.data, self.arena.size, 1, flags)

    def __dealloc__(self):
        if self.arena == NULL:
            return
        if self.pool is None:
            arena_free(self.arena)
        else:
            self.pool.give(self.arena)


cdef Lease lease(Arena *arena, Pool pool):
    """Lease `arena` of `pool`; without a pool the arena ends with the lease."""
    cdef Lease made = Lease.__new__(Lease)
    made.arena = arena
    made.pool = pool
    return made


cdef int64_t size_of(const Arena *arena) noexcept nogil:
    """Bytes of all datagrams."""
    cdef int64_t size = 0
    cdef int row
    for row in range(arena.rows):
        size += arena.lengths[row]
    return size


cdef void pack(const Arena *arena, uint8_t *to, int64_t *bounds) noexcept nogil:
    """Copy all datagrams one behind the other. bounds : where each begins, and where the last one ends."""
    cdef int row
    bounds[0] = 0
    for row in range(arena.rows):
        memcpy(to + bounds[row], arena.data + arena.offsets[row], <size_t>arena.lengths[row])
        bounds[row + 1] = bounds[row] + arena.lengths[row]


cdef inline void take(void *to, const void *column, size_t item, int rows) noexcept nogil:
    if column != NULL:
        memcpy(to, column, item * <size_t>rows)


cdef Lease copied(Lease held):
    """The same rows in an arena of their own, which ends with its lease; no gaps between the datagrams."""
    cdef const Arena *arena = held.arena
    cdef Arena *twin
    cdef Layout layout = arena.layout
    cdef int64_t size = size_of(arena)
    layout.slots = 0
    layout.rows = arena.rows + 1  # `bounds` of pack has one more
    layout.columns &= ~Column.PREFIXES  # the headers stay behind
    twin = arena_new(&layout, size)
    if twin == NULL:
        raise MemoryError(f"no memory for {size:,} bytes")
    made = lease(twin, None)
    pack(arena, twin.data, twin.offsets)
    twin.rows = arena.rows
    take(twin.lengths, arena.lengths, sizeof(int32_t), arena.rows)
    take(twin.flags, arena.flags, 1, arena.rows)
    take(twin.sources, arena.sources, sizeof(Endpoint), arena.rows)
    take(twin.paths, arena.paths, sizeof(Path), arena.rows)
    take(twin.destinations, arena.destinations, sizeof(Endpoint), arena.rows)
    take(twin.replies4, arena.replies4, sizeof(uint32_t), arena.rows)
    take(twin.timestamps, arena.timestamps, sizeof(int64_t), arena.rows)
    take(twin.hardware, arena.hardware, sizeof(int64_t), arena.rows)
    take(twin.tos, arena.tos, 1, arena.rows)
    return made


cdef Lease nothing(const Layout *layout):
    """A lease of no rows, which holds no arena of a pool."""
    cdef Layout empty = layout[0]
    empty.slots = empty.rows = 0
    cdef Arena *arena = arena_new(&empty, 0)
    if arena == NULL:
        raise MemoryError
    return lease(arena, None)
