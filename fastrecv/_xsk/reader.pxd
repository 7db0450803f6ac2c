from fastrecv._recv.arena cimport Arena
from fastrecv._recv.door cimport Door
from fastrecv._xsk.umem cimport Queue, Umem
from fastrecv._xsk.xdp cimport pthread_mutex_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef struct Tally:
    # What one look at all rings brought.
    long long bytes
    int bad_checksum
    int unreadable
    int martian
    int refused              # frames that go back at once


cdef class Reader(Door):
    cdef Umem umem
    cdef int checksums
    cdef bint busy
    cdef int turn
    cdef uint32_t *interfaces  # by number of the VLAN
    cdef uint32_t *martians    # IPv4 addresses, sorted
    cdef int martian_count
    cdef int changes           # of the host's interfaces: a netlink socket
    cdef int lost              # errno, once the interface is gone
    cdef pthread_mutex_t *lock
    cdef readonly long long batches, datagrams, bytes, bad_checksum, unreadable, martian
    cdef void look(self, Arena *arena, uint64_t *refused, uint32_t *taken, Tally *tally) noexcept nogil
    cdef void drain(self, Queue *queue, Arena *arena, uint64_t *refused, uint32_t *taken, long long now, Tally *tally) noexcept nogil
    cdef int row(self, Arena *arena, uint64_t address, uint32_t length, long long now) noexcept nogil
    cdef bint is_martian(self, const uint8_t *address) noexcept nogil
    cdef void settle(self, const uint64_t *refused, const uint32_t *taken, const Tally *tally) noexcept
    cdef int gone(self) except -1
