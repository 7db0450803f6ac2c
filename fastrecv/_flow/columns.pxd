from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef enum Kind:
    # How a field of a record becomes a value of a column.
    UNSIGNED  # big-endian, of 1 to 8 bytes, widened
    SIGNED    # the same
    FLOAT     # of 4 or 8 bytes, widened
    OCTETS    # as they are, all of one length
    MILLIS    # since the epoch
    UPTIME    # ms since the exporter began, becomes ms since the epoch
    MICROS    # NTP's format (RFC 7011, 6.1.9), becomes us since the epoch
    NANOS     # the same, ns
    VARIABLE  # of any length


cdef struct Step:
    # One field of a record; STEP is its dtype. column : -1 where nobody wants it.
    uint32_t offset
    uint16_t length
    uint8_t kind
    uint8_t total
    int32_t column


cdef enum Total:
    NOTHING
    IN_OCTETS
    IN_PACKETS


cdef struct Moment:
    # When a datagram was received, and when its exporter says to have sent it, in ms since the epoch and since it began.
    int64_t received
    int64_t exported
    uint32_t uptime


cdef struct Column:
    # width : bytes of a value; 0: of any length, between two offsets.
    uint8_t *data
    int32_t *offsets
    int64_t used
    int64_t room
    int width


cdef struct Store:
    # Rows of a schema. width : bytes of a row, those of values of any length apart.
    Column *columns
    int count
    int64_t rows
    int64_t room
    int64_t width


cdef class Columns:
    cdef Store store


cdef int reserve(Store *store, int64_t rows) noexcept nogil
cdef int reserve_bytes(Column *column, int64_t length) noexcept nogil
cdef uint64_t number(const uint8_t *at, int length) noexcept nogil
cdef void fill(
    const Step *step, Column *column, int64_t row, const uint8_t *at, int64_t stride, int64_t rows, const Moment *moment,
) noexcept nogil
cdef void put(
    const Step *step, Column *column, int64_t row, const uint8_t *at, int length, const Moment *moment,
) noexcept nogil
cdef void repeat(Column *column, int64_t row, uint64_t value, int64_t rows) noexcept nogil
