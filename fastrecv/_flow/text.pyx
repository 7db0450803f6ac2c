"""Addresses as text, many at once."""

from libc.stdint cimport int32_t, uint8_t, uint32_t
from libc.string cimport strlen

import numpy

cimport numpy as cnp

cnp.import_array()

cdef extern from "<arpa/inet.h>" nogil:
    const char *inet_ntop(int family, const void *address, char *to, unsigned int size)
    int AF_INET6

cdef enum:
    _FOUR = 15  # characters at most
    _SIX = 45
    _MAC = 17


cdef inline int decimal(char *to, uint32_t value) noexcept nogil:
    """Write a byte as a number; how many characters."""
    cdef int length = 0
    if value >= 100:
        to[0] = <char>(48 + value // 100)
        length = 1
    if value >= 10:
        to[length] = <char>(48 + value // 10 % 10)
        length += 1
    to[length] = <char>(48 + value % 10)
    return length + 1


def ipv4(const uint32_t[::1] addresses):
    """(offsets, characters) of the texts of IPv4 addresses, given as numbers."""
    offsets, characters = numpy.empty(len(addresses) + 1, "i4"), numpy.empty(_FOUR * len(addresses) + 1, "u1")
    cdef int32_t[::1] starts = offsets
    cdef uint8_t[::1] text = characters
    cdef Py_ssize_t i
    cdef int32_t at = 0
    cdef int shift
    with nogil:
        for i in range(addresses.shape[0]):
            starts[i] = at
            for shift in range(24, -1, -8):
                at += decimal(<char *>&text[at], addresses[i] >> shift & 255)
                if shift:
                    text[at] = b"."
                    at += 1
        starts[addresses.shape[0]] = at
    return offsets, characters[:at]


def ipv6(const uint8_t[:, ::1] addresses):
    """The same of IPv6 addresses, 16 bytes each; mapped IPv4 addresses as IPv4."""
    if addresses.shape[1] != 16:
        raise ValueError("an IPv6 address has 16 bytes")
    offsets, characters = numpy.empty(len(addresses) + 1, "i4"), numpy.empty((_SIX + 1) * len(addresses) + 1, "u1")
    cdef int32_t[::1] starts = offsets
    cdef uint8_t[::1] text = characters
    cdef Py_ssize_t i
    cdef int32_t at = 0
    cdef int j
    cdef bint mapped
    with nogil:
        for i in range(addresses.shape[0]):
            starts[i] = at
            mapped = addresses[i, 10] == 255 and addresses[i, 11] == 255
            for j in range(10):
                mapped = mapped and addresses[i, j] == 0
            if mapped:
                for j in range(12, 16):
                    at += decimal(<char *>&text[at], addresses[i, j])
                    if j < 15:
                        text[at] = b"."
                        at += 1
            else:
                inet_ntop(AF_INET6, &addresses[i, 0], <char *>&text[at], _SIX + 1)
                at += <int32_t>strlen(<const char *>&text[at])
        starts[addresses.shape[0]] = at
    return offsets, characters[:at]


def mac(const uint8_t[:, ::1] addresses):
    """The same of MAC addresses, 6 bytes each."""
    if addresses.shape[1] != 6:
        raise ValueError("a MAC address has 6 bytes")
    offsets = numpy.arange(len(addresses) + 1, dtype="i4") * _MAC
    characters = numpy.full(_MAC * len(addresses), ord(":"), "u1")
    cdef const uint8_t[::1] digits = b"0123456789abcdef"
    cdef uint8_t[::1] text = characters
    cdef Py_ssize_t i
    cdef int j
    with nogil:
        for i in range(addresses.shape[0]):
            for j in range(6):
                text[_MAC * i + 3 * j] = digits[addresses[i, j] >> 4]
                text[_MAC * i + 3 * j + 1] = digits[addresses[i, j] & 15]
    return offsets, characters
