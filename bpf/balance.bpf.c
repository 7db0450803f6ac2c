// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * The balancer: which member of a reuseport group gets a sender.
 *
 *   key of the sender -> hash -> bucket -> slot -> socket
 *
 * Which bucket has which slot is a table that is exchanged as a whole (fastrecv/buckets.py makes it), so senders whose
 * bucket stays never move. User space computes the same hash: fastrecv/policies.py.
 */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2       /* include/linux/socket.h */
#define ETH_P_IP 0x0800 /* include/uapi/linux/if_ether.h */
#define ENOENT 2        /* include/uapi/asm-generic/errno-base.h */

#define BUCKETS 4096
#define SLOTS 128
#define NOBODY 0xffff /* the slot of a bucket that nobody has */

/* What is hashed. */
#define SOURCE 1
#define SOURCE_PORT 2
#define DESTINATION 4
#define DESTINATION_PORT 8

/* What becomes of a sender whose slot has no socket. */
#define EMPTY_DROP 0
#define EMPTY_KERNEL 1
#define EMPTY_NEXT 2

/* Set before load. Masks in network byte order; IPv4 addresses are ::ffff:a.b.c.d. */
const volatile __u32 fields;
const volatile __u32 source_mask4, source_mask6[4];
const volatile __u64 seed;
const volatile __u32 empty;

struct counters {
	__u64 selected;
	__u64 empty;     /* its slot had no socket */
	__u64 unreadable; /* no IP header where there should be one */
	__u64 wrong;     /* the socket in the slot is of another group */
};

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

struct flow { /* network byte order */
	__u32 source[4];
	__u32 destination[4];
	__u16 source_port;
	__u16 destination_port;
};

static __always_inline int flow_of_packet(struct sk_reuseport_md *md, struct flow *flow)
{
	__u16 ports[2];

	if (md->eth_protocol == bpf_htons(ETH_P_IP)) {
		flow->source[2] = flow->destination[2] = bpf_htonl(0xffff);
		if (bpf_skb_load_bytes_relative(md, 12, &flow->source[3], 4, BPF_HDR_START_NET) ||
		    bpf_skb_load_bytes_relative(md, 16, &flow->destination[3], 4, BPF_HDR_START_NET))
			return -1;
	} else if (bpf_skb_load_bytes_relative(md, 8, flow->source, 16, BPF_HDR_START_NET) ||
		   bpf_skb_load_bytes_relative(md, 24, flow->destination, 16, BPF_HDR_START_NET)) {
		return -1;
	}
	if (bpf_skb_load_bytes(md, 0, ports, sizeof(ports)))
		return -1;
	flow->source_port = ports[0];
	flow->destination_port = ports[1];
	return 0;
}

/* A connection of a listener that closes: it has no packet, but addresses of its own. */
static __always_inline void flow_of_socket(struct bpf_sock *sk, struct flow *flow)
{
	__u32 from4 = sk->dst_ip4, to4 = sk->src_ip4;
	__u32 from6[4] = { sk->dst_ip6[0], sk->dst_ip6[1], sk->dst_ip6[2], sk->dst_ip6[3] };
	__u32 to6[4] = { sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3] };
	int four = sk->family == AF_INET;

	/* Before the branch, or the compiler makes one load through a selected pointer, which the verifier refuses. */
	asm volatile("" : "+r"(from4), "+r"(from6[0]), "+r"(from6[1]), "+r"(from6[2]), "+r"(from6[3]));
	asm volatile("" : "+r"(to4), "+r"(to6[0]), "+r"(to6[1]), "+r"(to6[2]), "+r"(to6[3]));
	flow->source[0] = four ? 0 : from6[0];
	flow->source[1] = four ? 0 : from6[1];
	flow->source[2] = four ? bpf_htonl(0xffff) : from6[2];
	flow->source[3] = four ? from4 : from6[3];
	flow->destination[0] = four ? 0 : to6[0];
	flow->destination[1] = four ? 0 : to6[1];
	flow->destination[2] = four ? bpf_htonl(0xffff) : to6[2];
	flow->destination[3] = four ? to4 : to6[3];
	flow->source_port = sk->dst_port;
	flow->destination_port = bpf_htons(sk->src_port);
}

static __always_inline __u64 mixed(__u64 hash, __u32 high, __u32 low)
{
	hash = (hash ^ ((__u64)bpf_ntohl(high) << 32 | bpf_ntohl(low))) * 0x9e3779b97f4a7c15; /* 2^64 / golden ratio */
	return hash ^ hash >> 32;
}

static __always_inline __u32 bucket_of(const struct flow *flow)
{
	int four = !flow->source[0] && !flow->source[1] && flow->source[2] == bpf_htonl(0xffff);
	__u64 hash = seed;

	if (fields & SOURCE) {
		hash = mixed(hash, flow->source[0] & source_mask6[0], flow->source[1] & source_mask6[1]);
		hash = mixed(hash, four ? flow->source[2] : flow->source[2] & source_mask6[2],
			     flow->source[3] & (four ? source_mask4 : source_mask6[3]));
	}
	if (fields & DESTINATION) {
		hash = mixed(hash, flow->destination[0], flow->destination[1]);
		hash = mixed(hash, flow->destination[2], flow->destination[3]);
	}
	if (fields & (SOURCE_PORT | DESTINATION_PORT))
		hash = mixed(hash, fields & SOURCE_PORT ? bpf_htonl(bpf_ntohs(flow->source_port)) : 0,
			     fields & DESTINATION_PORT ? bpf_htonl(bpf_ntohs(flow->destination_port)) : 0);
	hash *= 0xbf58476d1ce4e5b9; /* the finishing step of splitmix64 */
	hash ^= hash >> 32;
	return hash & (BUCKETS - 1);
}

SEC("sk_reuseport/migrate")
int balance(struct sk_reuseport_md *md)
{
	struct bpf_sock *migrating = md->migrating_sk;
	struct flow flow = {};
	struct counters *count;
	__u32 zero = 0, none = SLOTS, slot, bucket, i, *entry;
	void *table;
	long error;

	if (migrating) {
		flow_of_socket(migrating, &flow);
	} else if (flow_of_packet(md, &flow)) {
		count = bpf_map_lookup_elem(&counts, &none);
		if (count)
			count->unreadable++;
		return SK_DROP; /* nobody can say whose it is */
	}
	table = bpf_map_lookup_elem(&tables, &zero);
	bucket = bucket_of(&flow);
	entry = table ? bpf_map_lookup_elem(table, &bucket) : 0;
	slot = entry && *entry < SLOTS ? *entry : none;
	count = bpf_map_lookup_elem(&counts, &slot);
	if (!count)
		return SK_DROP;
	error = bpf_sk_select_reuseport(md, &slots, &slot, 0);
	if (!error) {
		count->selected++;
		return SK_PASS;
	}
	if (slot != none && error != -ENOENT) {
		count->wrong++;
		return SK_DROP; /* the slot has a socket, of another group: nobody else may have its senders */
	}
	count->empty++;
	if (empty == EMPTY_KERNEL)
		return SK_PASS; /* nothing is selected: the kernel's hash decides */
	if (empty == EMPTY_NEXT) {
		for (i = 0; i < SLOTS; i++) {
			slot = (slot + 1) & (SLOTS - 1);
			if (!bpf_sk_select_reuseport(md, &slots, &slot, 0))
				return SK_PASS;
		}
	}
	return SK_DROP; /* its slot is empty, and so it is told */
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
