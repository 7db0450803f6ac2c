"""Records of a set into columns, a field at a time where all are of one length; what they sum up to is counted."""

from fastrecv._flow.columns cimport Column, Kind, Total, fill, number, put, repeat, reserve_bytes
from libc.stdint cimport uint64_t

cdef enum:
    _ANY = 65535  # a length in a template: RFC 7011, 7


cdef int64_t put_records(
    const Layout *layout, const Origin *origin, const uint8_t *at, int64_t length, int64_t *used,
) noexcept nogil:
    """Put the records of so many bytes, for which there is room; how many, -1 where one goes beyond, -2 without memory.

    used : grows by the bytes of the columns that they take. Where one fails those before it stay, and are counted.
    """
    if layout.length:
        return alike(layout, origin, at, length // layout.shortest, used)
    return unlike(layout, origin, at, at + length, used)


cdef int64_t alike(
    const Layout *layout, const Origin *origin, const uint8_t *at, int64_t rows, int64_t *used,
) noexcept nogil:
    """Records of one length."""
    cdef Store *store = layout.store
    cdef const Step *step
    cdef Column *column
    cdef int i
    if store == NULL:
        return rows
    begin_rows(store, origin, rows)
    for i in range(layout.count):
        step = &layout.steps[i]
        if step.column < 0:
            continue
        column = &store.columns[step.column]
        if step.kind == Kind.VARIABLE:
            if reserve_bytes(column, rows * step.length) < 0:
                return -2
            used[0] += rows * step.length
        fill(step, column, store.rows, at + step.offset, layout.length, rows, &origin.moment)
    end_rows(layout, origin.counts, rows, used)
    return rows


cdef int64_t unlike(
    const Layout *layout, const Origin *origin, const uint8_t *at, const uint8_t *end, int64_t *used,
) noexcept nogil:
    """Records whose lengths differ."""
    cdef const uint8_t *places[MOST_STEPS]
    cdef int lengths[MOST_STEPS]
    cdef int64_t rows = 0
    while end - at >= layout.shortest:
        at = measure(layout, at, end, places, lengths)
        if at == NULL:
            return -1
        if layout.store != NULL and put_one(layout, origin, places, lengths, used) < 0:
            return -2
        rows += 1
    return rows


cdef int put_one(
    const Layout *layout, const Origin *origin, const uint8_t **places, const int *lengths, int64_t *used,
) noexcept nogil:
    cdef Store *store = layout.store
    cdef const Step *step
    cdef int i
    begin_rows(store, origin, 1)
    for i in range(layout.count):
        step = &layout.steps[i]
        if step.column < 0:
            continue
        if step.kind == Kind.VARIABLE:
            if reserve_bytes(&store.columns[step.column], lengths[i]) < 0:
                return -1
            used[0] += lengths[i]
        put(step, &store.columns[step.column], store.rows, places[i], lengths[i], &origin.moment)
    end_rows(layout, origin.counts, 1, used)
    return 0


cdef void begin_rows(Store *store, const Origin *origin, int64_t rows) noexcept nogil:
    """The columns that every schema has, of rows whose values are put next."""
    repeat(&store.columns[0], store.rows, <uint64_t>origin.exporter, rows)
    repeat(&store.columns[1], store.rows, origin.counts.domain, rows)
    repeat(&store.columns[2], store.rows, <uint64_t>origin.version, rows)
    repeat(&store.columns[3], store.rows, <uint64_t>origin.moment.received, rows)


cdef void end_rows(const Layout *layout, Counts *counts, int64_t rows, int64_t *used) noexcept nogil:
    """Count rows whose values have been put."""
    cdef const uint64_t *values
    cdef uint64_t total
    cdef int64_t row
    cdef int i
    for i in range(layout.count):
        if layout.steps[i].total != Total.NOTHING:
            values = <const uint64_t *>layout.store.columns[layout.steps[i].column].data + layout.store.rows
            total = 0
            for row in range(rows):
                total += values[row]
            if layout.steps[i].total == Total.IN_OCTETS:
                counts.octets += total
            else:
                counts.packets += total
    layout.store.rows += rows
    counts.flows += <uint64_t>rows
    used[0] += rows * layout.store.width


cdef const uint8_t *measure(
    const Layout *layout, const uint8_t *at, const uint8_t *end, const uint8_t **places, int *lengths,
) noexcept nogil:
    """Where the fields of a record are, and how long; its end, NULL where that is beyond the set."""
    cdef int i
    cdef int64_t length
    for i in range(layout.count):
        length = layout.steps[i].length
        if length == _ANY:  # a byte says its length, or is 255 and two say it
            if end - at < 1:
                return NULL
            length = at[0]
            at += 1
            if length == 255:
                if end - at < 2:
                    return NULL
                length = <int64_t>number(at, 2)
                at += 2
        if end - at < length:
            return NULL
        places[i], lengths[i] = at, <int>length
        at += length
    return at
