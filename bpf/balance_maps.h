/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/* What balance.bpf.c shares with user space: slots, counters, tables, and whom it tells of its choices. */
#define SLOTS 128
#define NOBODY 0xffff /* the slot of a bucket that nobody has */

struct counters {
	__u64 selected;
	__u64 empty;      /* its slot had no socket */
	__u64 fallback;   /* given to this slot because its own had no socket */
	__u64 unreadable; /* no IP header where there should be one */
	__u64 wrong;      /* the socket in the slot is of another group */
	__u64 untold;     /* choices for which the ring buffer had no room */
};

/* What user space changes while the program runs. */
struct control {
	__u64 leaving[SLOTS / 64]; /* slots that are being drained sender by sender, a bit each */
	__u32 draining;            /* whether any is */
	__u32 size;                /* slots, as who made or resized it has said; for user space */
};

struct known {
	__u64 seen; /* ns, CLOCK_MONOTONIC */
	__u32 slot;
	__u32 unused;
};

struct prefix {
	__u32 length; /* bits, of the version and the mapped address */
	__u32 version; /* 4 or 6: ::/0 is no prefix of IPv4 addresses */
	__u8 address[16];
};

struct choice { /* what a watcher is told */
	struct flow flow;
	__u32 bucket;
	__u32 slot;    /* whose it is; SLOTS: nobody's */
	__u32 taken;   /* who gets it; SLOTS: nobody, or whom the kernel's hash says */
	__s32 outcome; /* 0: selected; else what the kernel answered, a negative errno */
	__u64 time;    /* ns, CLOCK_MONOTONIC */
};

const struct choice *const volatile choice_layout; /* so that the object describes the struct */

struct table {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, BUCKETS);
	__type(key, __u32);
	__type(value, __u32);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct table);
} tables SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__uint(max_entries, SLOTS);
	__type(key, __u32);
	__type(value, __u64);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SLOTS + 1); /* the last is of those that have no slot */
	__type(key, __u32);
	__type(value, struct counters);
} counts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct control);
} control SEC(".maps");

struct { /* one choice in so many is told to the ring buffer; 0: none */
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} sampling SEC(".maps");

struct { /* what the table in force was made from, or is to be */
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SLOTS);
	__type(key, __u32);
	__type(value, __u32);
} weights SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1 << 16);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix);
	__type(value, __u32);
} places SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct known);
} senders SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);
} choices SEC(".maps");
