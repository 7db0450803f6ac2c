"""Who sends flows: found by address, version and domain; what is counted of each, and which templates it has."""

import numpy

cimport numpy as cnp
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

cnp.import_array()

MALFORMED = ("header", "version", "length", "set", "template", "data")
MOST_EXPORTERS = 10_000
"""Exporters at most, since senders are easily forged; all further ones are one, of address, version and domain 0, which
has no templates."""
MOST_TEMPLATES = 256
"""Of an exporter."""

cdef enum:
    _EXPORTERS = 10_000
    _SLOTS = 1 << 15  # of the table that finds them: a power of two, three times as many
    _TEMPLATES = 256

EXPORTER = numpy.dtype([
    ("address", "u1", (16,)), ("domain", "u4"), ("version", "u2"), ("followed", "u1"), ("behind", "u1"),
    ("sequence", "u4"), ("due", "u4"), ("late_due", "u4"), ("habit", "i1"), ("reserved", "u1", (3,)), ("heard", "i8"),
    *((name, "u8") for name in ("datagrams", "flows", "octets", "packets", "options", "lost", "late", "unknown")),
    ("malformed", "u8", (len(MALFORMED),)),
])
"""What is counted of an exporter.

address : 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. domain : engine type and id of v5, source id of v9,
observation domain of IPFIX. heard : ms since the epoch. flows, octets, packets : of records; options : records of
options. lost : what is missing by sequence numbers: flows of v5, datagrams of v9, records of IPFIX; a datagram that
comes late, and counts as such, is taken off again. unknown : sets without a template, and templates of whom there are
too many. malformed : datagrams that were not understood to their end, by kind, as MALFORMED names them. followed :
whether `due`, the next sequence number, is known; behind, late_due : datagrams that came late and followed one another,
and what follows them; habit : what the sequence numbers of IPFIX count (sequences.pyx).
"""
assert EXPORTER.itemsize == sizeof(Counts)
assert len(MALFORMED) == MALFORMED_KINDS and MOST_EXPORTERS == _EXPORTERS and MOST_TEMPLATES == _TEMPLATES

cdef cnp.dtype _COUNTS = EXPORTER


cdef inline uint64_t mixed(uint64_t value) noexcept nogil:
    value = (value ^ value >> 32) * <uint64_t>0xD6E8FEB86659FD93
    value = (value ^ value >> 32) * <uint64_t>0xD6E8FEB86659FD93
    return value ^ value >> 32


cdef class Exporters:
    """seed : a number that nobody knows, of where they are found: so that nobody makes all of them collide."""

    def __cinit__(self, uint64_t seed):
        self.seed = seed
        self.counts = <Counts *>calloc(_EXPORTERS + 1, sizeof(Counts))
        self.templates = <Templates *>calloc(_EXPORTERS + 1, sizeof(Templates))
        self.slots = <int32_t *>malloc(_SLOTS * sizeof(int32_t))
        if self.counts == NULL or self.templates == NULL or self.slots == NULL:
            raise MemoryError
        memset(self.slots, 0xFF, _SLOTS * sizeof(int32_t))

    def __dealloc__(self):
        cdef int i
        if self.templates != NULL:
            for i in range(_EXPORTERS + 1):
                free(self.templates[i].known)
        free(self.templates)
        free(self.counts)
        free(self.slots)

    def __len__(self):
        return self.count

    def table(self):
        """EXPORTER: a copy of all of them, by number; the last may stand for many (MOST_EXPORTERS)."""
        copied = numpy.empty(self.count, _COUNTS)
        memcpy(cnp.PyArray_DATA(copied), self.counts, <size_t>self.count * sizeof(Counts))
        return copied

    def replace(self, exporters):
        """Have these (EXPORTER) instead of all there were, without a template."""
        cdef cnp.ndarray given = numpy.ascontiguousarray(exporters)
        cdef int i
        if given.dtype != _COUNTS or given.ndim != 1 or len(given) > _EXPORTERS + 1:
            raise ValueError(f"exporters are an array of {_EXPORTERS + 1:,} EXPORTER at most")
        self.clear_templates()
        self.count = <int>len(given)
        memcpy(self.counts, cnp.PyArray_DATA(given), <size_t>self.count * sizeof(Counts))
        memset(self.slots, 0xFF, _SLOTS * sizeof(int32_t))
        for i in range(self.count):
            self.slots[self.slot(self.counts[i].address, self.counts[i].domain, self.counts[i].version)] = i

    def learn(self, int exporter, uint16_t name, int layout):
        """From now on a template of an exporter means this layout; False where it has too many already."""
        cdef Templates *templates
        cdef void *grown
        cdef int i, room
        if not 0 <= exporter < self.count:
            raise IndexError(f"no exporter {exporter}")
        templates = &self.templates[exporter]
        for i in range(templates.count):
            if templates.known[i].name == name:
                templates.known[i].layout = layout
                return True
        if templates.count == _TEMPLATES:
            return False
        if templates.count == templates.room:
            room = max(2 * templates.room, 4)
            grown = realloc(templates.known, <size_t>room * sizeof(Known))
            if grown == NULL:
                raise MemoryError
            templates.known = <Known *>grown
            templates.room = room
        templates.known[templates.count] = Known(name=name, layout=layout)
        templates.count += 1
        return True

    def withdraw(self, int exporter, uint16_t name):
        """Forget a template, where it is known."""
        cdef Templates *templates
        cdef int i
        if not 0 <= exporter < self.count:
            raise IndexError(f"no exporter {exporter}")
        templates = &self.templates[exporter]
        for i in range(templates.count):
            if templates.known[i].name == name:
                templates.count -= 1
                templates.known[i] = templates.known[templates.count]
                return

    def clear_templates(self):
        """Forget all templates of all."""
        cdef int i
        for i in range(_EXPORTERS + 1):
            self.templates[i].count = 0

    cdef int slot(self, const uint8_t *address, uint32_t domain, int version) noexcept nogil:
        """The place of an exporter, or an empty one where it would be."""
        cdef uint64_t high, low, key
        cdef Counts *counts
        cdef int place
        memcpy(&high, address, 8)
        memcpy(&low, address + 8, 8)
        key = mixed(mixed(self.seed ^ low) + high) + (<uint64_t>domain << 16 | <uint64_t>version)
        place = <int>(mixed(key) & (_SLOTS - 1))
        while self.slots[place] >= 0:
            counts = &self.counts[self.slots[place]]
            if counts.domain == domain and counts.version == version and memcmp(counts.address, address, 16) == 0:
                break
            place = (place + 1) & (_SLOTS - 1)
        return place

    cdef int find(self, const uint8_t *address, uint32_t domain, int version) noexcept nogil:
        """The number of an exporter, known or new."""
        cdef uint8_t[16] nobody
        cdef int place = self.slot(address, domain, version)
        if self.slots[place] >= 0:
            return self.slots[place]
        if self.count >= _EXPORTERS:
            memset(nobody, 0, 16)
            address, domain, version = nobody, 0, 0
            place = self.slot(address, domain, version)
            if self.slots[place] >= 0:
                return self.slots[place]
        memset(&self.counts[self.count], 0, sizeof(Counts))
        memcpy(self.counts[self.count].address, address, 16)
        self.counts[self.count].domain = domain
        self.counts[self.count].version = <uint16_t>version
        self.templates[self.count].count = 0
        self.slots[place] = self.count
        self.count += 1
        return self.count - 1

    cdef int layout(self, int exporter, int name) noexcept nogil:
        """Which layout a template of an exporter means; -1: unknown."""
        cdef Templates *templates = &self.templates[exporter]
        cdef int i
        for i in range(templates.count):
            if templates.known[i].name == name:
                return templates.known[i].layout
        return -1
