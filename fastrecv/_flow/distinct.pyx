"""Distinct numbers: many rows have few addresses, each of which is to be written once."""

import secrets

import numpy

cimport cython
cimport numpy as cnp
from fastrecv._flow.memory cimport Memory, claim, give_back
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memset

cnp.import_array()

cdef enum:
    _LEAST = 12  # logarithm of the entries of a table at first

cdef struct Entry:
    # place : of the number among the distinct ones, from 1; 0: the entry is free.
    uint32_t number
    uint32_t place

# Whoever sends may choose the numbers: not knowing these he cannot choose those that meet in one entry. One of them alone
# would put neighbouring addresses into neighbouring entries, in a process in some hundred.
cdef uint64_t _FIRST = secrets.randbits(64) | 1
cdef uint64_t _SECOND = secrets.randbits(64) | 1


@cython.final
cdef class Table:
    """Entries by two rounds of a multiplicative hash, the next free one where two meet; half of them are free."""

    cdef Entry *entries
    cdef int bits

    def __dealloc__(self):
        give_back(self.entries, sizeof(Entry) << self.bits)

    cdef int begin(self, int bits) except -1:
        """Be empty, with room for 2 ** (bits - 1) numbers."""
        give_back(self.entries, sizeof(Entry) << self.bits)
        self.bits = bits
        self.entries = <Entry *>claim(sizeof(Entry) << bits)
        if self.entries == NULL:
            raise MemoryError
        memset(self.entries, 0, sizeof(Entry) << bits)
        return 0

    cdef inline Entry *find(self, uint32_t number) noexcept nogil:
        """The entry of a number, or the free one that is to be."""
        cdef uint64_t mask = (<uint64_t>1 << self.bits) - 1
        cdef uint64_t mixed = number * _FIRST
        cdef uint64_t at = (mixed ^ mixed >> 32) * _SECOND >> (64 - self.bits)
        while self.entries[at].place and self.entries[at].number != number:
            at = at + 1 & mask
        return &self.entries[at]


def distinct(const uint32_t[::1] numbers):
    """(places, found): what differs among numbers, in the order of appearance, and which each of them is: int32, uint32."""
    cdef int64_t rows = numbers.shape[0], at = 0
    cdef Table table = Table()
    cdef Memory memory = Memory()
    cdef int32_t *places
    cdef uint32_t[::1] kept
    cdef uint32_t count = 0
    cdef int64_t room = 1
    while room < rows:
        room *= 2
    places = <int32_t *>claim(4 * room)
    if places == NULL:
        raise MemoryError
    memory.hold(places, 4 * rows, 4 * room)
    found = numpy.empty(rows, "u4")
    kept = found
    table.begin(_LEAST)
    while at < rows:
        with nogil:
            at = encode(table, numbers, at, places, kept, &count)
        if at < rows:
            table.begin(table.bits + 2)
            refill(table, kept, count)
    return memory, found[:count].copy()


cdef int64_t encode(
    Table table, const uint32_t[::1] numbers, int64_t at, int32_t *places, uint32_t[::1] found, uint32_t *count,
) noexcept nogil:
    """Go on from a row until the end, or until the table is half full: up to where."""
    cdef uint32_t most = <uint32_t>1 << (table.bits - 1)
    cdef uint32_t seen = count[0], number
    cdef Entry *entry
    while at < numbers.shape[0] and seen < most:
        number = numbers[at]
        entry = table.find(number)
        if not entry.place:
            found[seen] = number
            seen += 1
            entry.number, entry.place = number, seen
        places[at] = <int32_t>(entry.place - 1)
        at += 1
    count[0] = seen
    return at


cdef void refill(Table table, const uint32_t[::1] found, uint32_t count) noexcept nogil:
    cdef Entry *entry
    cdef uint32_t i
    for i in range(count):
        entry = table.find(found[i])
        entry.number, entry.place = found[i], i + 1
