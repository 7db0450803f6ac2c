# What fastrecv uses of libbpf (API of 1.1) and of <linux/bpf.h>: declarations only.

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

cdef extern from "<linux/bpf.h>" nogil:
    enum:
        BPF_F_LOCK
        BPF_F_RDONLY
        BPF_SK_LOOKUP
        BPF_XDP
        BPF_TRACE_ITER
        BPF_STATS_RUN_TIME
        BPF_F_TEST_XDP_LIVE_FRAMES
        BPF_PROG_TYPE_UNSPEC
        BPF_PROG_TYPE_SK_REUSEPORT
        BPF_MAP_TYPE_ARRAY
        BPF_MAP_TYPE_PERCPU_HASH
        BPF_MAP_TYPE_PERCPU_ARRAY
        BPF_MAP_TYPE_LRU_PERCPU_HASH
        BPF_MAP_TYPE_PERCPU_CGROUP_STORAGE
        BPF_LINK_TYPE_XDP
        BPF_LINK_TYPE_NETNS

    struct xdp_md:
        uint32_t data
        uint32_t data_end
        uint32_t ingress_ifindex

    struct bpf_prog_info:
        uint32_t type
        uint32_t id
        uint8_t tag[8]
        char name[16]
        uint64_t run_time_ns
        uint64_t run_cnt

    struct bpf_map_info:
        uint32_t type
        uint32_t id
        uint32_t key_size
        uint32_t value_size
        uint32_t max_entries
        uint32_t map_flags
        char name[16]

    struct _link_netns:
        uint32_t netns_ino
        uint32_t attach_type

    struct _link_xdp:
        uint32_t ifindex

    struct bpf_link_info:
        uint32_t type
        uint32_t id
        uint32_t prog_id
        _link_netns netns
        _link_xdp xdp

cdef extern from "<bpf/bpf.h>" nogil:
    struct bpf_map_batch_opts:
        size_t sz
        uint64_t elem_flags

    struct bpf_obj_get_opts:
        size_t sz
        uint32_t file_flags

    struct bpf_link_create_opts:
        size_t sz
        uint32_t flags

    struct bpf_link_update_opts:
        size_t sz

    struct bpf_test_run_opts:
        size_t sz
        const void *data_in
        void *data_out
        uint32_t data_size_in
        uint32_t data_size_out
        const void *ctx_in
        void *ctx_out
        uint32_t ctx_size_in
        uint32_t ctx_size_out
        uint32_t retval
        int repeat
        uint32_t duration
        uint32_t flags
        uint32_t batch_size

    int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags)
    int bpf_map_lookup_elem(int fd, const void *key, void *value)
    int bpf_map_delete_elem(int fd, const void *key)
    int bpf_map_get_next_key(int fd, const void *key, void *next_key)
    int bpf_map_update_batch(int fd, const void *keys, const void *values, uint32_t *count,
                             const bpf_map_batch_opts *opts)
    int bpf_map_lookup_batch(int fd, void *in_batch, void *out_batch, void *keys, void *values,
                             uint32_t *count, const bpf_map_batch_opts *opts)
    int bpf_map_delete_batch(int fd, const void *keys, uint32_t *count,
                             const bpf_map_batch_opts *opts)
    int bpf_obj_pin(int fd, const char *path)
    int get_pinned "bpf_obj_get_opts" (const char *path, const bpf_obj_get_opts *opts)
    int bpf_map_create(int map_type, const char *map_name, uint32_t key_size, uint32_t value_size,
                       uint32_t max_entries, const void *opts)
    int bpf_obj_get_info_by_fd(int fd, void *info, uint32_t *length)
    int bpf_link_create(int prog_fd, int target_fd, int attach_type,
                        const bpf_link_create_opts *opts)
    int bpf_iter_create(int link_fd)
    int bpf_raw_tracepoint_open(const char *name, int prog_fd)
    int bpf_link_update(int link_fd, int prog_fd, const bpf_link_update_opts *opts)
    int bpf_link_detach(int link_fd)
    int bpf_link_get_next_id(uint32_t start, uint32_t *next)
    int bpf_link_get_fd_by_id(uint32_t id)
    int bpf_prog_get_fd_by_id(uint32_t id)
    int bpf_enable_stats(int kind)
    int bpf_prog_test_run_opts(int prog_fd, bpf_test_run_opts *opts)

cdef extern from "<bpf/btf.h>" nogil:
    enum:
        BTF_KIND_INT
        BTF_KIND_ARRAY
        BTF_KIND_STRUCT
        BTF_KIND_ENUM
        BTF_KIND_TYPEDEF
        BTF_KIND_VOLATILE
        BTF_KIND_CONST
        BTF_KIND_VAR
        BTF_KIND_DATASEC
        BTF_INT_SIGNED

    struct btf:
        pass

    struct btf_type:
        uint32_t name_off
        uint32_t size
        uint32_t type

    struct btf_array:
        uint32_t type
        uint32_t nelems

    struct btf_member:
        uint32_t name_off
        uint32_t type

    struct btf_var_secinfo:
        uint32_t type
        uint32_t offset
        uint32_t size

    const btf_type *btf__type_by_id(const btf *types, uint32_t id)
    const char *btf__name_by_offset(const btf *types, uint32_t offset)
    int32_t btf__find_by_name_kind(const btf *types, const char *name, uint32_t kind)
    uint32_t btf_kind(const btf_type *t)
    uint32_t btf_vlen(const btf_type *t)
    uint8_t btf_int_encoding(const btf_type *t)
    uint32_t btf_member_bit_offset(const btf_type *t, uint32_t index)
    uint32_t btf_member_bitfield_size(const btf_type *t, uint32_t index)
    btf_member *btf_members(const btf_type *t)
    btf_array *get_array "btf_array" (const btf_type *t)
    btf_var_secinfo *btf_var_secinfos(const btf_type *t)

cdef extern from "<bpf/libbpf.h>" nogil:
    struct bpf_object:
        pass

    struct bpf_program:
        pass

    struct bpf_map:
        pass

    struct bpf_object_open_opts:
        size_t sz
        const char *object_name
        const char *pin_root_path

    const char *libbpf_version_string()
    int libbpf_num_possible_cpus()
    bpf_object *bpf_object__open_mem(const void *data, size_t size,
                                     const bpf_object_open_opts *opts)
    int bpf_object__load(bpf_object *obj)
    void bpf_object__close(bpf_object *obj)
    btf *bpf_object__btf(const bpf_object *obj)
    bpf_map *bpf_object__next_map(const bpf_object *obj, const bpf_map *previous)
    bpf_program *bpf_object__next_program(const bpf_object *obj, bpf_program *previous)
    const char *bpf_program__name(const bpf_program *prog)
    const char *bpf_program__section_name(const bpf_program *prog)
    int bpf_program__type(const bpf_program *prog)
    int bpf_program__set_type(bpf_program *prog, int type)
    int bpf_program__fd(const bpf_program *prog)
    const char *bpf_map__name(const bpf_map *map)
    int bpf_map__fd(const bpf_map *map)
    int bpf_map__type(const bpf_map *map)
    uint32_t bpf_map__key_size(const bpf_map *map)
    uint32_t bpf_map__value_size(const bpf_map *map)
    uint32_t bpf_map__max_entries(const bpf_map *map)
    int bpf_map__set_pin_path(bpf_map *map, const char *path)
    int bpf_map__reuse_fd(bpf_map *map, int fd)
    int bpf_map__set_max_entries(bpf_map *map, uint32_t max_entries)
    uint32_t bpf_map__btf_key_type_id(const bpf_map *map)
    uint32_t bpf_map__btf_value_type_id(const bpf_map *map)
    const void *bpf_map__initial_value(bpf_map *map, size_t *size)
