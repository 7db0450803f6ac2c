/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/* What the dispatcher's program reads: the tables that fastrecv/steering_tables.py lays out, sockets and counters. */
#define AF_INET 2 /* include/linux/socket.h */
#define IPPROTO_TCP 6
/* include/uapi/asm-generic/errno.h, errno-base.h */
#define EEXIST 17
#define ESOCKTNOSUPPORT 94
#define EAFNOSUPPORT 97

#define MEMBERS 4     /* sockets kept of a destination */
#define FAN 8         /* intervals of a node */
#define DEPTH 16      /* levels that both halves of an IPv6 address may take together */
#define CONDITIONS 32 /* rules of one prefix and port at most */

/* An entry of `ports`: kind in the top two bits, number below. */
#define NOTHING 0
#define ANSWER 1
#define TREE 2
#define TABLE 3
#define NUMBER 0x3fffffff

/* An entry of first and blocks4: 0, the first of some rules, or with this bit the next block (IPv4), a tree (IPv6). */
#define BLOCK 0x80000000

/* A rule. */
#define LAST 1    /* none follows */
#define DROP 2    /* the verdict is a drop */
#define ON_PASS 4 /* a missing socket leaves the packet to the ordinary lookup */

struct words { /* arrays have a stride of 8 bytes: 16 words an element keep them dense */
	__u32 word[16];
};

struct block {
	__u32 entry[256];
};

/*
 * A node of a tree over intervals of 64 bits: child[i] holds from key[i - 1] on, up to below key[i]. Bulk-loaded
 * in user space, so all leaves are equally deep.
 */
#define LEAF 0x80000000 /* the child is the first of some rules, 0 none */
#define LOW 0x40000000  /* the child is the root of a tree over the low half of an IPv6 address */

struct node {
	__u64 key[FAN - 1];
	__u32 child[FAN];
};

struct rule {
	__u32 destination;
	__u32 flags;
	__u32 ifindex;   /* 0: any */
	__u32 source[4]; /* network byte order; IPv4 in the first word */
	__u32 mask[4];
};

struct counters {
	__u64 lookups; /* packets that a rule of this destination took */
	__u64 misses;  /* of them, without a socket to give them to */
	/* Of them, whose sockets the kernel refused, by the last one's error: */
	__u64 unfit;  /* ESOCKTNOSUPPORT: connected, or listens no more */
	__u64 family; /* EAFNOSUPPORT */
	__u64 taken;  /* EEXIST: a program attached before this one has chosen a socket */
	__u64 other;
};

/* Set before load. */
const volatile __u32 conditions; /* whether any rule has a source or an interface */
const volatile __u32 as_if_from; /* the interface that a test run stands for; the kernel lets it name none */

/* Sizes are set before load. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct words);
} ports SEC(".maps"), first SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct block);
} blocks4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct node);
} nodes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct rule);
} rules SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} counts SEC(".maps");
