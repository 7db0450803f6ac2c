/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * What of a packet says whose it is, and the hash of that: see balance.bpf.c. User space computes the same:
 * fastrecv/policies.py.
 */
#define AF_INET 2       /* include/linux/socket.h */
#define ETH_P_IP 0x0800 /* include/uapi/linux/if_ether.h */
#define IPPROTO_UDP 17  /* include/uapi/linux/in.h */

#define BUCKETS 4096
#define MAX_KEY 20 /* bytes of a payload; a QUIC connection id has no more (RFC 9000, 17.2) */

/* What the bucket is found by. */
#define SOURCE 1
#define SOURCE_PORT 2
#define DESTINATION 4
#define DESTINATION_PORT 8
#define FLOW (SOURCE | SOURCE_PORT | DESTINATION | DESTINATION_PORT)
#define PAYLOAD 16
#define QUIC 32
#define CPU 64
#define RANDOM 128

/* Set before load. Masks in network byte order; IPv4 addresses are ::ffff:a.b.c.d. */
const volatile __u32 fields;
const volatile __u32 source_mask4, source_mask6[4];
const volatile __u32 payload_offset, key_length;
const volatile __u64 seed;

struct flow { /* network byte order */
	__u32 source[4];
	__u32 destination[4];
	__u16 source_port;
	__u16 destination_port;
};

union key {
	__u8 bytes[24];
	__u32 words[6];
};

static __always_inline int is_ipv4(const struct flow *flow)
{
	return !flow->source[0] && !flow->source[1] && flow->source[2] == bpf_htonl(0xffff);
}

/* What of a packet's flow the policy needs. Every load is a call: a tenth of all that the program costs. */
static __always_inline __u32 needed(void)
{
	return (fields & FLOW) | (fields & (PAYLOAD | QUIC) ? SOURCE : 0); /* a payload may be too short */
}

static __always_inline int addresses_of_packet(struct sk_reuseport_md *md, struct flow *flow, __u32 wanted)
{
	int four = md->eth_protocol == bpf_htons(ETH_P_IP);
	__u32 pair[2];

	if (four)
		flow->source[2] = flow->destination[2] = bpf_htonl(0xffff);
	if ((wanted & (SOURCE | DESTINATION)) == (SOURCE | DESTINATION)) { /* one behind the other: one load */
		if (!four)
			return bpf_skb_load_bytes_relative(md, 8, flow, 32, BPF_HDR_START_NET);
		if (bpf_skb_load_bytes_relative(md, 12, pair, sizeof(pair), BPF_HDR_START_NET))
			return -1;
		flow->source[3] = pair[0];
		flow->destination[3] = pair[1];
		return 0;
	}
	if (wanted & SOURCE)
		return four ? bpf_skb_load_bytes_relative(md, 12, &flow->source[3], 4, BPF_HDR_START_NET) :
			      bpf_skb_load_bytes_relative(md, 8, flow->source, 16, BPF_HDR_START_NET);
	if (wanted & DESTINATION)
		return four ? bpf_skb_load_bytes_relative(md, 16, &flow->destination[3], 4, BPF_HDR_START_NET) :
			      bpf_skb_load_bytes_relative(md, 24, flow->destination, 16, BPF_HDR_START_NET);
	return 0;
}

static __always_inline int flow_of_packet(struct sk_reuseport_md *md, struct flow *flow, __u32 wanted)
{
	__u16 ports[2];

	if (addresses_of_packet(md, flow, wanted))
		return -1;
	if (!(wanted & (SOURCE_PORT | DESTINATION_PORT)))
		return 0;
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

/* The key in a payload; 0 where it has none. The payload is behind the header at which the packet starts here. */
static __always_inline int key_of_payload(struct sk_reuseport_md *md, union key *key)
{
	__u32 start = 8; /* UDP, RFC 768 */
	__u8 header[6];

	if (md->ip_protocol != IPPROTO_UDP) {
		if (bpf_skb_load_bytes(md, 12, header, 1))
			return 0;
		start = header[0] >> 4 << 2; /* TCP's data offset, RFC 9293 */
	}
	if (fields & PAYLOAD) {
		start += payload_offset;
	} else {
		if (bpf_skb_load_bytes(md, start, header, 1))
			return 0;
		if (header[0] & 0x80) { /* a long header: version, length of the id, id (RFC 9000, 17.2) */
			if (bpf_skb_load_bytes(md, start, header, 6) || header[5] < key_length)
				return 0;
			start += 6;
		} else {
			start += 1;
		}
	}
	if (key_length < 1 || key_length > MAX_KEY)
		return 0;
	return !bpf_skb_load_bytes(md, start, key->bytes, key_length);
}

static __always_inline __u64 mixed(__u64 hash, __u32 high, __u32 low)
{
	hash = (hash ^ ((__u64)bpf_ntohl(high) << 32 | bpf_ntohl(low))) * 0x9e3779b97f4a7c15; /* 2^64 / golden ratio */
	return hash ^ hash >> 32;
}

/*
 * The hash of a sender. Whether there is a packet is no matter of `md`, which it takes CAP_PERFMON to compare with NULL.
 */
static __always_inline __u64 hash_of(struct sk_reuseport_md *md, int packet, const struct flow *flow)
{
	int four = is_ipv4(flow);
	__u64 used = fields; /* of 64 bits: half a place where a pointer was on the stack takes CAP_PERFMON to write */
	union key key = {};
	__u64 hash = seed;

	if (fields & (PAYLOAD | QUIC)) {
		if (packet && key_of_payload(md, &key)) {
			hash = mixed(hash, key.words[0], key.words[1]);
			hash = mixed(hash, key.words[2], key.words[3]);
			hash = mixed(hash, key.words[4], key.words[5]);
		} else {
			used = SOURCE;
		}
	} else if (fields & (CPU | RANDOM)) {
		used = SOURCE; /* of a connection that has no packet */
	}
	if (used & SOURCE) {
		hash = mixed(hash, flow->source[0] & source_mask6[0], flow->source[1] & source_mask6[1]);
		hash = mixed(hash, four ? flow->source[2] : flow->source[2] & source_mask6[2],
			     flow->source[3] & (four ? source_mask4 : source_mask6[3]));
	}
	if (used & DESTINATION) {
		hash = mixed(hash, flow->destination[0], flow->destination[1]);
		hash = mixed(hash, flow->destination[2], flow->destination[3]);
	}
	if (used & (SOURCE_PORT | DESTINATION_PORT))
		hash = mixed(hash, used & SOURCE_PORT ? bpf_htonl(bpf_ntohs(flow->source_port)) : 0,
			     used & DESTINATION_PORT ? bpf_htonl(bpf_ntohs(flow->destination_port)) : 0);
	hash *= 0xbf58476d1ce4e5b9; /* the finishing step of splitmix64 */
	return hash ^ hash >> 32;
}

static __always_inline __u32 bucket_of(int packet, __u64 hash)
{
	if (packet && fields & CPU)
		return bpf_get_smp_processor_id() & (BUCKETS - 1);
	if (packet && fields & RANDOM)
		return bpf_get_prandom_u32() & (BUCKETS - 1);
	return hash & (BUCKETS - 1);
}
