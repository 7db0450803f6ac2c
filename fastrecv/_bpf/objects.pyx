"""BPF objects: an ELF file opened, given its variables, loaded; and its programs, attached or run by hand."""

import os
import warnings
from collections import namedtuple

import numpy as np

from fastrecv._bpf.links import program_info_of, take_link

from fastrecv._bpf.handle cimport Descriptor, check, error, forget_log, open_pin
from fastrecv._bpf.layout cimport section_type, struct_type
from fastrecv._bpf.libbpf cimport (
    BPF_F_TEST_XDP_LIVE_FRAMES,
    BPF_PROG_TYPE_SK_REUSEPORT,
    BPF_PROG_TYPE_UNSPEC,
    BPF_SK_LOOKUP,
    BPF_TRACE_ITER,
    BPF_XDP,
    bpf_link_create,
    bpf_link_create_opts,
    bpf_map,
    bpf_map__fd,
    bpf_map__initial_value,
    bpf_map__name,
    bpf_map__set_pin_path,
    bpf_object,
    bpf_object__btf,
    bpf_object__close,
    bpf_object__load,
    bpf_object__next_map,
    bpf_object__next_program,
    bpf_object__open_mem,
    bpf_object_open_opts,
    bpf_prog_test_run_opts,
    bpf_program,
    bpf_program__fd,
    bpf_program__name,
    bpf_program__section_name,
    bpf_program__set_type,
    bpf_program__type,
    bpf_raw_tracepoint_open,
    bpf_test_run_opts,
    xdp_md,
)
from libc.errno cimport EINVAL, errno
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_FAILED, MAP_FIXED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap

TestRun = namedtuple("TestRun", "verdict data context duration_ns")


cdef class _Variable:
    """Where a global variable of a BPF object lies in this process's memory."""


cdef class Object:
    """One compiled BPF object file: `set` its variables, `load`, then use its programs and maps.

    data : bytes, the ELF file. name : what the kernel and messages call it.
    pin_root : a directory in a BPF file system, made where it is missing: load() takes the maps that the file says are
    pinned by name (LIBBPF_PIN_BY_NAME) from there, and pins there those that it has to make. Without it they are like
    any other map.
    Programs and maps belong to the object; using them after close() is a ValueError. Not for two threads at a time.
    """

    def __cinit__(self, bytes data not None, str name not None, *, pin_root=None):
        cdef bpf_object_open_opts opts
        cdef bytes encoded = name.encode()
        cdef bytes root = b"" if pin_root is None else os.fsencode(pin_root)
        cdef bpf_program *program = NULL
        cdef bpf_map *map = NULL
        forget_log()
        memset(&opts, 0, sizeof(opts))
        opts.sz = sizeof(opts)
        opts.object_name = encoded
        if pin_root is not None:
            opts.pin_root_path = root
        self.data, self.name = data, name
        self.ptr = bpf_object__open_mem(<const char *>data, len(data), &opts)
        if self.ptr == NULL:
            raise error(errno, f"opening BPF object {name}")
        from fastrecv._bpf.maps import Map  # late: that module needs the declaration of this class

        self.programs, self.maps, self.sections = {}, {}, {}
        while True:
            program = bpf_object__next_program(self.ptr, program)
            if program == NULL:
                break
            found = Program.__new__(Program)
            (<Program>found).owner, (<Program>found).ptr = self, program
            # libbpf 1.0 and newer knows no more than two of these sections, the older ones all.
            if bpf_program__type(program) == BPF_PROG_TYPE_UNSPEC and (
                    bpf_program__section_name(program).startswith(b"sk_reuseport/")):
                check(bpf_program__set_type(program, BPF_PROG_TYPE_SK_REUSEPORT), f"typing a program of {name}")
            self.programs[bpf_program__name(program).decode()] = found
        while True:
            map = bpf_object__next_map(self.ptr, map)
            if map == NULL:
                break
            if pin_root is None:  # or libbpf would pin it to /sys/fs/bpf
                check(bpf_map__set_pin_path(map, NULL), f"keeping a map of {name} unpinned")
            map_name = bpf_map__name(map).decode()
            self.maps[map_name] = Map._of(self, map_name)
            section = "." + map_name.rpartition(".")[2]  # libbpf names the map of a section "<object>.<section>"
            if section in (".rodata", ".data", ".bss"):
                self.sections[map_name] = section_type(bpf_object__btf(self.ptr), section)

    cdef int alive(self) except -1:
        if self.ptr == NULL:
            raise ValueError(f"BPF object {self.name} is closed")
        return 0

    def load(self):
        """Create the maps and load the programs. BpfError.log holds the verifier's words when it refuses."""
        cdef int result
        self.alive()
        forget_log()
        with nogil:
            result = bpf_object__load(self.ptr)
        check(result, f"loading BPF object {self.name}")
        forget_log()
        self.loaded = True
        self.share_variables()
        return self

    cdef int share_variables(self) except -1:
        """Lay the kernel's memory of .data and .bss over libbpf's copy, as libbpf does for its skeletons."""
        cdef bpf_map *map
        cdef size_t size = 0
        cdef const void *start
        for section in self.sections:
            map = map_named(self, section)
            start = bpf_map__initial_value(map, &size)
            if start == NULL or section.endswith(".rodata"):
                continue
            if MAP_FAILED == mmap(
                    <void *>start, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, bpf_map__fd(map), 0):
                raise error(errno, f"mapping the variables of {self.name}")
        return 0

    cdef _Variable variable(self, str name):
        cdef size_t size = 0
        cdef const uint8_t *start
        self.alive()
        for section, dtype in self.sections.items():
            if dtype is None or name not in dtype.names:
                continue
            start = <const uint8_t *>bpf_map__initial_value(map_named(self, section), &size)
            found = _Variable()
            found.dtype, offset = dtype.fields[name][:2]
            if start == NULL or offset + found.dtype.itemsize > size:
                raise error(EINVAL, f"finding variable {name} of {self.name}")
            found.place = <uint8_t *>start + <size_t>offset
            found.constant = section.endswith(".rodata")
            return found
        raise KeyError(f"BPF object {self.name} has no variable {name}")

    def set(self, **values):
        """Set global variables: `const volatile` ones before load(), the others at any time."""
        cdef _Variable variable
        cdef bytes raw
        for name, value in values.items():
            variable = self.variable(name)
            if variable.constant and self.loaded:
                raise ValueError(f"{name} of {self.name} is constant once the object is loaded")
            array = np.array(value, variable.dtype.base)
            if array.shape != variable.dtype.shape:
                raise ValueError(f"{name} of {self.name} takes one value of {variable.dtype}")
            raw = array.tobytes()
            memcpy(variable.place, <const char *>raw, len(raw))

    def get(self, str name not None):
        """The present value of a global variable, as a numpy scalar or array (a copy)."""
        cdef _Variable variable = self.variable(name)
        raw = (<const char *>variable.place)[:variable.dtype.itemsize]
        return np.frombuffer(raw, variable.dtype.base).reshape(variable.dtype.shape)[()]

    def dtype(self, str struct not None):
        """The numpy dtype of a C struct that the object describes: of a map, of a variable, or what one points to."""
        self.alive()
        found = struct_type(bpf_object__btf(self.ptr), struct)
        if found is None:
            raise KeyError(f"BPF object {self.name} describes no struct {struct} that numpy could hold")
        return found

    def close(self):
        if self.ptr != NULL:
            bpf_object__close(self.ptr)
            self.ptr = NULL

    def __enter__(self):
        self.alive()
        return self

    def __exit__(self, *exception):
        self.close()

    def __del__(self):
        if self.ptr != NULL:
            if self.loaded:
                warnings.warn(f"unclosed BPF object {self.name}", ResourceWarning, source=self)
            self.close()


cdef bpf_map *map_named(Object owner, str name) except NULL:
    cdef bpf_map *map = NULL
    owner.alive()
    while True:
        map = bpf_object__next_map(owner.ptr, map)
        if map == NULL:
            raise KeyError(f"BPF object {owner.name} has no map {name}")
        if bpf_map__name(map).decode() == name:
            return map


cdef class Program(Descriptor):
    """One program: of an Object (its descriptor belongs to the object), or `Program.open` of a pin."""

    def __init__(self):
        raise TypeError("programs are found in Object.programs, or opened by Program.open")

    @staticmethod
    def open(path, *, bint read_only=False):
        """The program pinned at `path`. read_only : needs no more than read permission on the pin."""
        return Program.inherited(open_pin(path, read_only))

    @staticmethod
    def inherited(int fd):
        """The program of a descriptor, which is its own from now on."""
        cdef Program program = Program.__new__(Program)
        program.fd = fd
        return program

    cdef int alive(self) except -1:
        if self.owner is None:
            return Descriptor.alive(self)
        self.owner.alive()
        if not self.owner.loaded:
            raise ValueError(f"BPF object {self.owner.name} is not loaded")
        return bpf_program__fd(self.ptr)

    @property
    def name(self):
        if self.owner is None:
            return self.info.name
        self.owner.alive()
        return bpf_program__name(self.ptr).decode()

    @property
    def info(self):
        return program_info_of(self.alive())

    def attach_netns(self, int netns):
        """Attach an sk_lookup program to the network namespace that the descriptor `netns` names. Linux 5.9."""
        return self.attach(netns, BPF_SK_LOOKUP, 0, "a network namespace")

    def attach_xdp(self, int ifindex, unsigned int flags=0):
        """Attach an XDP program to a device of the calling thread's namespace; `flags` are XDP_FLAGS_*. Linux 5.9."""
        return self.attach(ifindex, BPF_XDP, flags, f"interface {ifindex}")

    def attach_tracing(self):
        """Attach a tp_btf program to the tracepoint that it is made for, on the whole host. Linux 5.5."""
        cdef int fd = self.alive(), result
        with nogil:
            result = bpf_raw_tracepoint_open(NULL, fd)
        return take_link(check(result, f"attaching program {self.name} to its tracepoint"))

    def attach_iterator(self):
        """The link of an iterator program, by which it is run: Link.iterate. Linux 5.8."""
        return self.attach(0, BPF_TRACE_ITER, 0, "its iterator")

    def iterate(self):
        """All that an iterator program writes about what it is run for, as bytes: Link.iterate. Linux 5.8."""
        with self.attach_iterator() as link:
            return link.iterate()

    cdef attach(self, int target, int kind, unsigned int flags, str where):
        cdef bpf_link_create_opts opts
        cdef int fd = self.alive(), result
        memset(&opts, 0, sizeof(opts))
        opts.sz = sizeof(opts)
        opts.flags = flags
        with nogil:
            result = bpf_link_create(fd, target, kind, &opts)
        return take_link(check(result, f"attaching program {self.name} to {where}"))

    def run(self, const uint8_t[::1] data=None, const uint8_t[::1] context=None, unsigned int room=0, int repeat=1):
        """BPF_PROG_TEST_RUN: run the program `repeat` times on a packet and/or a context, away from any traffic.

        data : bytes of the packet. context : bytes of the program type's context struct.
        room : bytes to keep of the packet afterwards. duration_ns : mean per run.
        """
        cdef bpf_test_run_opts opts
        cdef int fd = self.alive(), result
        cdef bytearray packet = bytearray(room), after = bytearray(0 if context is None else context.shape[0])
        if repeat < 1:  # the kernel would take a negative number for a huge one
            raise ValueError(f"repeat must be at least 1, not {repeat}")
        memset(&opts, 0, sizeof(opts))
        opts.sz = sizeof(opts)
        opts.repeat = repeat
        if data is not None and data.shape[0]:
            opts.data_in, opts.data_size_in = &data[0], <uint32_t>data.shape[0]
        if room:
            opts.data_out, opts.data_size_out = <char *>packet, room
        if context is not None and context.shape[0]:
            opts.ctx_in, opts.ctx_size_in = &context[0], <uint32_t>context.shape[0]
            opts.ctx_out, opts.ctx_size_out = <char *>after, <uint32_t>context.shape[0]
        with nogil:
            result = bpf_prog_test_run_opts(fd, &opts)
        check(result, f"test run of program {self.name}")
        return TestRun(opts.retval, bytes(packet[:opts.data_size_out]), bytes(after), opts.duration)

    def run_live(self, const uint8_t[::1] frame not None, uint32_t ifindex, int repeat, uint32_t batch_size=64):
        """Send `repeat` copies of an Ethernet frame through an XDP program into the stack (BPF_F_TEST_XDP_LIVE_FRAMES).

        ifindex : the device, in the calling thread's namespace, on which they seem to arrive.
        batch_size : frames a softirq section, 1..256.
        Returns the mean ns a frame took, by the kernel's clock and without its set-up. Linux 5.18.
        """
        cdef bpf_test_run_opts opts
        cdef xdp_md context
        cdef int fd = self.alive(), result
        if repeat < 1 or frame.shape[0] == 0:
            raise ValueError(f"a frame of {frame.shape[0]} bytes cannot be sent {repeat} times")
        memset(&opts, 0, sizeof(opts))
        memset(&context, 0, sizeof(context))
        context.data_end = <uint32_t>frame.shape[0]
        context.ingress_ifindex = ifindex
        opts.sz = sizeof(opts)
        opts.data_in, opts.data_size_in = &frame[0], <uint32_t>frame.shape[0]
        opts.ctx_in, opts.ctx_size_in = &context, sizeof(context)
        opts.repeat = repeat
        opts.batch_size = batch_size
        opts.flags = BPF_F_TEST_XDP_LIVE_FRAMES
        with nogil:
            result = bpf_prog_test_run_opts(fd, &opts)
        check(result, f"live run of program {self.name}")
        return opts.duration
