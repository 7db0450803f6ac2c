"""The one door to libbpf: objects, programs, maps, links, test runs, pins.

Nothing else in fastrecv calls libbpf or bpf(2). Keys and values cross as numpy arrays whose dtypes are read from
the object's BTF, so the C struct in bpf/ is the only place where a layout is written down. The GIL is released around
every system call. Every failure leaves through `_error`, a BpfError with errno, what was tried and what to do.

Privileges: CAP_BPF and CAP_NET_ADMIN (or root) to load, attach and enumerate. Linux 5.9 for sk_lookup, 5.18 for live
test runs.
"""

import os
import warnings
from collections import namedtuple

import numpy as np

from fastrecv.errors import BpfError

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, EINVAL, ENOENT, ENOSPC, EPERM, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_FAILED, MAP_FIXED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap


cdef extern from *:
    """
    #include <bpf/libbpf.h>
    #include <stdarg.h>
    #include <stdio.h>
    #include <stdlib.h>

    /* What libbpf says, the verifier's log included, collects here for the exception of the call that failed. */
    static __thread char *log_text;
    static __thread size_t log_used, log_room;

    static int log_print(enum libbpf_print_level level, const char *format, va_list arguments)
    {
        va_list again;
        char *larger;
        int length;

        if (level == LIBBPF_DEBUG)
            return 0;
        va_copy(again, arguments);
        length = vsnprintf(NULL, 0, format, again);
        va_end(again);
        if (length < 0 || length > 1 << 24)
            return 0;
        if (log_used + length + 1 > log_room) {
            larger = realloc(log_text, 2 * (log_used + length + 1));
            if (!larger)
                return 0;
            log_text = larger;
            log_room = 2 * (log_used + length + 1);
        }
        log_used += vsnprintf(log_text + log_used, log_room - log_used, format, arguments);
        return length;
    }

    static void log_install(void) { libbpf_set_print(log_print); }
    static void log_clear(void) { log_used = 0; }
    """
    const char *log_text
    size_t log_used
    void log_install() nogil
    void log_clear() nogil

log_install()

# Linux-private errno of a map type that has no batch operation (include/linux/errno.h); libc does not name it.
cdef enum:
    ENOTSUPP = 524

_CURES = {
    EPERM: "run as root, or with CAP_BPF and CAP_NET_ADMIN",
}

LinkInfo = namedtuple("LinkInfo", "id type program_id netns_inode attach_type ifindex")
ProgramInfo = namedtuple("ProgramInfo", "id name type run_time_ns run_count")
TestRun = namedtuple("TestRun", "verdict data context duration_ns")

LIBBPF_VERSION = libbpf_version_string().decode().lstrip("v")
LINK_XDP = BPF_LINK_TYPE_XDP
LINK_NETNS = BPF_LINK_TYPE_NETNS
SK_LOOKUP = BPF_SK_LOOKUP


cdef object _error(int code, str tried):
    """The funnel: what to raise for errno `code` after `tried` failed."""
    log = log_text[:log_used].decode("utf-8", "replace") if log_used else ""
    log_clear()
    if code == EINTR:
        PyErr_CheckSignals()
    reason = "not supported by this map or kernel" if code == ENOTSUPP else os.strerror(code)
    message = f"{tried}: {reason}"
    if code in _CURES:
        message += f" ({_CURES[code]})"
    return BpfError(code, message, log)


cdef int _check(int result, str tried) except -1:
    """Pass on what libbpf 1.x returned (>= 0), or raise for the negative errno."""
    if result < 0:
        raise _error(-result, tried)
    return result


cdef class _Descriptor:
    """A file descriptor that names one kernel object: closed once, a warning when it was forgotten."""

    cdef readonly int fd

    def __cinit__(self, *arguments):
        self.fd = -1  # first of all: a constructor that fails must not leave 0 to be closed
        if arguments:
            self.fd = arguments[0]

    cdef int alive(self) except -1:
        if self.fd < 0:
            raise ValueError(f"{type(self).__name__} is closed")
        return self.fd

    def fileno(self):
        return self.alive()

    def pin(self, path):
        """Keep the object in bpffs under `path` beyond the life of this process."""
        cdef bytes encoded = os.fsencode(path)
        cdef const char *name = encoded
        cdef int fd = self.alive(), result
        with nogil:
            result = bpf_obj_pin(fd, name)
        _check(result, f"pinning to {os.fsdecode(path)}")

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self):
        self.alive()
        return self

    def __exit__(self, *exception):
        self.close()

    def __del__(self):
        if self.fd >= 0:
            warnings.warn(f"unclosed {type(self).__name__}, fd {self.fd}", ResourceWarning, source=self)
            self.close()


cdef int _open_pin(path) except -1:
    cdef bytes encoded = os.fsencode(path)
    cdef const char *name = encoded
    cdef int result
    with nogil:
        result = bpf_obj_get(name)
    return _check(result, f"opening the pin {os.fsdecode(path)}")


cdef class Link(_Descriptor):
    """A BPF link: as long as it is open (or pinned) its program stays attached."""

    @staticmethod
    def open(path):
        """The link pinned at `path`."""
        return Link(_open_pin(path))

    @property
    def info(self):
        return _link_info(self.alive())

    def update(self, Program program not None):
        """Put `program` in the place of the attached one, atomically."""
        cdef bpf_link_update_opts opts
        cdef int fd = self.alive(), prog_fd = program.fileno(), result
        memset(&opts, 0, sizeof(opts))
        opts.sz = sizeof(opts)
        with nogil:
            result = bpf_link_update(fd, prog_fd, &opts)
        _check(result, f"updating the link to program {program.name}")

    def detach(self):
        """Detach the program now, though the link stays open."""
        cdef int fd = self.alive(), result
        with nogil:
            result = bpf_link_detach(fd)
        _check(result, "detaching the link")


cdef class Statistics(_Descriptor):
    """While this is open the kernel counts and times every BPF run on the host (it slows each by two clock reads).

    BPF_ENABLE_STATS, Linux 5.8.
    """

    def __init__(self):
        cdef int fd
        with nogil:
            fd = bpf_enable_stats(BPF_STATS_RUN_TIME)
        self.fd = _check(fd, "enabling BPF statistics")


cdef class _Variable:
    """Where a global variable of a BPF object lies in this process's memory."""

    cdef uint8_t *place
    cdef object dtype
    cdef bint constant


cdef class Object:
    """One compiled BPF object file: `set` its variables, `load`, then use its programs and maps.

    data : bytes, the ELF file. name : what the kernel and messages call it.
    Programs and maps belong to the object; using them after close() is a ValueError.
    """

    cdef bpf_object *ptr
    cdef bytes data
    cdef readonly str name
    cdef readonly bint loaded
    cdef readonly dict programs
    cdef readonly dict maps

    def __cinit__(self, bytes data not None, str name not None):
        cdef bpf_object_open_opts opts
        cdef bytes encoded = name.encode()
        cdef bpf_program *program = NULL
        cdef bpf_map *map = NULL
        log_clear()
        memset(&opts, 0, sizeof(opts))
        opts.sz = sizeof(opts)
        opts.object_name = encoded
        self.data, self.name = data, name
        self.ptr = bpf_object__open_mem(<const char *>data, len(data), &opts)
        if self.ptr == NULL:
            raise _error(errno, f"opening BPF object {name}")
        self.programs, self.maps = {}, {}
        while True:
            program = bpf_object__next_program(self.ptr, program)
            if program == NULL:
                break
            found = Program(-1)
            (<Program>found).owner, (<Program>found).ptr = self, program
            self.programs[bpf_program__name(program).decode()] = found
        while True:
            map = bpf_object__next_map(self.ptr, map)
            if map == NULL:
                break
            entry = Map(-1)
            (<Map>entry).owner, (<Map>entry).ptr = self, map
            (<Map>entry).describe_from_btf(bpf_object__btf(self.ptr))
            self.maps[bpf_map__name(map).decode()] = entry

    cdef int alive(self) except -1:
        if self.ptr == NULL:
            raise ValueError(f"BPF object {self.name} is closed")
        return 0

    def load(self):
        """Create the maps and load the programs. BpfError.log holds the verifier's words when it refuses."""
        cdef int result
        self.alive()
        log_clear()
        with nogil:
            result = bpf_object__load(self.ptr)
        _check(result, f"loading BPF object {self.name}")
        self.loaded = True
        self.share_variables()
        return self

    cdef int share_variables(self) except -1:
        """Lay the kernel's memory of .data and .bss over libbpf's copy, as libbpf does for its skeletons."""
        cdef Map map
        cdef size_t size = 0
        cdef const void *start
        for section, map in self.maps.items():
            if section.endswith((".data", ".bss")):
                start = bpf_map__initial_value(map.ptr, &size)
                if start != NULL and MAP_FAILED == mmap(
                        <void *>start, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, bpf_map__fd(map.ptr), 0):
                    raise _error(errno, f"mapping the variables of {self.name}")
        return 0

    cdef _Variable variable(self, str name):
        cdef Map map
        cdef size_t size = 0
        cdef const uint8_t *start
        self.alive()
        for section, map in self.maps.items():
            if not section.endswith((".rodata", ".data", ".bss")) or name not in (map.value_dtype.names or ()):
                continue
            start = <const uint8_t *>bpf_map__initial_value(map.ptr, &size)
            found = _Variable()
            found.dtype, offset = map.value_dtype.fields[name][:2]
            if start == NULL or offset + found.dtype.itemsize > size:
                raise _error(EINVAL, f"finding variable {name} of {self.name}")
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
            raw = np.array(value, variable.dtype).tobytes()
            if len(raw) != variable.dtype.itemsize:
                raise ValueError(f"{name} of {self.name} takes one value of {variable.dtype}")
            memcpy(variable.place, <const char *>raw, len(raw))

    def get(self, str name not None):
        """The present value of a global variable, as a numpy scalar (a copy)."""
        cdef _Variable variable = self.variable(name)
        return np.frombuffer((<const char *>variable.place)[:variable.dtype.itemsize], variable.dtype)[0]

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


cdef class Program(_Descriptor):
    """One program of an Object; its descriptor belongs to the object."""

    cdef Object owner
    cdef bpf_program *ptr

    cdef int alive(self) except -1:
        self.owner.alive()
        if not self.owner.loaded:
            raise ValueError(f"BPF object {self.owner.name} is not loaded")
        return bpf_program__fd(self.ptr)

    @property
    def name(self):
        self.owner.alive()
        return bpf_program__name(self.ptr).decode()

    @property
    def info(self):
        return _program_info(self.alive())

    def attach_netns(self, int netns):
        """Attach an sk_lookup program to the network namespace that the descriptor `netns` names. Linux 5.9."""
        return self.attach(netns, BPF_SK_LOOKUP, 0, "a network namespace")

    def attach_xdp(self, int ifindex, unsigned int flags=0):
        """Attach an XDP program to a device of the calling thread's namespace; `flags` are XDP_FLAGS_*. Linux 5.9."""
        return self.attach(ifindex, BPF_XDP, flags, f"interface {ifindex}")

    cdef Link attach(self, int target, int kind, unsigned int flags, str where):
        cdef bpf_link_create_opts opts
        cdef int fd = self.alive(), result
        memset(&opts, 0, sizeof(opts))
        opts.sz = sizeof(opts)
        opts.flags = flags
        with nogil:
            result = bpf_link_create(fd, target, kind, &opts)
        return Link(_check(result, f"attaching program {self.name} to {where}"))

    def run(self, const uint8_t[::1] data=None, const uint8_t[::1] context=None, unsigned int room=0, int repeat=1):
        """BPF_PROG_TEST_RUN: run the program `repeat` times on a packet and/or a context, away from any traffic.

        data : bytes of the packet. context : bytes of the program type's context struct.
        room : bytes to keep of the packet afterwards. duration_ns : mean per run.
        """
        cdef bpf_test_run_opts opts
        cdef int fd = self.alive(), result
        cdef bytearray packet = bytearray(room), after = bytearray(0 if context is None else context.shape[0])
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
        _check(result, f"test run of program {self.name}")
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
        _check(result, f"live run of program {self.name}")
        return opts.duration


cdef class Map(_Descriptor):
    """A BPF map: of an Object (its descriptor belongs to the object), or `Map.open` of a pin.

    key_dtype, value_dtype : numpy dtypes, from BTF where there is any, else opaque bytes. A per-CPU map takes and gives
    one value per possible CPU: arrays of shape (n, cpus).
    """

    cdef Object owner
    cdef bpf_map *ptr
    cdef readonly object key_dtype
    cdef readonly object value_dtype
    cdef readonly int type
    cdef readonly tuple value_shape
    cdef uint32_t capacity

    @staticmethod
    def open(path, key_dtype=None, value_dtype=None):
        """The map pinned at `path`, its layouts as given (the sizes are checked)."""
        cdef bpf_map_info info
        cdef uint32_t size = sizeof(info)
        cdef Map map = Map(_open_pin(path))
        memset(&info, 0, sizeof(info))
        _check(bpf_obj_get_info_by_fd(map.fd, &info, &size), f"reading about the map at {os.fsdecode(path)}")
        map.describe(info.type, info.max_entries, key_dtype, info.key_size, value_dtype, info.value_size)
        return map

    cdef describe_from_btf(self, const btf *types):
        cdef uint32_t key = bpf_map__btf_key_type_id(self.ptr), value = bpf_map__btf_value_type_id(self.ptr)
        cdef int section = -1
        if value == 0 and types != NULL:  # the map of a section of global variables: named like the section
            section = btf__find_by_name_kind(
                types, ("." + self.name.rpartition(".")[2]).encode(), BTF_KIND_DATASEC)
            value = section if section > 0 else 0
        self.describe(bpf_map__type(self.ptr), bpf_map__max_entries(self.ptr),
                      _dtype(types, key) if key else None, bpf_map__key_size(self.ptr),
                      _dtype(types, value) if value else None, bpf_map__value_size(self.ptr))

    cdef describe(self, int type, uint32_t capacity, key_dtype, uint32_t key_size, value_dtype, uint32_t value_size):
        cdef bint per_cpu = type in (
            BPF_MAP_TYPE_PERCPU_HASH, BPF_MAP_TYPE_PERCPU_ARRAY, BPF_MAP_TYPE_LRU_PERCPU_HASH)
        self.type, self.capacity = type, capacity
        self.key_dtype = _sized(key_dtype, key_size, key_size)
        self.value_dtype = _sized(value_dtype, value_size, (value_size + 7) // 8 * 8 if per_cpu else value_size)
        self.value_shape = (libbpf_num_possible_cpus(),) if per_cpu else ()

    cdef int alive(self) except -1:
        if self.owner is None:
            return _Descriptor.alive(self)
        self.owner.alive()
        if not self.owner.loaded:
            raise ValueError(f"BPF object {self.owner.name} is not loaded")
        return bpf_map__fd(self.ptr)

    @property
    def name(self):
        if self.owner is None:
            return f"fd {self.fd}"
        self.owner.alive()
        return bpf_map__name(self.ptr).decode()

    @property
    def max_entries(self):
        return self.capacity

    @max_entries.setter
    def max_entries(self, uint32_t value):
        """How many entries the map is made for; only before its object is loaded."""
        if self.owner is None or self.owner.loaded:
            raise ValueError(f"map {self.name} exists already: its size is fixed")
        self.owner.alive()
        _check(bpf_map__set_max_entries(self.ptr, value), f"sizing map {self.name}")
        self.capacity = value

    cdef _array(self, items, dtype, tuple shape, str what):
        """`items` as a contiguous array of n rows."""
        array = np.ascontiguousarray(items, dtype)
        if array.ndim == 0 or (shape and array.ndim == 1):
            array = array.reshape((1, *array.shape))
        if array.shape[1:] != shape:
            raise ValueError(f"{what} of map {self.name} must have shape (n, *{shape}), not {array.shape}")
        return array

    def update(self, keys, values, uint64_t flags=BPF_ANY):
        """Write n entries in one call: one batched system call where the map type has it, else a loop in C.

        keys : (n,) of key_dtype. values : (n,) of value_dtype, (n, cpus) for a per-CPU map.
        flags : BPF_ANY, BPF_NOEXIST, BPF_EXIST. On an error the entries before the one it names are written.
        """
        cdef int fd = self.alive(), result
        key_rows = self._array(keys, self.key_dtype, (), "keys")
        value_rows = self._array(values, self.value_dtype, self.value_shape, "values")
        if len(key_rows) != len(value_rows):
            raise ValueError(f"{len(key_rows)} keys but {len(value_rows)} values for map {self.name}")
        if len(key_rows) == 0:
            return
        cdef const uint8_t[::1] key = key_rows.view(np.uint8).ravel()
        cdef const uint8_t[::1] value = value_rows.reshape(-1).view(np.uint8)
        cdef uint32_t n = <uint32_t>len(key_rows), count = n, done = 0
        cdef size_t key_size = key.shape[0] // n, value_size = value.shape[0] // n
        cdef bpf_map_batch_opts opts
        memset(&opts, 0, sizeof(opts))
        opts.sz = sizeof(opts)
        opts.elem_flags = flags
        with nogil:
            result = -ENOTSUPP
            if n > 1:
                result = bpf_map_update_batch(fd, &key[0], &value[0], &count, &opts)
                done = count
            if result == -ENOTSUPP:
                done = 0
                while done < n:
                    result = bpf_map_update_elem(fd, &key[done * key_size], &value[done * value_size], flags)
                    if result < 0:
                        break
                    done += 1
        _check(result, f"updating map {self.name}, entry {done} of {n}")

    def delete(self, keys):
        """Delete n entries in one call. A key that is not there: KeyError, the ones before it are gone."""
        cdef int fd = self.alive(), result = 0
        key_rows = self._array(keys, self.key_dtype, (), "keys")
        if len(key_rows) == 0:
            return
        cdef const uint8_t[::1] key = key_rows.view(np.uint8).ravel()
        cdef uint32_t n = <uint32_t>len(key_rows), count = n, done = 0
        cdef size_t key_size = key.shape[0] // n
        cdef bpf_map_batch_opts opts
        memset(&opts, 0, sizeof(opts))
        opts.sz = sizeof(opts)
        with nogil:
            result = -ENOTSUPP
            if n > 1:
                result = bpf_map_delete_batch(fd, &key[0], &count, &opts)
                done = count
            if result == -ENOTSUPP:
                done = 0
                while done < n:
                    result = bpf_map_delete_elem(fd, &key[done * key_size])
                    if result < 0:
                        break
                    done += 1
        if result == -ENOENT:
            raise KeyError(key_rows[min(done, n - 1)])
        _check(result, f"deleting from map {self.name}, entry {done} of {n}")

    def lookup(self, keys):
        """The values of n keys: (n,) of value_dtype, (n, cpus) for a per-CPU map. A missing key: KeyError."""
        cdef int fd = self.alive(), result = 0
        key_rows = self._array(keys, self.key_dtype, (), "keys")
        value_rows = np.zeros((len(key_rows), *self.value_shape), self.value_dtype)
        if len(key_rows) == 0:
            return value_rows
        cdef const uint8_t[::1] key = key_rows.view(np.uint8).ravel()
        cdef uint8_t[::1] value = value_rows.reshape(-1).view(np.uint8)
        cdef size_t n = len(key_rows), done = 0
        cdef size_t key_size = key.shape[0] // n, value_size = value.shape[0] // n
        with nogil:
            while done < n:
                result = bpf_map_lookup_elem(fd, &key[done * key_size], &value[done * value_size])
                if result < 0:
                    break
                done += 1
        if result == -ENOENT:
            raise KeyError(key_rows[done])
        _check(result, f"looking up in map {self.name}")
        return value_rows

    def items(self):
        """All entries as (keys, values), one row an entry, in the kernel's order.

        Reads in batches where the map type has them. A map that changes meanwhile may give an entry twice or not at all.
        """
        cdef int fd = self.alive(), result = 0
        cdef uint32_t room = min(max(self.capacity, 1), 4096), count = 0
        # A position is a key or a kernel's own u32, whichever the map type has.
        cdef bytearray first = bytearray(self.key_dtype.itemsize + 8), second = bytearray(self.key_dtype.itemsize + 8)
        cdef char *position = first
        cdef char *following = second
        cdef uint8_t[::1] key
        cdef uint8_t[::1] value
        cdef bint started = False
        key_parts, value_parts = [], []
        while True:
            key_rows = np.zeros(room, self.key_dtype)
            value_rows = np.zeros((room, *self.value_shape), self.value_dtype)
            key, value = key_rows.view(np.uint8), value_rows.reshape(-1).view(np.uint8)
            count = room
            with nogil:
                result = bpf_map_lookup_batch(
                    fd, position if started else NULL, following, &key[0], &value[0], &count, NULL)
            if result == -ENOTSUPP and not started:
                return self._items_one_by_one()
            if result == -ENOSPC and room < self.capacity:  # one hash bucket holds more than `room`
                room = min(2 * room, self.capacity)
                continue
            if result < 0 and result != -ENOENT:
                _check(result, f"reading map {self.name}")
            key_parts.append(key_rows[:count])
            value_parts.append(value_rows[:count])
            if result == -ENOENT:
                return np.concatenate(key_parts), np.concatenate(value_parts)
            started = True
            position, following = following, position

    def _items_one_by_one(self):
        cdef int fd = self.alive(), result
        key = np.zeros(1, self.key_dtype)
        cdef uint8_t[::1] now = key.view(np.uint8)
        cdef bint started = False
        keys = []
        while True:
            with nogil:
                result = bpf_map_get_next_key(fd, &now[0] if started else NULL, &now[0])
            if result == -ENOENT:
                break
            _check(result, f"reading map {self.name}")
            started = True
            keys.append(key.copy())
        found = np.concatenate(keys) if keys else key[:0]
        return found, self.lookup(found)

    def __getitem__(self, key):
        return self.lookup([key] if not isinstance(key, np.ndarray) else key.reshape(1))[0]

    def __len__(self):
        return len(self.items()[0])


cdef _sized(dtype, uint32_t size, uint32_t stride):
    """`dtype`, checked to be of `size` bytes, padded to `stride`; opaque bytes where there is none."""
    if size == 0:
        return np.dtype("V0")
    dtype = np.dtype(f"V{size}") if dtype is None else np.dtype(dtype)
    if dtype.itemsize != size:
        raise ValueError(f"dtype {dtype} has {dtype.itemsize} bytes, the map has {size}")
    if stride == size:
        return dtype
    if dtype.names is None:
        dtype = np.dtype([("value", dtype)])
    return np.dtype({"names": list(dtype.names), "formats": [dtype.fields[name][0] for name in dtype.names],
                     "offsets": [dtype.fields[name][1] for name in dtype.names], "itemsize": stride})


cdef _dtype(const btf *types, uint32_t id):
    """The numpy dtype of a BTF type; what numpy cannot say (unions, pointers) stays opaque bytes (None: no size)."""
    cdef const btf_type *t = btf__type_by_id(types, id)
    cdef uint32_t kind, i
    cdef const btf_array *array
    cdef const char *name
    order = "="
    while t != NULL and btf_kind(t) in (BTF_KIND_TYPEDEF, BTF_KIND_VOLATILE, BTF_KIND_CONST, BTF_KIND_VAR):
        if btf_kind(t) == BTF_KIND_TYPEDEF and btf__name_by_offset(types, t.name_off).startswith(b"__be"):
            order = ">"
        t = btf__type_by_id(types, t.type)
    if t == NULL:
        return None
    kind = btf_kind(t)
    if kind == BTF_KIND_INT:
        return np.dtype(f"{order}{'i' if btf_int_encoding(t) & BTF_INT_SIGNED else 'u'}{t.size}")
    if kind == BTF_KIND_ENUM:
        return np.dtype(f"u{t.size}")
    if kind == BTF_KIND_ARRAY:
        array = get_array(t)
        element = _dtype(types, array.type)
        return None if element is None else np.dtype((element, (array.nelems,)))
    names, formats, offsets = [], [], []
    if kind == BTF_KIND_STRUCT:
        for i in range(btf_vlen(t)):
            names.append(btf__name_by_offset(types, btf_members(t)[i].name_off).decode() or f"_{i}")
            formats.append(_dtype(types, btf_members(t)[i].type))
            offsets.append(btf_member_bit_offset(t, i) // 8)
    elif kind == BTF_KIND_DATASEC:
        for i in range(btf_vlen(t)):
            name = btf__name_by_offset(types, btf__type_by_id(types, btf_var_secinfos(t)[i].type).name_off)
            names.append(name.decode())
            formats.append(_dtype(types, btf_var_secinfos(t)[i].type) or np.dtype(f"V{btf_var_secinfos(t)[i].size}"))
            offsets.append(btf_var_secinfos(t)[i].offset)
    else:
        return None
    if None in formats:
        return None
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": t.size})


cdef _link_info(int fd):
    cdef bpf_link_info info
    cdef uint32_t size = sizeof(info)
    cdef int result
    memset(&info, 0, sizeof(info))
    with nogil:
        result = bpf_obj_get_info_by_fd(fd, &info, &size)
    _check(result, "reading about a link")
    of_netns, of_xdp = info.type == BPF_LINK_TYPE_NETNS, info.type == BPF_LINK_TYPE_XDP
    return LinkInfo(info.id, info.type, info.prog_id, info.netns.netns_ino if of_netns else 0,
                    info.netns.attach_type if of_netns else 0, info.xdp.ifindex if of_xdp else 0)


cdef _program_info(int fd):
    cdef bpf_prog_info info
    cdef uint32_t size = sizeof(info)
    cdef int result
    memset(&info, 0, sizeof(info))
    with nogil:
        result = bpf_obj_get_info_by_fd(fd, &info, &size)
    _check(result, "reading about a program")
    return ProgramInfo(info.id, info.name.decode("utf-8", "replace"), info.type, info.run_time_ns, info.run_cnt)


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
        _check(result, "enumerating BPF links")
        ids.append(id)


def link_info(uint32_t id):
    """LinkInfo of the link with this id; None when it is gone. CAP_SYS_ADMIN."""
    return _by_id(bpf_link_get_fd_by_id(id), _link_info, f"opening link {id}")


def program_info(uint32_t id):
    """ProgramInfo of the program with this id; None when it is gone. CAP_SYS_ADMIN."""
    return _by_id(bpf_prog_get_fd_by_id(id), _program_info, f"opening program {id}")


ctypedef object (*_reader)(int)


cdef _by_id(int fd, _reader read, str tried):
    if fd == -ENOENT:
        return None
    _check(fd, tried)
    try:
        return read(fd)
    finally:
        os.close(fd)
