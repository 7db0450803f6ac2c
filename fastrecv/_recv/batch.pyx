"""Batch: the datagrams of one receive, as numpy views over the arena that they lie in."""

import os

import numpy

from fastrecv._recv.arena import ENDPOINT

cimport numpy as cnp
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.ref cimport PyObject, Py_INCREF
from fastrecv._recv.arena cimport Arena, Column, Endpoint, Layout, Lease, Path, arena_new, copied, lease, pack, size_of
from fastrecv._recv.arrow cimport arrow_export
from fastrecv._recv.linux cimport AF_INET, AF_INET6, inet_ntop
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

cnp.import_array()


cdef extern from "numpy/arrayobject.h":
    object PyArray_NewFromDescr(
        type kind, cnp.dtype dtype, int dimensions, cnp.npy_intp *shape, cnp.npy_intp *strides, void *data, int flags,
        PyObject *parent,
    )


cdef enum:
    _FAR = 1 << 20  # no datagram is longer: MAX_SLOT

cdef cnp.dtype _ENDPOINT = ENDPOINT
cdef cnp.dtype _UINT8 = numpy.dtype(numpy.uint8)
cdef cnp.dtype _INT32 = numpy.dtype(numpy.int32)
cdef cnp.dtype _INT64 = numpy.dtype(numpy.int64)


cdef object over(Lease held, const void *at, cnp.dtype dtype, Py_ssize_t rows, Py_ssize_t stride):
    """A read-only array of `rows` items, `stride` bytes apart, which holds the lease."""
    cdef cnp.npy_intp shape = rows, step = stride
    Py_INCREF(dtype)  # the call steals one
    array = PyArray_NewFromDescr(cnp.ndarray, dtype, 1, &shape, &step, <void *>at, 0, NULL)
    cnp.set_array_base(array, held)
    return array


# Senders are many, hosts are fewer: the text of an address is made once, and found again where it was put last.
cdef enum:
    _HOSTS = 256
cdef uint8_t[_HOSTS][17] _host_keys
cdef list _hosts = [None] * _HOSTS


cdef object host_of(const Endpoint *endpoint):
    cdef uint8_t[17] key
    cdef char[46] text  # INET6_ADDRSTRLEN
    cdef uint32_t low
    cdef int place
    memcpy(key, endpoint.address, 16)
    key[16] = <uint8_t>endpoint.family
    memcpy(&low, key + 12, 4)
    place = (low ^ low >> 8 ^ low >> 16 ^ low >> 24) % _HOSTS
    if memcmp(key, _host_keys[place], 17) == 0:
        return _hosts[place]
    if endpoint.family == AF_INET:
        inet_ntop(AF_INET, endpoint.address + 12, text, sizeof(text))
    else:
        inet_ntop(AF_INET6, endpoint.address, text, sizeof(text))
    host = (<bytes>text).decode("ascii")
    _hosts[place] = host
    memcpy(_host_keys[place], key, 17)
    return host


cdef object address_of(const Endpoint *endpoint):
    """The address as the socket module writes it; None for no address."""
    if endpoint.family == AF_INET:
        return host_of(endpoint), endpoint.port
    if endpoint.family == AF_INET6:
        return host_of(endpoint), endpoint.port, 0, endpoint.scope
    return None


cdef object path_of(const Path *path):
    """The same for AF_UNIX: str, or bytes where the name is an abstract one; None for an unnamed socket."""
    cdef bytes name = path.path[:path.length]
    if not name:
        return None
    if name[0] == 0:
        return name
    return os.fsdecode(name.partition(b"\0")[0])


cdef object sender(const Arena *arena, int row):
    if arena.sources != NULL:
        return address_of(&arena.sources[row])
    return path_of(&arena.paths[row])


cdef class Batch:
    """Datagrams received together: rows (offset, length) over one arena. Read-only.

    A batch, and every view of it (array, memoryview, Arrow buffer), keeps its arena from being overwritten, for as long
    as any of them lives. A batch may be kept for ever; when all arenas of a Receiver are held, its recv raises
    BufferError. `release` (or leaving a `with` block) gives up the batch's own hold; what is asked of it after that
    raises ValueError.

    Columns (offsets, lengths, flags, sources, destinations, timestamps, hardware_timestamps, tos) are one-dimensional
    arrays of len(batch) items, made anew on each access: keep what a loop uses in a variable.
    """

    def __init__(self):
        raise TypeError("batches come from a Receiver, or from Batch.of(payloads)")

    @staticmethod
    def of(payloads, sources=None):
        """A batch of the given bytes-like objects, copied: for tests, replays, and backends of your own.

        sources : ENDPOINT, one each (fastrecv.sockets.endpoints makes them of addresses); without, `sources` is None.
        """
        payloads = [bytes(payload) for payload in payloads]
        cdef cnp.ndarray endpoints = None
        cdef Layout layout
        cdef Arena *arena
        cdef Lease held
        cdef int64_t end = 0
        cdef int row = 0
        if sources is not None:
            endpoints = numpy.ascontiguousarray(sources)
            if endpoints.dtype != _ENDPOINT or endpoints.ndim != 1 or len(endpoints) != len(payloads):
                raise ValueError(f"sources are an array of {len(payloads)} ENDPOINT, one for each payload")
        memset(&layout, 0, sizeof(layout))
        layout.rows = len(payloads)
        layout.columns = Column.SOURCES if sources is not None else Column.PATHS
        arena = arena_new(&layout, sum(map(len, payloads)))
        if arena == NULL:
            raise MemoryError
        held = lease(arena, None)
        for payload in payloads:
            arena.offsets[row] = end
            arena.lengths[row] = <int32_t>len(payload)
            arena.flags[row] = 0
            memcpy(arena.data + end, <const char *>(<bytes>payload), <size_t>arena.lengths[row])
            if sources is None:
                arena.paths[row].length = 0
            else:
                arena.sources[row] = (<Endpoint *>cnp.PyArray_DATA(endpoints))[row]
            end += arena.lengths[row]
            row += 1
        arena.rows = row
        return new_batch(held, -1)

    def __reduce__(self):
        raise TypeError("a Batch cannot be pickled: send list(batch.datagrams()) or batch.packed()")

    cdef Arena *alive(self) except NULL:
        if self.lease is None:
            raise ValueError("the batch has been released")
        return self.lease.arena

    cdef Lease held(self):
        self.alive()
        return self.lease

    cdef int row(self, Py_ssize_t index) except -1:
        cdef int rows = self.alive().rows
        if index < 0:
            index += rows
        if not 0 <= index < rows:
            raise IndexError(f"no datagram {index} in a batch of {rows}")
        return <int>index

    def __len__(self):
        return self.alive().rows

    @property
    def data(self):
        """uint8, one-dimensional: the whole arena. Only rows (offset, length) of it have a meaning."""
        cdef Arena *arena = self.alive()
        return over(self.lease, arena.data, _UINT8, arena.size, 1)

    @property
    def offsets(self):
        """int64: where each datagram begins in `data`."""
        cdef Arena *arena = self.alive()
        return over(self.lease, arena.offsets, _INT64, arena.rows, 8)

    @property
    def lengths(self):
        """int32: bytes of each datagram that were kept."""
        cdef Arena *arena = self.alive()
        return over(self.lease, arena.lengths, _INT32, arena.rows, 4)

    @property
    def flags(self):
        """uint8: TRUNCATED, CONTROL_TRUNCATED (recvmsg(2), MSG_TRUNC and MSG_CTRUNC)."""
        cdef Arena *arena = self.alive()
        return over(self.lease, arena.flags, _UINT8, arena.rows, 1)

    @property
    def sources(self):
        """ENDPOINT: who sent each datagram; None for AF_UNIX (see `source`).

        `address` is 16 bytes in network order, IPv4 as ::ffff:a.b.c.d; `family` is the socket's; `port` is in host
        order; `scope` is the interface index of a link-local address. IPv4 addresses as numbers:
        `batch.sources["address"][:, 12:].view(">u4")[:, 0]`.
        """
        cdef Arena *arena = self.alive()
        if arena.sources == NULL:
            return None
        return over(self.lease, arena.sources, _ENDPOINT, arena.rows, sizeof(Endpoint))

    @property
    def destinations(self):
        """ENDPOINT: where each datagram was sent to; `scope` is the index of the interface it came in by.

        None unless the socket has packet info or original destinations switched on; `port` is 0 without the latter.
        IP_PKTINFO, IP_RECVORIGDSTADDR: ip(7); IPV6_RECVPKTINFO: ipv6(7).
        """
        cdef Arena *arena = self.alive()
        if arena.destinations == NULL:
            return None
        return over(self.lease, arena.destinations, _ENDPOINT, arena.rows, sizeof(Endpoint))

    @property
    def timestamps(self):
        """int64: ns since the epoch when the kernel took the datagram, 0 where it says nothing; None: not asked for.

        SO_TIMESTAMPNS: socket(7).
        """
        cdef Arena *arena = self.alive()
        if arena.timestamps == NULL:
            return None
        return over(self.lease, arena.timestamps, _INT64, arena.rows, 8)

    @property
    def hardware_timestamps(self):
        """int64: ns of the network card's clock, 0 where the card gave none; None: not asked for.

        SOF_TIMESTAMPING_RAW_HARDWARE: Documentation/networking/timestamping.rst.
        """
        cdef Arena *arena = self.alive()
        if arena.hardware == NULL:
            return None
        return over(self.lease, arena.hardware, _INT64, arena.rows, 8)

    @property
    def tos(self):
        """uint8: type of service or traffic class; the low two bits are ECN (RFC 3168). None: not asked for."""
        cdef Arena *arena = self.alive()
        if arena.tos == NULL:
            return None
        return over(self.lease, arena.tos, _UINT8, arena.rows, 1)

    @property
    def drops(self):
        """How many datagrams the socket's full queue had cost when the last of this batch was queued.

        Counted from the Receiver's beginning; what is lost after that shows in a later batch, Receiver.drops tells it at
        any time. None: not asked for. SO_RXQ_OVFL: socket(7).
        """
        self.alive()
        return None if self.drop_count < 0 else self.drop_count

    # From here on each method holds the lease itself: another thread may release the batch at any allocation.

    def __getitem__(self, index):
        """Datagram `index` as a read-only memoryview."""
        if isinstance(index, slice):
            raise TypeError("a batch has no slices: index its columns, batch.lengths[2:5], or one datagram, batch[2]")
        return self.slice(self.held(), self.row(index))

    cdef object slice(self, Lease held, int row):
        cdef int64_t start = held.arena.offsets[row]
        view = self.view
        if view is None:
            view = self.view = memoryview(held)
        return view[start : start + held.arena.lengths[row]]

    def source(self, Py_ssize_t index):
        """Who sent datagram `index`, as socket.recvfrom would say it.

        (host, port), (host, port, 0, scope), a path as str, an abstract name as bytes; None for an unnamed AF_UNIX
        socket, which cannot be answered.
        """
        cdef Lease held = self.held()
        return sender(held.arena, self.row(index))

    def destination(self, Py_ssize_t index):
        """Where datagram `index` was sent to, in the same manner; None where `destinations` is."""
        cdef Lease held = self.held()
        cdef int row = self.row(index)
        return None if held.arena.destinations == NULL else address_of(&held.arena.destinations[row])

    def __iter__(self):
        """(memoryview, source) of every datagram."""
        cdef Lease held
        cdef int row
        for row in range(self.alive().rows):
            held = self.held()
            yield self.slice(held, row), sender(held.arena, row)

    def datagrams(self):
        """(bytes, source) of every datagram: copies, for what wants nothing else."""
        cdef Lease held
        cdef Arena *arena
        cdef int row
        for row in range(self.alive().rows):
            held = self.held()
            arena = held.arena
            data = PyBytes_FromStringAndSize(<char *>arena.data + arena.offsets[row], arena.lengths[row])
            yield data, sender(arena, row)

    def records(self, dtype, Py_ssize_t offset=0):
        """The first bytes of every datagram as an array of `dtype`, one item a datagram.

        dtype : anything numpy takes but Python objects. offset : bytes to leave out at each datagram's beginning.
        Datagrams that are too short are never read past their end: where there are any, the result is a
        numpy.ma.MaskedArray that masks them (their data is 0). Where rows lie evenly the array is a view of the
        arena, else a copy. Read-only if it is a view.
        """
        if dtype is None:
            raise TypeError("records need a dtype")
        cdef cnp.dtype kind = numpy.dtype(dtype)
        cdef Lease held = self.held()
        cdef Arena *arena = held.arena
        cdef Py_ssize_t size = kind.itemsize, need
        cdef int row, rows = arena.rows, missing = 0
        cdef int64_t stride = 0
        cdef bint even = True
        cdef cnp.ndarray gathered
        cdef uint8_t *to
        if kind.hasobject or kind.shape:
            raise TypeError(f"records cannot be of {kind}: give a dtype without Python objects, not an array of it")
        if size == 0 or not 0 <= offset <= _FAR:
            raise ValueError(f"give a dtype of at least one byte, and an offset of 0 to {_FAR:,}")
        need = offset + size
        if rows > 1:
            stride = arena.offsets[1] - arena.offsets[0]
        for row in range(rows):
            missing += arena.lengths[row] < need
            even &= arena.offsets[row] == arena.offsets[0] + row * stride
        if even and not missing:
            # Of no rows nothing is read, so it matters not where they are.
            return over(held, arena.data + (arena.offsets[0] + offset if rows else 0), kind, rows, stride)
        gathered = numpy.zeros(rows, kind)
        to = <uint8_t *>cnp.PyArray_DATA(gathered)
        for row in range(rows):
            if arena.lengths[row] >= need:
                memcpy(to + row * size, arena.data + arena.offsets[row] + offset, <size_t>size)
        if missing:
            return numpy.ma.MaskedArray(gathered, mask=over(held, arena.lengths, _INT32, rows, 4) < need)
        return gathered

    def packed(self, offsets=numpy.int32):
        """(bytes, offsets): all datagrams one behind the other, and where each begins and ends.

        offsets : numpy.int32 or numpy.int64. Returns uint8 of sum(lengths) items, and len(batch) + 1 offsets. A copy.
        """
        kind = numpy.dtype(offsets)
        if kind not in (_INT32, _INT64):
            raise TypeError(f"offsets are int32 or int64, not {kind}")
        cdef Lease held = self.held()
        cdef cnp.ndarray bounds = numpy.zeros(held.arena.rows + 1, numpy.int64)
        cdef cnp.ndarray together = numpy.empty(size_of(held.arena), numpy.uint8)
        pack(held.arena, <uint8_t *>cnp.PyArray_DATA(together), <int64_t *>cnp.PyArray_DATA(bounds))
        return together, bounds.astype(kind, copy=False)  # an arena has less than 2 GiB

    def copy(self):
        """The same batch in memory of its own, without gaps: it holds no arena of the Receiver."""
        return new_batch(copied(self.held()), self.drop_count)

    def release(self):
        """Give up the batch's own hold of its arena; views taken from it stay good, and keep theirs."""
        self.view = None
        self.lease = None

    def __enter__(self):
        self.alive()
        return self

    def __exit__(self, *exception):
        self.release()

    def arrow(self, bint packed=False):
        """What Arrow libraries take, over the PyCapsule interface: pyarrow.record_batch(batch.arrow()).

        Columns: payload, length, source_address, source_port (not for AF_UNIX), and whichever of
        destination_address, destination_port, interface, timestamp, hardware_timestamp, tos there are. The payload is
        a binary view of the arena, not copied; with `packed`, or where the consumer asks for it, it is ordinary
        binary, and all of it a copy: what is kept or shipped should be that, since the gaps between the datagrams of an
        arena hold older ones. Addresses are fixed-size binary of 16 bytes, timestamps ns in UTC, null where the kernel
        said nothing. A batch itself is taken as batch.arrow() is.
        """
        return arrow_export(self.held(), packed)

    def __arrow_c_schema__(self):
        return self.arrow().__arrow_c_schema__()

    def __arrow_c_array__(self, requested_schema=None):
        return self.arrow().__arrow_c_array__(requested_schema)

    def __arrow_c_stream__(self, requested_schema=None):
        return self.arrow().__arrow_c_stream__(requested_schema)

    def __repr__(self):
        if self.lease is None:
            return "<Batch, released>"
        return f"<Batch of {self.lease.arena.rows} datagrams>"


cdef Batch new_batch(Lease held, long long drop_count):
    cdef Batch made = Batch.__new__(Batch)
    made.lease = held
    made.drop_count = drop_count
    return made
