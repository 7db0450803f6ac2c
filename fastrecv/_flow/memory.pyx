"""Memory of columns: given away as buffers, and used again when nobody looks at them any more.

A page that is new costs more than to fill it: the kernel clears it, and the host of a virtual machine may have to find
it first. All of this is done under the GIL, which is what keeps the list of spares whole.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc

cdef enum:
    _SIZES = 48
    _LEAST = 1 << 15  # bytes: less is malloc's own matter
    _MOST = 64 << 20  # bytes of spares together

cdef void *_spares[_SIZES]  # by the logarithm of their size; each begins with the place of the next
cdef int64_t _spare_bytes = 0


cdef int size_of(int64_t room) noexcept:
    """The logarithm of a size that is worth keeping, -1 of another."""
    cdef int size = 0
    if room < _LEAST or room & (room - 1):
        return -1
    while room >> size > 1:
        size += 1
    return size if size < _SIZES else -1


cdef void *claim(int64_t room):
    """So many bytes, which may be of any content; NULL without memory."""
    global _spare_bytes
    cdef int size = size_of(room)
    cdef void *at
    if size < 0 or _spares[size] == NULL:
        return malloc(<size_t>room)
    at = _spares[size]
    _spares[size] = (<void **>at)[0]
    _spare_bytes -= room
    return at


cdef void give_back(void *at, int64_t room):
    """What claim() or realloc() has given, with its size."""
    global _spare_bytes
    cdef int size = size_of(room)
    if at == NULL or size < 0 or room > _MOST:
        free(at)
        return
    if _spare_bytes + room > _MOST:
        free_all()
    (<void **>at)[0] = _spares[size]
    _spares[size] = at
    _spare_bytes += room


cdef void free_all() noexcept:
    """When there is no room for more: sizes that nobody asks for any more are not to keep it for good."""
    global _spare_bytes
    cdef void *at
    cdef int size
    for size in range(_SIZES):
        while _spares[size] != NULL:
            at = _spares[size]
            _spares[size] = (<void **>at)[0]
            free(at)
    _spare_bytes = 0


cdef class Memory:
    """Bytes by the buffer protocol, none at first; given back with the last who looks at them."""

    cdef void hold(self, void *at, int64_t length, int64_t room) noexcept:
        """The first `length` bytes of what claim() or realloc() has given."""
        self.at, self.length, self.room = at, <Py_ssize_t>length, room

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.at, self.length, 1, flags)

    def __len__(self):
        return self.length

    def __dealloc__(self):
        give_back(self.at, self.room)
