"""Columns that grow while records are put into them, and are given away without a copy.

Records have their fields beside one another and in network order; a column has one field of all records, in the order
of this machine. What is put is of a length that the caller has checked.
"""

import numpy

from fastrecv._flow.memory cimport Memory, claim
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy

STEP = numpy.dtype([("offset", "u4"), ("length", "u2"), ("kind", "u1"), ("total", "u1"), ("column", "i4")])
assert STEP.itemsize == sizeof(Step)
KINDS = {
    "unsigned": Kind.UNSIGNED, "signed": Kind.SIGNED, "float": Kind.FLOAT, "octets": Kind.OCTETS,
    "millis": Kind.MILLIS, "uptime": Kind.UPTIME, "micros": Kind.MICROS, "nanos": Kind.NANOS,
    "variable": Kind.VARIABLE,
}

cdef enum:
    _LEAST = 1024  # rows that a column has room for at first
    _LEAST_BYTES = 16384
    _NTP_EPOCH = 2208988800  # seconds from 1900 to 1970: RFC 5905, figure 4
cdef int64_t _LATEST = 253402300799999  # ms: the last of year 9999, the end of most calendars


cdef extern from "<endian.h>" nogil:
    uint16_t be16toh(uint16_t value)
    uint32_t be32toh(uint32_t value)
    uint64_t be64toh(uint64_t value)


cdef bint claim_all(Store *store, int64_t rows) noexcept with gil:
    """Memory for so many rows, for columns that have none; False where there is none."""
    cdef int i
    for i in range(store.count):
        if store.columns[i].width and store.columns[i].data == NULL:
            store.columns[i].data = <uint8_t *>claim(rows * store.columns[i].width)
            if store.columns[i].data == NULL:
                return False
    return True


cdef int reserve(Store *store, int64_t rows) noexcept nogil:
    """Room for so many rows more; -1 without memory."""
    cdef int64_t room = store.room if store.room else _LEAST
    cdef Column *column
    cdef void *grown
    cdef int i
    if store.rows and store.rows + rows <= store.room:
        return 0
    while room < store.rows + rows:
        room *= 2
    if store.rows == 0 and not claim_all(store, room):
        return -1
    for i in range(store.count):
        column = &store.columns[i]
        if column.width and room > store.room:
            grown = realloc(column.data, <size_t>(room * column.width))
            if grown == NULL:
                return -1
            column.data = <uint8_t *>grown
        elif not column.width:
            grown = realloc(column.offsets, <size_t>((room + 1) * 4))
            if grown == NULL:
                return -1
            column.offsets = <int32_t *>grown
            if store.rows == 0:
                column.offsets[0] = 0
    store.room = room
    return 0


cdef int reserve_bytes(Column *column, int64_t length) noexcept nogil:
    """Room for so many bytes more in a column of any length; -1 without memory."""
    cdef int64_t room = column.room if column.room else _LEAST_BYTES
    cdef void *grown
    if column.data != NULL and column.used + length <= column.room:
        return 0
    while room < column.used + length:
        room *= 2
    grown = realloc(column.data, <size_t>room)
    if grown == NULL:
        return -1
    column.data = <uint8_t *>grown
    column.room = room
    return 0


cdef class Columns:
    """Rows that are being gathered. widths : bytes of a value of each column, 0 for those of any length."""

    def __cinit__(self, widths):
        cdef int i
        self.store.count = <int>len(widths)
        self.store.columns = <Column *>calloc(<size_t>max(len(widths), 1), sizeof(Column))
        if self.store.columns == NULL:
            raise MemoryError
        for i in range(self.store.count):
            self.store.columns[i].width = widths[i]
            self.store.width += widths[i] or 4

    def __dealloc__(self):
        cdef int i
        if self.store.columns != NULL:
            for i in range(self.store.count):
                free(self.store.columns[i].data)
                free(self.store.columns[i].offsets)
            free(self.store.columns)

    def __len__(self):
        return self.store.rows

    def take(self):
        """What was gathered, at least a row, and begin anew: how many rows, and each column: bytes, or (offsets, bytes)."""
        cdef int64_t rows = self.store.rows
        cdef Column *column
        cdef int i
        if rows == 0:
            raise ValueError("nothing was gathered")
        # What may fail comes first: halfway some columns would be without memory.
        taken = [Memory() if self.store.columns[i].width else (Memory(), Memory()) for i in range(self.store.count)]
        for i in range(self.store.count):
            column = &self.store.columns[i]
            if column.width:
                (<Memory>taken[i]).hold(column.data, rows * column.width, self.store.room * column.width)
            else:
                offsets, data = taken[i]
                (<Memory>offsets).hold(column.offsets, (rows + 1) * 4, (self.store.room + 1) * 4)
                (<Memory>data).hold(column.data, column.used, column.room)
                column.offsets = NULL
                column.used = column.room = 0
            column.data = NULL
        if rows < self.store.room // 4:
            self.store.room //= 2
        self.store.rows = 0
        return rows, taken


cdef uint64_t number(const uint8_t *at, int length) noexcept nogil:
    cdef uint64_t value = 0
    cdef int i
    for i in range(length):
        value = value << 8 | at[i]
    return value


cdef inline int64_t instant(const Step *step, const uint8_t *at, int length, const Moment *moment) noexcept nogil:
    """A point in time, in the unit of its kind."""
    cdef uint64_t value = number(at, length)
    cdef int64_t seconds
    cdef uint64_t fraction
    if step.kind == Kind.UPTIME:
        return moment.exported - <int32_t>(moment.uptime - <uint32_t>value)
    if step.kind == Kind.MILLIS:
        return <int64_t>value if value < <uint64_t>_LATEST else _LATEST
    seconds = <int64_t>(value >> 32) - _NTP_EPOCH
    fraction = <uint32_t>value
    if step.kind == Kind.MICROS:
        return seconds * 1000000 + <int64_t>(fraction * 1000000 >> 32)
    return seconds * 1000000000 + <int64_t>(fraction * 1000000000 >> 32)


cdef inline uint64_t signed(const uint8_t *at, int length) noexcept nogil:
    cdef uint64_t value = number(at, length)
    if length < 8 and at[0] & 0x80:
        value |= ~<uint64_t>0 << (8 * length)
    return value


cdef inline void store(uint8_t *to, uint64_t value, int width) noexcept nogil:
    if width == 8:
        (<uint64_t *>to)[0] = value
    elif width == 4:
        (<uint32_t *>to)[0] = <uint32_t>value
    elif width == 2:
        (<uint16_t *>to)[0] = <uint16_t>value
    else:
        to[0] = <uint8_t>value


cdef void put(
    const Step *step, Column *column, int64_t row, const uint8_t *at, int length, const Moment *moment,
) noexcept nogil:
    """Put one value."""
    cdef uint8_t *to = column.data + row * column.width
    cdef uint32_t narrow
    cdef float half
    cdef double whole
    if step.kind == Kind.VARIABLE:
        memcpy(column.data + column.used, at, <size_t>length)
        column.used += length
        column.offsets[row + 1] = <int32_t>column.used
    elif step.kind == Kind.OCTETS:
        memcpy(to, at, <size_t>length)
    elif step.kind == Kind.UNSIGNED:
        store(to, number(at, length), column.width)
    elif step.kind == Kind.SIGNED:
        store(to, signed(at, length), column.width)
    elif step.kind == Kind.FLOAT:
        if length == column.width:
            store(to, number(at, length), length)
        else:
            narrow = <uint32_t>number(at, 4)
            memcpy(&half, &narrow, 4)
            whole = half
            memcpy(to, &whole, 8)
    else:
        store(to, <uint64_t>instant(step, at, length, moment), 8)


cdef void fill(
    const Step *step, Column *column, int64_t row, const uint8_t *at, int64_t stride, int64_t rows, const Moment *moment,
) noexcept nogil:
    """Put the values of so many records, which are `stride` bytes apart."""
    cdef uint8_t *to = column.data + row * column.width
    cdef int64_t i
    cdef uint16_t two
    cdef uint32_t four
    cdef uint64_t eight
    cdef bint plain = step.kind == Kind.UNSIGNED and column.width == step.length
    if plain and step.length == 4:
        for i in range(rows):
            memcpy(&four, at + i * stride, 4)
            (<uint32_t *>to)[i] = be32toh(four)
    elif plain and step.length == 2:
        for i in range(rows):
            memcpy(&two, at + i * stride, 2)
            (<uint16_t *>to)[i] = be16toh(two)
    elif plain and step.length == 1:
        for i in range(rows):
            to[i] = at[i * stride]
    elif plain and step.length == 8:
        for i in range(rows):
            memcpy(&eight, at + i * stride, 8)
            (<uint64_t *>to)[i] = be64toh(eight)
    elif step.kind == Kind.UNSIGNED and step.length == 4 and column.width == 8:
        for i in range(rows):
            memcpy(&four, at + i * stride, 4)
            (<uint64_t *>to)[i] = be32toh(four)
    elif step.kind == Kind.UNSIGNED and step.length == 2 and column.width == 4:
        for i in range(rows):
            memcpy(&two, at + i * stride, 2)
            (<uint32_t *>to)[i] = be16toh(two)
    elif step.kind == Kind.UNSIGNED and step.length == 1 and column.width == 2:
        for i in range(rows):
            (<uint16_t *>to)[i] = at[i * stride]
    elif step.kind == Kind.UPTIME and step.length == 4:
        for i in range(rows):
            memcpy(&four, at + i * stride, 4)
            (<int64_t *>to)[i] = moment.exported - <int32_t>(moment.uptime - be32toh(four))
    else:
        for i in range(rows):
            put(step, column, row + i, at + i * stride, step.length, moment)


cdef void repeat(Column *column, int64_t row, uint64_t value, int64_t rows) noexcept nogil:
    """Put the same value so many times, into a column of 1, 4 or 8 bytes."""
    cdef uint8_t *to = column.data + row * column.width
    cdef int64_t i
    if column.width == 8:
        for i in range(rows):
            (<uint64_t *>to)[i] = value
    elif column.width == 4:
        for i in range(rows):
            (<uint32_t *>to)[i] = <uint32_t>value
    else:
        for i in range(rows):
            to[i] = <uint8_t>value
