"""The way through a batch of NetFlow and IPFIX datagrams, without the GIL, with every length checked.

NetFlow v5: Cisco, NetFlow Collection Engine User Guide, appendix B. NetFlow v9: RFC 3954. IPFIX: RFC 7011. Whose
datagram it is and which layout a set has is known here; what a template says is not: the walk stops where one comes, and
goes on when it has been learnt.
"""

import numpy

cimport numpy as cnp
from fastrecv._flow.columns cimport Columns, Step, Store, number, reserve
from fastrecv._flow.exporters cimport Counts, Exporters, Malformed
from fastrecv._flow.records cimport MOST_STEPS, Layout, Origin, put_records
from fastrecv._flow.sequences cimport not_understood, understood
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy

from fastrecv._flow.columns import STEP
from fastrecv._recv.arena import ENDPOINT

cnp.import_array()

DONE, TEMPLATES, FULL = range(3)
"""Why the walk has stopped: the batch is at its end; templates are to be learnt; the rows are to be taken first."""
META = 4
"""Columns of every schema before those of its fields: number of the exporter, domain, version, ms when received."""
MOST_FIELDS = MOST_STEPS
"""Of a template."""
MOST_ROWS = 1 << 17
"""Rows that a schema gathers at most before they are taken."""

cdef enum Stop:
    _DONE
    _TEMPLATES
    _FULL
    _NO_MEMORY

cdef enum:
    _ROWS = 1 << 17
    _BYTES = 64 << 20  # of all schemas together: a few forged bytes may make many
    _UNTOLD = -1  # how many records a datagram has

cdef cnp.dtype _STEP = STEP


cdef class Walk:
    """Through one batch after the other. exporters : whom they come from. gathered : rows that are to be taken.

    Layout 0 is that of the records of v5, and the caller's to add, as all others.
    """

    cdef readonly Exporters exporters
    cdef Layout *_layouts
    cdef int _layout_count
    cdef list _held  # the Columns of the layouts
    cdef int64_t _bytes
    cdef readonly int64_t gathered

    # The batch
    cdef object _batch
    cdef object _views
    cdef const uint8_t *_data
    cdef const int64_t *_offsets
    cdef const int32_t *_lengths
    cdef const uint8_t *_sources
    cdef int _row, _rows

    # The datagram: where the walk is in it, and what its header says
    cdef bint _within
    cdef const uint8_t *_at
    cdef const uint8_t *_end
    cdef Origin _origin
    cdef uint32_t _sequence
    cdef int64_t _flows, _records
    cdef int _set
    cdef const uint8_t *_found
    cdef int _found_length

    def __cinit__(self, Exporters exporters):
        self.exporters = exporters
        self._held = []

    def __dealloc__(self):
        self.free_layouts()

    cdef void free_layouts(self) noexcept:
        cdef int i
        for i in range(self._layout_count):
            free(self._layouts[i].steps)
        free(self._layouts)
        self._layouts = NULL
        self._layout_count = 0

    # Layouts

    def add_layout(self, steps, Columns columns, uint32_t shortest, uint32_t length):
        """Learn how records of a kind are put; the number of the layout.

        steps : STEP, in the order of the record. columns : where to; None: they are counted as options. shortest :
        bytes of a record at least; length : of every record, 0 where they differ.
        """
        cdef cnp.ndarray given = numpy.ascontiguousarray(steps, dtype=_STEP)
        cdef int count = <int>len(given)
        cdef Store *store = NULL
        cdef Step *kept
        cdef void *grown
        if not 0 < count <= MOST_STEPS or shortest == 0:
            raise ValueError(f"a record has 1 to {MOST_STEPS} fields, and bytes")
        grown = realloc(self._layouts, (<size_t>self._layout_count + 1) * sizeof(Layout))
        if grown == NULL:
            raise MemoryError
        self._layouts = <Layout *>grown
        kept = <Step *>malloc(<size_t>count * sizeof(Step))
        if kept == NULL:
            raise MemoryError
        memcpy(kept, cnp.PyArray_DATA(given), <size_t>count * sizeof(Step))
        if columns is not None:
            store = &columns.store
        self._held.append(columns)
        self._layouts[self._layout_count] = Layout(
            store=store, steps=kept, count=count, shortest=shortest, length=length,
        )
        self._layout_count += 1
        return self._layout_count - 1

    def clear_layouts(self):
        """Forget all of them, and all templates, which refer to them."""
        self.exporters.clear_templates()
        self.free_layouts()
        self._held.clear()

    # The batch

    def begin(self, batch):
        """Take a fastrecv.Batch with sources; it is held until the walk is done with it."""
        views = data, offsets, lengths, sources = batch.data, batch.offsets, batch.lengths, batch.sources
        if sources is None or sources.dtype != ENDPOINT:
            raise TypeError("flows come with the address of who sent them: batches of a UDP socket have it")
        if not self._layout_count:
            raise ValueError("layout 0, of the records of v5, is missing")
        self._batch, self._views = batch, views
        self._data = <const uint8_t *>cnp.PyArray_DATA(data)
        self._offsets = <const int64_t *>cnp.PyArray_DATA(offsets)
        self._lengths = <const int32_t *>cnp.PyArray_DATA(lengths)
        self._sources = <const uint8_t *>cnp.PyArray_DATA(sources)
        self._row, self._rows, self._within = 0, <int>len(batch), False

    def walk(self, int64_t now):
        """Go on through the batch: DONE, TEMPLATES or FULL. now : ms since the epoch."""
        cdef int stop
        self._origin.moment.received = now
        with nogil:
            stop = self.go_on()
        if stop == Stop._NO_MEMORY:
            raise MemoryError
        if stop == Stop._DONE:
            self._batch = self._views = None
            self._row = self._rows = 0
        return stop

    @property
    def found(self):
        """The templates at which the walk has stopped: number of the exporter, version, number of the set, its content."""
        return self._origin.exporter, self._origin.version, self._set, <bytes>self._found[:self._found_length]

    def refuse(self):
        """They make no sense, and so neither does their datagram."""
        self.malformed(Malformed.TEMPLATE)
        self._row += 1

    def taken(self):
        """All rows that were gathered have been taken."""
        self._bytes = self.gathered = 0

    cdef int go_on(self) noexcept nogil:
        cdef int stop
        while self._row < self._rows:
            if not self._within:
                self.enter()
            if self._within:
                stop = self.sets()
                if stop != Stop._DONE:
                    return stop
            self._row += 1
        return Stop._DONE

    # A datagram

    cdef void enter(self) noexcept nogil:
        """Read the header of the next one."""
        cdef const uint8_t *at = self._data + self._offsets[self._row]
        cdef int64_t length = self._lengths[self._row]
        cdef int version = <int>number(at, 2) if length >= 2 else 0
        cdef int header = 24 if version == 5 else 20 if version == 9 else 16 if version == 10 else 0
        cdef uint32_t domain = 0
        cdef int wrong = -1
        cdef Counts *counts
        if length < 2 or length < header:
            wrong, version = Malformed.HEADER, 0
        elif not header:
            wrong, version = Malformed.VERSION, 0
        elif version == 5:
            domain = <uint32_t>number(at + 20, 2)
            if number(at + 2, 2) == 0 or length != 24 + 48 * <int64_t>number(at + 2, 2):
                wrong = Malformed.LENGTH
        else:
            domain = <uint32_t>number(at + header - 4, 4)
            if version == 10 and <int64_t>number(at + 2, 2) != length:
                wrong = Malformed.LENGTH
        # ENDPOINT begins with the address
        self._origin.exporter = self.exporters.find(self._sources + <int64_t>self._row * 24, domain, version)
        self._origin.counts = counts = &self.exporters.counts[self._origin.exporter]
        counts.datagrams += 1
        counts.heard = self._origin.moment.received
        self._origin.version, self._flows, self._records, self._within = version, 0, 0, True
        if wrong >= 0:
            self.malformed(wrong)
            return
        self._at, self._end = at + header, at + length
        self.clock(at)

    cdef void clock(self, const uint8_t *at) noexcept nogil:
        """The times and the sequence number of a header."""
        cdef uint64_t part
        if self._origin.version == 10:
            self._origin.moment.exported, self._origin.moment.uptime = <int64_t>number(at + 4, 4) * 1000, 0
            self._sequence = <uint32_t>number(at + 8, 4)
            return
        self._origin.moment.uptime = <uint32_t>number(at + 4, 4)
        self._origin.moment.exported = <int64_t>number(at + 8, 4) * 1000
        if self._origin.version == 5:
            part = number(at + 12, 4)
            self._origin.moment.exported += <int64_t>(part // 1000000) if part < 1000000000 else 0
            self._sequence = <uint32_t>number(at + 16, 4)
        else:
            self._sequence = <uint32_t>number(at + 12, 4)

    cdef int sets(self) noexcept nogil:
        """Go on through its sets."""
        cdef Counts *counts = self._origin.counts
        cdef int64_t length
        cdef int stop, name, layout
        if self._origin.version == 5:
            stop = self.records(0, self._end - self._at)
            if stop == Stop._DONE and self._within:
                self.leave()
            return stop
        while self._at < self._end:
            name, length = 0, 0
            if self._end - self._at >= 4:
                name, length = <int>number(self._at, 2), <int64_t>number(self._at + 2, 2)
            if not 4 <= length <= self._end - self._at or not self.numbered(name):
                self.malformed(Malformed.SET)
                return Stop._DONE
            self._at += 4
            if name < 256 and counts.version:
                self._set, self._found, self._found_length = name, self._at, <int>length - 4
                self._at += length - 4
                return Stop._TEMPLATES
            layout = self.exporters.layout(self._origin.exporter, name)  # none where it stands for many
            if layout < 0:
                counts.unknown += 1
                self._records = _UNTOLD
            else:
                stop = self.records(layout, length - 4)
                if stop != Stop._DONE:
                    self._at -= 4
                    return stop
                if not self._within:
                    return Stop._DONE
            self._at += length - 4
        self.leave()
        return Stop._DONE

    cdef bint numbered(self, int name) noexcept nogil:
        """Whether a set may have this number: of templates, of options templates, or of a template."""
        cdef int first = 2 if self._origin.version == 10 else 0
        return name == first or name == first + 1 or name >= 256

    cdef void leave(self) noexcept nogil:
        """The datagram was understood to its end."""
        cdef Counts *counts = self._origin.counts
        self._within = False
        understood(counts, self._sequence, self._records, self._flows)

    cdef void malformed(self, int kind) noexcept nogil:
        """It ends here."""
        cdef Counts *counts = self._origin.counts
        counts.malformed[kind] += 1
        self._within = False
        not_understood(counts, self._sequence)

    # Records

    cdef int records(self, int number_of_layout, int64_t length) noexcept nogil:
        """Put the records of a set; less than a record at its end is padding."""
        cdef const Layout *layout = &self._layouts[number_of_layout]
        cdef Counts *counts = self._origin.counts
        cdef int64_t most = length // layout.shortest
        cdef int64_t before = 0
        cdef int64_t rows
        if most == 0:
            self.malformed(Malformed.DATA)
            return Stop._DONE
        if layout.store != NULL:
            if self._bytes > _BYTES or (layout.store.rows and layout.store.rows + most > _ROWS):
                return Stop._FULL
            if reserve(layout.store, most) < 0:
                return Stop._NO_MEMORY
            before = layout.store.rows
        rows = put_records(layout, &self._origin, self._at, length, &self._bytes)
        if layout.store != NULL:
            self._flows += layout.store.rows - before
            self.gathered += layout.store.rows - before
        if rows == -2:
            return Stop._NO_MEMORY
        if rows < 0:
            self.malformed(Malformed.DATA)
            return Stop._DONE
        if self._records != _UNTOLD:
            self._records += rows
        if layout.store == NULL:
            counts.options += <uint64_t>rows
        return Stop._DONE
