"""BPF ring buffers: all records at hand in one array, without a Python object for each."""

import warnings

import numpy as np

from fastrecv._bpf.handle cimport check, error, forget_log
from libc.errno cimport errno
from libc.stdint cimport uint8_t


cdef extern from *:
    """
    #include <bpf/libbpf.h>
    #include <errno.h>
    #include <stdlib.h>
    #include <string.h>

    struct collected {
        char *bytes;
        size_t record, count, room; /* bytes of a record; records that are there, and for which there is room */
        size_t wrong;               /* the size of a record that has another one */
    };

    #define AT_ONCE ((size_t)1 << 16) /* who writes as fast as we read must not hold us for ever */

    static int collect(void *context, void *data, size_t size)
    {
        struct collected *all = context;
        char *larger;
        size_t room;

        if (size != all->record) {
            all->wrong = size;
            return -ECANCELED;
        }
        if (all->count == all->room) {
            room = all->room ? 2 * all->room : 64;
            larger = realloc(all->bytes, room * size);
            if (!larger)
                return -ENOMEM;
            all->bytes = larger;
            all->room = room;
        }
        memcpy(all->bytes + all->count++ * size, data, size);
        return all->count < AT_ONCE ? 0 : -ECANCELED;
    }

    static struct ring_buffer *ring_of(int map_fd, struct collected *all)
    {
        return ring_buffer__new(map_fd, collect, all, NULL);
    }
    """
    enum:
        ECANCELED

    struct ring_buffer:
        pass

    struct collected:
        char *bytes
        size_t record
        size_t count
        size_t room
        size_t wrong

    ring_buffer *ring_of(int map_fd, collected *all)
    int ring_buffer__consume(ring_buffer *ring)
    int ring_buffer__epoll_fd(const ring_buffer *ring)
    void ring_buffer__free(ring_buffer *ring)
    void free(void *place)
    void *memcpy(void *to, const void *source, size_t size)


cdef class Ring:
    """The reading end of a RINGBUF map, of an object or pinned. Linux 5.8.

    A ring has one reader: a record is seen once, by whoever reads it first. What does not fit into the ring is lost,
    and only the program that writes knows how much.
    """

    cdef ring_buffer *ptr
    cdef collected all
    cdef str name

    def __cinit__(self, map not None):
        cdef int fd = map.fileno()
        forget_log()
        self.name = map.name
        self.ptr = ring_of(fd, &self.all)
        if self.ptr == NULL:
            raise error(errno, f"opening map {self.name} as a ring buffer")

    cdef int alive(self) except -1:
        if self.ptr == NULL:
            raise ValueError("Ring is closed")
        return 0

    def fileno(self):
        """Readable, for poll(2) and its like, when a record is there."""
        self.alive()
        return ring_buffer__epoll_fd(self.ptr)

    def read(self, dtype):
        """The records at hand, oldest first, at most 65,536: shape (n,) of `dtype`; n is 0 where there is none.

        ValueError for a record of another size than the dtype's; that one is lost.
        """
        cdef int result
        cdef uint8_t[::1] place
        dtype = np.dtype(dtype)
        self.alive()
        if dtype.hasobject or dtype.itemsize == 0 or dtype.subdtype is not None:
            raise ValueError(f"{dtype} is no layout of a record")
        # The GIL is kept: two threads in here would mix their records, and copying a full ring takes a millisecond.
        self.all.record, self.all.count, self.all.room, self.all.wrong = dtype.itemsize, 0, 0, 0
        try:
            result = ring_buffer__consume(self.ptr)
            if result < 0 and result != -ECANCELED:
                check(result, f"reading ring buffer {self.name}")
            if self.all.wrong:
                raise ValueError(
                    f"ring buffer {self.name} holds a record of {self.all.wrong} bytes, the dtype has {dtype.itemsize}")
            rows = np.empty(self.all.count, dtype)
            if self.all.count:
                place = rows.view(np.uint8)
                memcpy(&place[0], self.all.bytes, self.all.count * self.all.record)
            return rows
        finally:
            free(self.all.bytes)
            self.all.bytes = NULL

    def close(self):
        if self.ptr != NULL:
            ring_buffer__free(self.ptr)
            self.ptr = NULL

    def __enter__(self):
        self.alive()
        return self

    def __exit__(self, *exception):
        self.close()

    def __del__(self):
        if self.ptr != NULL:
            warnings.warn(f"unclosed Ring of map {self.name}", ResourceWarning, source=self)
            self.close()
