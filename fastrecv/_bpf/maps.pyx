"""BPF maps: n keys and values in one call, as numpy arrays whose dtypes come from the object's BTF."""

import os

import numpy as np

from fastrecv._bpf.handle cimport ENOTSUPP, Descriptor, check, open_pin
from fastrecv._bpf.layout cimport dtype_of
from fastrecv._bpf.libbpf cimport (
    BPF_F_LOCK,
    BPF_MAP_TYPE_ARRAY,
    BPF_MAP_TYPE_LRU_PERCPU_HASH,
    BPF_MAP_TYPE_PERCPU_ARRAY,
    BPF_MAP_TYPE_PERCPU_CGROUP_STORAGE,
    BPF_MAP_TYPE_PERCPU_HASH,
    bpf_map,
    bpf_map__btf_key_type_id,
    bpf_map__btf_value_type_id,
    bpf_map__fd,
    bpf_map__key_size,
    bpf_map__max_entries,
    bpf_map__reuse_fd,
    bpf_map__set_max_entries,
    bpf_map__type,
    bpf_map__value_size,
    bpf_map_batch_opts,
    bpf_map_create,
    bpf_map_delete_batch,
    bpf_map_delete_elem,
    bpf_map_get_next_key,
    bpf_map_info,
    bpf_map_lookup_batch,
    bpf_map_lookup_elem,
    bpf_map_update_batch,
    bpf_map_update_elem,
    bpf_obj_get_info_by_fd,
    bpf_object__btf,
    btf,
    libbpf_num_possible_cpus,
)
from fastrecv._bpf.objects cimport Object, map_named
from libc.errno cimport ENOENT, ENOSPC
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset


cdef class Map(Descriptor):
    """A BPF map: of an Object (its descriptor belongs to the object), `Map.open` of a pin, or `Map.inherited`.

    key_dtype, value_dtype : numpy dtypes, from BTF where there is any, else opaque bytes; an array is the one field
    "value" of a struct, and so is a scalar that the kernel pads. A per-CPU map takes and gives
    one value per possible CPU: arrays of shape (n, cpus).
    """

    cdef Object owner
    cdef bpf_map *ptr
    cdef readonly object key_dtype
    cdef readonly object value_dtype
    cdef readonly int type
    cdef readonly tuple value_shape
    cdef uint32_t capacity
    cdef str _name

    def __init__(self):
        raise TypeError("maps are found in Object.maps, made by Map.array, or opened by Map.open")

    @staticmethod
    def array(str name not None, value_dtype, uint32_t max_entries):
        """A new ARRAY map that belongs to no object: keys 0 to max_entries - 1. CAP_BPF."""
        cdef bytes encoded = name.encode()
        cdef Map map = Map.__new__(Map)
        size = np.dtype(value_dtype).itemsize
        map.fd = check(bpf_map_create(BPF_MAP_TYPE_ARRAY, encoded, 4, size, max_entries, NULL), f"making map {name}")
        map._name = name
        map.describe(BPF_MAP_TYPE_ARRAY, max_entries, np.uint32, 4, value_dtype, size)
        return map

    @staticmethod
    def open(path, key_dtype=None, value_dtype=None, *, bint read_only=False):
        """The map pinned at `path`, its layouts as given (the sizes are checked).

        read_only : needs no more than read permission on the pin.
        """
        return Map.inherited(open_pin(path, read_only), key_dtype, value_dtype)

    @staticmethod
    def inherited(int fd, key_dtype=None, value_dtype=None):
        """The map of a descriptor, which is its own from now on, its layouts as given (the sizes are checked)."""
        cdef bpf_map_info info
        cdef uint32_t size = sizeof(info)
        cdef Map map = Map.__new__(Map)
        memset(&info, 0, sizeof(info))
        map.fd = fd
        try:
            check(bpf_obj_get_info_by_fd(map.fd, &info, &size), f"reading about the map of descriptor {fd}")
            map._name = info.name.decode("utf-8", "replace")
            map.describe(
                info.type, info.max_entries, key_dtype, info.key_size, value_dtype, info.value_size)
        except BaseException:
            map.close()
            raise
        return map

    @staticmethod
    def _of(Object owner not None, str name not None):
        """The map `name` of an object."""
        cdef Map map = Map.__new__(Map)
        cdef const btf *types = bpf_object__btf(owner.ptr)
        map.owner, map.ptr = owner, map_named(owner, name)
        cdef uint32_t key = bpf_map__btf_key_type_id(map.ptr), value = bpf_map__btf_value_type_id(map.ptr)
        map.describe(bpf_map__type(map.ptr), bpf_map__max_entries(map.ptr),
                     dtype_of(types, key) if key else None, bpf_map__key_size(map.ptr),
                     dtype_of(types, value) if value else None, bpf_map__value_size(map.ptr))
        map._name = name
        return map

    cdef describe(self, int type, uint32_t capacity, key_dtype, uint32_t key_size, value_dtype, uint32_t value_size):
        cdef bint per_cpu = type in (
            BPF_MAP_TYPE_PERCPU_HASH, BPF_MAP_TYPE_PERCPU_ARRAY, BPF_MAP_TYPE_LRU_PERCPU_HASH,
            BPF_MAP_TYPE_PERCPU_CGROUP_STORAGE)
        self.type, self.capacity = type, capacity
        self.key_dtype = _sized(key_dtype, key_size, key_size)
        self.value_dtype = _sized(value_dtype, value_size, (value_size + 7) // 8 * 8 if per_cpu else value_size)
        self.value_shape = (libbpf_num_possible_cpus(),) if per_cpu else ()

    cdef int alive(self) except -1:
        if self.owner is None:
            return Descriptor.alive(self)
        self.owner.alive()
        if not self.owner.loaded:
            raise ValueError(f"BPF object {self.owner.name} is not loaded")
        return bpf_map__fd(self.ptr)

    @property
    def name(self):
        return self._name

    @property
    def id(self):
        """What the kernel calls the map; a lookup in a map of maps gives it."""
        cdef bpf_map_info info
        cdef uint32_t size = sizeof(info)
        memset(&info, 0, sizeof(info))
        check(bpf_obj_get_info_by_fd(self.alive(), &info, &size), f"reading about map {self._name}")
        return info.id

    @property
    def max_entries(self):
        return self.capacity

    @max_entries.setter
    def max_entries(self, uint32_t value):
        """How many entries the map is made for; only before its object is loaded."""
        if self.owner is None or self.owner.loaded:
            raise ValueError(f"map {self.name} exists already: its size is fixed")
        self.owner.alive()
        check(bpf_map__set_max_entries(self.ptr, value), f"sizing map {self.name}")
        self.capacity = value

    def reuse(self, Map other not None):
        """Let the object use `other` for this map, its size and layout included; only before the object is loaded."""
        cdef int fd = other.alive()
        if self.owner is None or self.owner.loaded:
            raise ValueError(f"map {self.name} exists already")
        self.owner.alive()
        if other.type != self.type or other.key_dtype != self.key_dtype or other.value_dtype != self.value_dtype:
            raise ValueError(f"map {self.name} cannot reuse map {other.name}: their layouts differ")
        check(bpf_map__reuse_fd(self.ptr, fd), f"reusing map {other.name}")
        self.capacity = other.capacity

    cdef _rows(self, items, dtype, tuple shape, str what):
        """`items` as n rows of `dtype`, contiguous, with every byte of padding 0 (the kernel hashes padding too)."""
        if dtype.itemsize == 0:
            raise ValueError(f"map {self._name} has no {what}")
        if dtype.names and isinstance(items, np.ndarray) and items.dtype.names != dtype.names:
            raise ValueError(f"{what} of map {self._name} must be of {dtype}, not of {items.dtype}")
        array = np.asarray(items, dtype)
        if dtype.kind in "iu" and isinstance(items, np.ndarray) and not np.array_equal(array, items):
            raise OverflowError(f"{what} of map {self._name} do not all fit into {dtype}")
        if array.ndim == 0 or (shape and array.ndim == 1):
            array = array.reshape((1, *array.shape))
        if array.shape[1:] != shape:
            raise ValueError(f"{what} of map {self._name} must have shape (n, *{shape}), not {array.shape}")
        rows = np.zeros(array.shape, dtype)
        _fill(rows, array)
        return rows

    def update(self, keys, values, uint64_t flags=0):
        """Write n entries in one call: one batched system call where the map type has it, else a loop in C.

        keys : (n,) of key_dtype. values : (n,) of value_dtype, (n, cpus) for a per-CPU map.
        flags : BPF_ANY (0), BPF_NOEXIST (1), BPF_EXIST (2), BPF_F_LOCK (4). On an error the entries before the one that
        it names are written. Integers that do not fit: OverflowError, nothing is written.
        """
        cdef int fd = self.alive(), result
        key_rows = self._rows(keys, self.key_dtype, (), "keys")
        value_rows = self._rows(values, self.value_dtype, self.value_shape, "values")
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
            if n > 1 and not flags & ~<uint64_t>BPF_F_LOCK:  # batches know no other flag
                result = bpf_map_update_batch(fd, &key[0], &value[0], &count, &opts)
                done = 0 if count == n else count  # refused as a whole, the kernel leaves the count alone
            if result == -ENOTSUPP:
                done = 0
                while done < n:
                    result = bpf_map_update_elem(fd, &key[done * key_size], &value[done * value_size], flags)
                    if result < 0:
                        break
                    done += 1
        check(result, f"updating map {self.name}, entry {done} of {n}")

    def delete(self, keys):
        """Delete n entries in one call. A key that is not there: KeyError, the ones before it are gone."""
        cdef int fd = self.alive(), result = 0
        key_rows = self._rows(keys, self.key_dtype, (), "keys")
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
                done = 0 if count == n else count
            if result == -ENOTSUPP:
                done = 0
                while done < n:
                    result = bpf_map_delete_elem(fd, &key[done * key_size])
                    if result < 0:
                        break
                    done += 1
        if result == -ENOENT:
            raise KeyError(key_rows[done])
        check(result, f"deleting from map {self.name}, entry {done} of {n}")

    def lookup(self, keys):
        """The values of n keys: (n,) of value_dtype, (n, cpus) for a per-CPU map. A missing key: KeyError."""
        cdef int fd = self.alive(), result = 0
        key_rows = self._rows(keys, self.key_dtype, (), "keys")
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
        check(result, f"looking up in map {self.name}")
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
        cdef uint8_t[:, ::1] key
        cdef uint8_t[:, ::1] value
        cdef bint started = False
        if self.key_dtype.itemsize == 0:
            raise ValueError(f"map {self._name} has no keys")
        keys, values = [], []  # as bytes: concatenating rows of a struct dtype would lose its padding
        while True:
            key = np.zeros((room, self.key_dtype.itemsize), np.uint8)
            value = np.zeros((room, self._value_bytes()), np.uint8)
            count = room
            with nogil:
                result = bpf_map_lookup_batch(
                    fd, position if started else NULL, following, &key[0, 0], &value[0, 0], &count, NULL)
            if result == -ENOTSUPP and not started:
                return self._items_one_by_one()
            if result == -ENOSPC and room < self.capacity:  # one hash bucket holds more than `room`
                room = min(2 * room, self.capacity)
                continue
            if result < 0 and result != -ENOENT:
                check(result, f"reading map {self.name}")
            keys.append(np.asarray(key[:count]))
            values.append(np.asarray(value[:count]))
            if result == -ENOENT:
                return self._typed(keys, values)
            started = True
            position, following = following, position

    def _items_one_by_one(self):
        cdef int fd = self.alive(), result
        cdef uint8_t[::1] key = np.zeros(self.key_dtype.itemsize, np.uint8)
        cdef uint8_t[::1] value = np.zeros(self._value_bytes(), np.uint8)
        cdef bint started = False
        keys, values = [], []
        while True:
            with nogil:
                result = bpf_map_get_next_key(fd, &key[0] if started else NULL, &key[0])
            if result == -ENOENT:
                return self._typed(keys, values)
            check(result, f"reading map {self.name}")
            started = True
            with nogil:
                result = bpf_map_lookup_elem(fd, &key[0], &value[0])
            if result == -ENOENT:  # an empty slot of a SOCKMAP, or deleted meanwhile
                continue
            check(result, f"reading map {self.name}")
            keys.append(np.array(key)[None])
            values.append(np.array(value)[None])

    def _value_bytes(self):
        return self.value_dtype.itemsize * int(np.prod(self.value_shape, dtype=int))

    def _typed(self, keys, values):
        """Lists of byte rows as the arrays of keys and values."""
        key_bytes = np.concatenate([np.zeros((0, self.key_dtype.itemsize), np.uint8), *keys])
        value_bytes = np.concatenate([np.zeros((0, self._value_bytes()), np.uint8), *values])
        return (key_bytes.view(self.key_dtype)[:, 0],
                value_bytes.view(self.value_dtype).reshape(len(value_bytes), *self.value_shape))

    def __getitem__(self, key):
        return self.lookup([key] if not isinstance(key, np.ndarray) else key.reshape(1))[0]

    def __len__(self):
        return len(self.items()[0])


cdef _fill(target, source):
    """Assign field by field, so that nothing is written between the fields."""
    if target.dtype.names is None:
        target[...] = source
    else:
        for name in target.dtype.names:
            _fill(target[name], source[name])


cdef _sized(dtype, uint32_t size, uint32_t stride):
    """`dtype`, checked to be of `size` bytes, padded to `stride`; opaque bytes where there is none."""
    if size == 0:
        return np.dtype("V0")
    dtype = np.dtype(f"V{size}") if dtype is None else np.dtype(dtype)
    if dtype.itemsize != size:
        raise ValueError(f"dtype {dtype} has {dtype.itemsize} bytes, the map has {size}")
    if stride == size and dtype.subdtype is None:
        return dtype
    if dtype.names is None:  # numpy cannot pad a scalar, and would take an array apart
        dtype = np.dtype([("value", dtype)])
    return np.dtype({"names": list(dtype.names), "formats": [dtype.fields[name][0] for name in dtype.names],
                     "offsets": [dtype.fields[name][1] for name in dtype.names], "itemsize": stride})
