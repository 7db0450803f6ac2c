"""BPF links, the enumeration of what is attached on this host, and BPF run-time statistics."""

import os
import time
from collections import namedtuple

from fastrecv._bpf.handle cimport Descriptor, check, open_pin
from fastrecv._bpf.libbpf cimport (
    BPF_LINK_TYPE_NETNS,
    BPF_LINK_TYPE_XDP,
    BPF_SK_LOOKUP,
    BPF_STATS_RUN_TIME,
    bpf_enable_stats,
    bpf_iter_create,
    bpf_link_detach,
    bpf_link_get_fd_by_id,
    bpf_link_get_next_id,
    bpf_link_info,
    bpf_link_update,
    bpf_link_update_opts,
    bpf_obj_get_info_by_fd,
    bpf_prog_get_fd_by_id,
    bpf_prog_info,
)
from libc.errno cimport EAGAIN, ENOENT
from libc.stdint cimport uint32_t
from libc.string cimport memset

LinkInfo = namedtuple("LinkInfo", "id type program_id netns_inode attach_type ifindex")
ProgramInfo = namedtuple("ProgramInfo", "id name type tag run_time_ns run_count")

_PART = 1 << 16  # bytes; the kernel gives no more than 8 pages at once (kernel/bpf/bpf_iter.c)

LINK_NETNS = BPF_LINK_TYPE_NETNS
SK_LOOKUP = BPF_SK_LOOKUP


cdef class Link(Descriptor):
    """A BPF link: as long as it is open (or pinned) its program stays attached."""

    def __init__(self):
        raise TypeError("links come from Program.attach_*, Link.open and Link.take")

    @staticmethod
    def take(int fd):
        """The link that a descriptor names, which is this object's to close from now on."""
        link_info_of(fd)
        return take_link(fd)

    @staticmethod
    def open(path):
        """The link pinned at `path`."""
        return take_link(open_pin(path))

    @property
    def info(self):
        return link_info_of(self.alive())

    def update(self, program):
        """Put `program` in the place of the attached one, atomically."""
        cdef bpf_link_update_opts opts
        cdef int fd = self.alive(), prog_fd = program.fileno(), result
        memset(&opts, 0, sizeof(opts))
        opts.sz = sizeof(opts)
        with nogil:
            result = bpf_link_update(fd, prog_fd, &opts)
        check(result, f"updating the link to program {program.name}")

    def iterate(self):
        """All that an iterator program writes about what it is run for, as bytes. No privilege. Linux 5.8.

        What has a network namespace is looked for in the calling thread's. The kernel asks for capabilities when an
        iterator is loaded and linked, not when it is run (BPF_ITER_CREATE in kernel/bpf/syscall.c).
        """
        cdef int link_fd = self.alive(), fd
        with nogil:
            fd = bpf_iter_create(link_fd)
        check(fd, "running an iterator")
        try:
            parts = []
            while True:
                try:
                    part = os.read(fd, _PART)
                except BlockingIOError:  # a million passed over; the next read goes on from there
                    continue
                if not part:
                    return b"".join(parts)
                parts.append(part)
        finally:
            os.close(fd)

    def detach(self):
        """Detach the program now, though the link stays open."""
        cdef int fd = self.alive(), result
        with nogil:
            result = bpf_link_detach(fd)
        check(result, "detaching the link")


def take_link(int fd):
    """The Link that owns the descriptor `fd` from now on."""
    cdef Link link = Link.__new__(Link)
    link.fd = fd
    return link


cdef class Statistics(Descriptor):
    """While this is open the kernel counts and times every BPF run on the host (it slows each by two clock reads).

    BPF_ENABLE_STATS, Linux 5.8.
    """

    def __init__(self):
        cdef int fd
        with nogil:
            fd = bpf_enable_stats(BPF_STATS_RUN_TIME)
        self.fd = check(fd, "enabling BPF statistics")


def link_info_of(int fd):
    """LinkInfo of the link that the descriptor names."""
    cdef bpf_link_info info
    cdef uint32_t size = sizeof(info)
    cdef int result
    memset(&info, 0, sizeof(info))
    with nogil:
        result = bpf_obj_get_info_by_fd(fd, &info, &size)
    check(result, "reading about a link")
    of_netns, of_xdp = info.type == BPF_LINK_TYPE_NETNS, info.type == BPF_LINK_TYPE_XDP
    return LinkInfo(info.id, info.type, info.prog_id, info.netns.netns_ino if of_netns else 0,
                    info.netns.attach_type if of_netns else 0, info.xdp.ifindex if of_xdp else 0)


def program_info_of(int fd):
    """ProgramInfo of the program that the descriptor names."""
    cdef bpf_prog_info info
    cdef uint32_t size = sizeof(info)
    cdef int result
    memset(&info, 0, sizeof(info))
    with nogil:
        result = bpf_obj_get_info_by_fd(fd, &info, &size)
    check(result, "reading about a program")
    return ProgramInfo(info.id, info.name.decode("utf-8", "replace"), info.type, (<char *>info.tag)[:8].hex(),
                       info.run_time_ns, info.run_cnt)


def link_ids():
    """The ids of all BPF links on the host, in all namespaces. CAP_SYS_ADMIN. Linux 5.8."""
    cdef uint32_t id = 0
    cdef int result
    ids = []
    while True:
        with nogil:
            result = bpf_link_get_next_id(id, &id)
        if result == -ENOENT:
            return ids
        check(result, "enumerating BPF links")
        ids.append(id)


def link_info(uint32_t number):
    """LinkInfo of the link with this id; None when it is gone. CAP_SYS_ADMIN."""
    return _by_id(bpf_link_get_fd_by_id, number, link_info_of, "link")


def program_info(uint32_t number):
    """ProgramInfo of the program with this id; None when it is gone. CAP_SYS_ADMIN."""
    return _by_id(bpf_prog_get_fd_by_id, number, program_info_of, "program")


ctypedef int (*_opener)(uint32_t) noexcept nogil


cdef _by_id(_opener open_by_id, uint32_t number, read, str what):
    cdef int fd, attempt
    for attempt in range(1000):
        with nogil:
            fd = open_by_id(number)
        if fd != -EAGAIN:  # somebody is attaching it at this moment
            break
        time.sleep(0.0001)
    if fd == -ENOENT:
        return None
    check(fd, f"opening {what} {number}")
    try:
        return read(fd)
    finally:
        os.close(fd)
