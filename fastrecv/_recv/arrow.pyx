"""Batches for Arrow libraries: the C data interface in PyCapsules, without any of those libraries.

https://arrow.apache.org/docs/format/CDataInterface/PyCapsuleInterface.html. A consumer may keep, move and release each
column by itself, from any thread, so each column holds the lease for itself and frees what was made for it alone.
"""

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from fastrecv._recv.arena cimport Arena, Endpoint, Lease, copied
from libc.errno cimport ENOMEM
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset, strcmp


cdef enum Kind:
    # How a column comes to be.
    VIEWS    # binary views of the datagrams
    PACKED   # the datagrams of an arena without gaps
    SHARED   # the arena's own column
    MOMENTS  # the same, but 0 is null
    ADDRESSES
    PORTS
    SCOPES   # of endpoints


cdef struct Field:
    Kind kind
    const char *name
    const char *format
    const void *column


cdef enum:
    _FIELDS = 10
    _INLINE = 12  # bytes of a binary view that stand in the view itself


cdef struct View:
    # An item of a binary view; a datagram of up to 12 bytes stands in it whole, from `prefix` on.
    int32_t length
    uint8_t prefix[4]
    int32_t buffer
    int32_t offset


cdef struct Holder:
    # private_data of a column: what it keeps alive, and what was made for it.
    PyObject *lease
    const void *buffers[4]
    void *made
    int64_t sizes[1]


cdef int add(Field *fields, int n, Kind kind, const char *name, const char *format, const void *column) noexcept nogil:
    if column == NULL:
        return n
    fields[n].kind, fields[n].name, fields[n].format, fields[n].column = kind, name, format, column
    return n + 1


cdef int fields_of(const Arena *arena, bint packed, Field *fields) noexcept nogil:
    """Which columns there are; how many."""
    cdef int n = 0
    n = add(fields, n, Kind.PACKED if packed else Kind.VIEWS, b"payload", b"z" if packed else b"vz", arena.data)
    n = add(fields, n, Kind.SHARED, b"length", b"i", arena.lengths)
    n = add(fields, n, Kind.ADDRESSES, b"source_address", b"w:16", arena.sources)
    n = add(fields, n, Kind.PORTS, b"source_port", b"S", arena.sources)
    n = add(fields, n, Kind.ADDRESSES, b"destination_address", b"w:16", arena.destinations)
    n = add(fields, n, Kind.PORTS, b"destination_port", b"S", arena.destinations)
    n = add(fields, n, Kind.SCOPES, b"interface", b"I", arena.destinations)
    n = add(fields, n, Kind.MOMENTS, b"timestamp", b"tsn:UTC", arena.timestamps)
    n = add(fields, n, Kind.MOMENTS, b"hardware_timestamp", b"tsn:UTC", arena.hardware)
    return add(fields, n, Kind.SHARED, b"tos", b"C", arena.tos)


cdef void release_array(ArrowArray *array) noexcept nogil:
    cdef Holder *holder = <Holder *>array.private_data
    cdef int64_t i
    for i in range(array.n_children):
        if array.children[i] != NULL:
            if array.children[i].release != NULL:  # not moved elsewhere
                array.children[i].release(array.children[i])
            free(array.children[i])
    free(array.children)
    free(holder.made)
    if holder.lease != NULL:
        with gil:
            Py_DECREF(<object>holder.lease)
    free(holder)
    array.release = NULL


cdef Holder *begin_array(ArrowArray *array, int64_t rows, int buffers) noexcept nogil:
    """Make `array` one that can be released; NULL without memory."""
    cdef Holder *holder = <Holder *>calloc(1, sizeof(Holder))
    if holder == NULL:
        return NULL
    memset(array, 0, sizeof(ArrowArray))
    array.length = rows
    array.n_buffers = buffers
    array.buffers = holder.buffers
    array.private_data = holder
    array.release = release_array
    return holder


cdef void *make(Holder *holder, size_t size) noexcept nogil:
    """Zeroed memory that ends with the column; at least a byte, so that NULL always means that there is none."""
    holder.made = calloc(size + 1, 1)
    return holder.made


cdef int fill_views(const Arena *arena, Holder *holder) noexcept nogil:
    cdef View *views = <View *>make(holder, sizeof(View) * <size_t>arena.rows)
    cdef const uint8_t *datagram
    cdef int64_t first, end
    cdef int row
    if views == NULL:
        return -1
    # From the first datagram to the end of the last: what lies around them is no business of the consumer's.
    first = arena.offsets[0] if arena.rows else 0
    end = arena.offsets[arena.rows - 1] + arena.lengths[arena.rows - 1] if arena.rows else 0
    for row in range(arena.rows):
        datagram = arena.data + arena.offsets[row]
        views[row].length = arena.lengths[row]
        if arena.lengths[row] <= _INLINE:
            memcpy(<uint8_t *>&views[row] + 4, datagram, <size_t>arena.lengths[row])
        else:
            memcpy(views[row].prefix, datagram, 4)
            views[row].offset = <int32_t>(arena.offsets[row] - first)  # arenas stay below 2 GiB
    holder.sizes[0] = end - first
    holder.buffers[1] = views
    holder.buffers[2] = arena.data + first
    holder.buffers[3] = holder.sizes
    return 0


cdef int fill_packed(const Arena *arena, Holder *holder) noexcept nogil:
    """Offsets alone: the datagrams of a copied arena lie one behind the other."""
    cdef int32_t *offsets = <int32_t *>make(holder, sizeof(int32_t) * <size_t>(arena.rows + 1))
    cdef int row
    if offsets == NULL:
        return -1
    for row in range(arena.rows):
        offsets[row + 1] = offsets[row] + arena.lengths[row]
    holder.buffers[1] = offsets
    holder.buffers[2] = arena.data
    return 0


cdef int fill_moments(const Arena *arena, const int64_t *moments, ArrowArray *array, Holder *holder) noexcept nogil:
    cdef uint8_t *valid
    cdef int row
    for row in range(arena.rows):
        array.null_count += moments[row] == 0
    if array.null_count:
        valid = <uint8_t *>make(holder, <size_t>(arena.rows + 7) // 8)
        if valid == NULL:
            return -1
        for row in range(arena.rows):
            if moments[row]:
                valid[row // 8] |= <uint8_t>(1 << row % 8)
        holder.buffers[0] = valid
    holder.buffers[1] = moments
    return 0


cdef int fill_endpoints(const Arena *arena, const Field *field, Holder *holder) noexcept nogil:
    cdef const Endpoint *endpoints = <const Endpoint *>field.column
    cdef uint8_t *made = <uint8_t *>make(holder, 16 * <size_t>arena.rows)
    cdef int row
    if made == NULL:
        return -1
    for row in range(arena.rows):
        if field.kind == Kind.ADDRESSES:
            memcpy(made + 16 * row, endpoints[row].address, 16)
        elif field.kind == Kind.PORTS:
            (<uint16_t *>made)[row] = endpoints[row].port
        else:
            (<uint32_t *>made)[row] = endpoints[row].scope
    holder.buffers[1] = made
    return 0


cdef int export_array(PyObject *lease, const Arena *arena, bint packed, ArrowArray *array) noexcept nogil:
    """A struct array with a column for each field; 0, or ENOMEM with nothing left to release."""
    cdef Field[_FIELDS] fields
    cdef int i, n = fields_of(arena, packed, fields)
    cdef Holder *holder = begin_array(array, arena.rows, 1)
    if holder == NULL:
        return ENOMEM
    array.children = <ArrowArray **>calloc(<size_t>n, sizeof(void *))
    if array.children != NULL:
        array.n_children = n
        for i in range(n):
            array.children[i] = <ArrowArray *>calloc(1, sizeof(ArrowArray))
            if array.children[i] == NULL or export_column(lease, arena, &fields[i], array.children[i]) < 0:
                break
        else:
            return 0
    release_array(array)
    return ENOMEM


cdef int export_column(PyObject *lease, const Arena *arena, const Field *field, ArrowArray *array) noexcept nogil:
    cdef int buffers = 4 if field.kind == Kind.VIEWS else 3 if field.kind == Kind.PACKED else 2
    cdef Holder *holder = begin_array(array, arena.rows, buffers)
    if holder == NULL:
        return -1
    with gil:
        Py_INCREF(<object>lease)
    holder.lease = lease
    if field.kind == Kind.VIEWS:
        return fill_views(arena, holder)
    if field.kind == Kind.PACKED:
        return fill_packed(arena, holder)
    if field.kind == Kind.MOMENTS:
        return fill_moments(arena, <const int64_t *>field.column, array, holder)
    if field.kind == Kind.SHARED:
        holder.buffers[1] = field.column
        return 0
    return fill_endpoints(arena, field, holder)


cdef void release_schema(ArrowSchema *schema) noexcept nogil:
    cdef int64_t i
    for i in range(schema.n_children):
        if schema.children[i] != NULL:
            if schema.children[i].release != NULL:
                schema.children[i].release(schema.children[i])
            free(schema.children[i])
    free(schema.children)
    schema.release = NULL


cdef void begin_schema(ArrowSchema *schema, const char *name, const char *format, bint nullable) noexcept nogil:
    memset(schema, 0, sizeof(ArrowSchema))
    schema.name, schema.format = name, format  # constants of this module
    schema.flags = ARROW_FLAG_NULLABLE if nullable else 0
    schema.release = release_schema


cdef int export_schema(const Arena *arena, bint packed, ArrowSchema *schema) noexcept nogil:
    """0, or ENOMEM with nothing left to release."""
    cdef Field[_FIELDS] fields
    cdef int i, n = fields_of(arena, packed, fields)
    begin_schema(schema, b"", b"+s", False)
    schema.children = <ArrowSchema **>calloc(<size_t>n, sizeof(void *))
    if schema.children != NULL:
        schema.n_children = n
        for i in range(n):
            schema.children[i] = <ArrowSchema *>calloc(1, sizeof(ArrowSchema))
            if schema.children[i] == NULL:
                break
            begin_schema(schema.children[i], fields[i].name, fields[i].format, fields[i].kind == Kind.MOMENTS)
        else:
            return 0
    release_schema(schema)
    return ENOMEM


cdef struct Stream:
    # private_data of a stream of one batch.
    PyObject *lease
    const Arena *arena
    bint packed
    bint given


cdef int stream_schema(ArrowArrayStream *stream, ArrowSchema *schema) noexcept nogil:
    cdef Stream *state = <Stream *>stream.private_data
    return export_schema(state.arena, state.packed, schema)


cdef int stream_next(ArrowArrayStream *stream, ArrowArray *array) noexcept nogil:
    cdef Stream *state = <Stream *>stream.private_data
    cdef int result
    if state.given:
        memset(array, 0, sizeof(ArrowArray))  # released: the end of the stream
        return 0
    result = export_array(state.lease, state.arena, state.packed, array)
    state.given = result == 0
    return result


cdef const char *stream_error(ArrowArrayStream *stream) noexcept nogil:
    return b"no memory"


cdef void release_stream(ArrowArrayStream *stream) noexcept nogil:
    cdef Stream *state = <Stream *>stream.private_data
    with gil:
        Py_DECREF(<object>state.lease)
    free(state)
    stream.release = NULL


cdef void drop_schema(object capsule) noexcept:
    cdef ArrowSchema *schema = <ArrowSchema *>PyCapsule_GetPointer(capsule, b"arrow_schema")
    if schema.release != NULL:  # nobody took it
        schema.release(schema)
    free(schema)


cdef void drop_array(object capsule) noexcept:
    cdef ArrowArray *array = <ArrowArray *>PyCapsule_GetPointer(capsule, b"arrow_array")
    if array.release != NULL:
        array.release(array)
    free(array)


cdef void drop_stream(object capsule) noexcept:
    cdef ArrowArrayStream *stream = <ArrowArrayStream *>PyCapsule_GetPointer(capsule, b"arrow_array_stream")
    if stream.release != NULL:
        stream.release(stream)
    free(stream)


cdef class ArrowExport:
    """One batch as a table of one row a datagram; Batch.arrow() says which columns."""

    def __init__(self):
        raise TypeError("take batch.arrow()")

    cdef int filled(self) except -1:
        if self.lease is None:
            raise TypeError("take batch.arrow()")
        return 0

    def __arrow_c_schema__(self):
        self.filled()
        cdef ArrowSchema *schema = <ArrowSchema *>calloc(1, sizeof(ArrowSchema))
        if schema == NULL or export_schema(self.lease.arena, self.packed, schema):
            free(schema)
            raise MemoryError
        return PyCapsule_New(schema, b"arrow_schema", drop_schema)

    def __arrow_c_array__(self, requested_schema=None):
        self.filled()
        if not self.packed and wants_packed(requested_schema):
            return arrow_export(self.lease, True).__arrow_c_array__()
        schema = self.__arrow_c_schema__()
        cdef ArrowArray *array = <ArrowArray *>calloc(1, sizeof(ArrowArray))
        if array == NULL or export_array(<PyObject *>self.lease, self.lease.arena, self.packed, array):
            free(array)
            raise MemoryError
        return schema, PyCapsule_New(array, b"arrow_array", drop_array)

    def __arrow_c_stream__(self, requested_schema=None):
        self.filled()
        if not self.packed and wants_packed(requested_schema):
            return arrow_export(self.lease, True).__arrow_c_stream__()
        cdef ArrowArrayStream *stream = <ArrowArrayStream *>calloc(1, sizeof(ArrowArrayStream))
        cdef Stream *state = <Stream *>calloc(1, sizeof(Stream))
        if stream == NULL or state == NULL:
            free(stream)
            free(state)
            raise MemoryError
        state.packed = self.packed
        Py_INCREF(self.lease)
        state.lease = <PyObject *>self.lease
        state.arena = self.lease.arena
        stream.get_schema = stream_schema
        stream.get_next = stream_next
        stream.get_last_error = stream_error
        stream.release = release_stream
        stream.private_data = state
        return PyCapsule_New(stream, b"arrow_array_stream", drop_stream)


cdef bint wants_packed(object requested) except -1:
    """Whether a consumer asks for ordinary binary; anything else that it asks for it casts itself."""
    cdef ArrowSchema *schema
    if requested is None:
        return False
    schema = <ArrowSchema *>PyCapsule_GetPointer(requested, b"arrow_schema")
    return schema.n_children > 0 and strcmp(schema.children[0].format, b"z") == 0


cdef ArrowExport arrow_export(Lease lease, bint packed):
    """The rows of a lease; `packed` of a copy, so that nothing of the lease is held."""
    cdef ArrowExport made = ArrowExport.__new__(ArrowExport)
    made.lease = copied(lease) if packed else lease
    made.packed = packed
    return made
