"""The way in: descriptors that stay open while any thread is inside, and the wait for them.

Whoever receives, sends or waits enters first and leaves then. close() wakes them all, and the last one to leave closes
the descriptors, so that nobody ever works on a number that has become somebody else's.
"""

import math
import os
import time
from numbers import Real

from fastrecv._recv.linux cimport *
from libc.errno cimport EBADF, errno

GLANCE = 1.0  # seconds between looks for a signal that came just before the wait, or to another thread


cdef int wait(int fd, int wake, double seconds) noexcept nogil:
    """Wait until something may be received, the receiver is closed, a signal comes or the time is over.

    What the socket polls as, or a negative errno.
    """
    cdef pollfd[2] polled
    cdef timespec limit
    limit.tv_sec = <long>seconds
    limit.tv_nsec = <long>((seconds - limit.tv_sec) * 1e9)
    polled[0].fd = fd
    polled[1].fd = wake
    polled[0].events = <short>(POLLIN | POLLRDHUP)
    polled[1].events = <short>POLLIN
    return -errno if ppoll(polled, 2, &limit, NULL) < 0 else polled[0].revents


cdef class Door:
    """fd : what is polled for datagrams, and this class's to close. Under the GIL, all of it."""

    def __cinit__(self):
        self.fd = self.wake = -1
        self.process = getpid()

    cdef int open(self, int fd) except -1:
        """Take over `fd`."""
        self.fd = fd
        self.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.wake < 0:
            raise OSError(errno, os.strerror(errno))
        return 0

    def fileno(self):
        if self.closed:
            raise closed_error()
        return self.fd

    cpdef tuple enter(self):
        """Two descriptors to wait for, which stay open until leave(): the socket's, and one that tells of close()."""
        if self.closed:
            raise closed_error()
        if self.process != getpid():
            self.part()
        self.inside += 1
        return self.fd, self.wake

    cdef int part(self) except -1:
        """After a fork: this process shares the socket, but must not wake, or be woken by, the other one."""
        self.process = getpid()
        self.inside = 0
        close(self.wake)
        self.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.wake < 0:
            raise OSError(errno, os.strerror(errno))
        return 0

    def close(self):
        """Wake whoever waits, and close the descriptors: at once, or when the last of them has left."""
        if self.closed:
            return
        self.enter()
        self.closed = True
        if self.inside > 1:
            os.write(self.wake, (1).to_bytes(8, "little"))  # never read: it wakes them all
        self.leave()

    cpdef int leave(self) except -1:
        """Somebody is done with the descriptors; the last one after close() closes them."""
        self.inside -= 1
        if self.closed and self.inside == 0:
            self.shut()
        return 0

    cdef void shut(self) noexcept:
        cdef int fd = self.fd, wake = self.wake
        self.fd = self.wake = -1
        if fd >= 0:
            close(fd)
        if wake >= 0:
            close(wake)

    def __dealloc__(self):
        self.shut()  # nobody is inside recv, which holds a reference


def deadline_of(timeout):
    """Until when, by time.monotonic(), a call with this timeout may wait."""
    if timeout is None:
        return math.inf
    if not isinstance(timeout, Real) or not timeout >= 0:  # NaN too
        raise ValueError(f"timeout is {timeout!r}: give seconds, 0 not to wait, None to wait for ever")
    return time.monotonic() + timeout if timeout else 0.0


def closed_error():
    return OSError(EBADF, "the Receiver is closed")
