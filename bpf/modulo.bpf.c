// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * The twin of the program of github.com/eduarrrd/reuseport, which a patched pmacct loads as its reuseport_bpf_prog:
 *
 *   jhash(source address, nonce) % size -> slot -> socket
 *
 * The four maps, their names and what lies in them are the original's, and so is the slot of every IPv4 sender: whoever
 * follows the one finds his members in the other's maps. Four maps are all that they share, so nothing is counted here.
 *
 * A peer opens this file with libbpf and a pin_root_path. libbpf below 1.0 takes the section for what it is; from 1.0 on
 * it knows "sk_reuseport" alone, and the peer says bpf_program__set_type(program, BPF_PROG_TYPE_SK_REUSEPORT).
 *
 * The attach type is then BPF_SK_REUSEPORT_SELECT, as with the original: when a listener closes, the connections in its
 * queue do not come by here. They are reset, or, with net.ipv4.tcp_migrate_req, go to any member by the kernel's hash.
 */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define ETH_P_IP 0x0800 /* include/uapi/linux/if_ether.h */
#define IPPROTO_TCP 6   /* include/uapi/linux/in.h */
#define IPPROTO_UDP 17

#define SLOTS 128
#define JHASH_INITVAL 0xdeadbeef /* include/linux/jhash.h */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} nonce SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} size SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__uint(max_entries, SLOTS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} tcp_balancing_targets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__uint(max_entries, SLOTS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} udp_balancing_targets SEC(".maps");

static __always_inline __u32 rotated(__u32 word, int by)
{
	return word << by | word >> (32 - by);
}

#define MIX(x, y, z, by) (x = (x - y) ^ rotated(y, by), y += z)
#define FINISH(x, y, by) (x = (x ^ y) - rotated(y, by))

/* jhash2() of include/linux/jhash.h, for three words or four; of three it is jhash_3words(). */
static __always_inline __u32 jhash(const __u32 *words, int four, __u32 seed)
{
	__u32 a, b, c;

	a = b = c = JHASH_INITVAL + ((3 + four) << 2) + seed;
	a += words[0];
	b += words[1];
	c += words[2];
	if (four) {
		MIX(a, c, b, 4);
		MIX(b, a, c, 6);
		MIX(c, b, a, 8);
		MIX(a, c, b, 16);
		MIX(b, a, c, 19);
		MIX(c, b, a, 4);
		a += words[3];
	}
	FINISH(c, b, 14);
	FINISH(a, c, 11);
	FINISH(b, a, 25);
	FINISH(c, b, 16);
	FINISH(a, c, 4);
	FINISH(b, a, 14);
	FINISH(c, b, 24);
	return c;
}

/*
 * The number in a map of one. Where user space has left it 0, the first packet sets it to `otherwise`, or 0: any, as the
 * original does; but of several first packets, on several processors, all take what one has set.
 */
static __always_inline __u32 settled(void *map, __u32 otherwise)
{
	__u32 zero = 0, found, *number = bpf_map_lookup_elem(map, &zero);

	if (!number)
		return 1; /* cannot be: the map has that one entry */
	found = *(volatile __u32 *)number;
	if (found)
		return found;
	otherwise = otherwise ?: bpf_get_prandom_u32() ?: 1;
	return __sync_val_compare_and_swap(number, 0, otherwise) ?: otherwise;
}

/*
 * The hash of whom the packet is from, in host order. Of IPv4 it is the original's. The original has none for IPv6: it
 * takes the middle of the address for all of it, and so networks of any size for one sender; here all of it counts. To a
 * dual-stack socket IPv4 comes as IPv4.
 */
static __always_inline int hash_of(struct sk_reuseport_md *md, __u32 *hash)
{
	__u32 seed = settled(&nonce, 0);
	__u32 words[4] = {};

	if (md->eth_protocol == bpf_htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes_relative(md, 12, words, 4, BPF_HDR_START_NET))
			return -1;
		words[0] = bpf_ntohl(words[0]);
		*hash = jhash(words, 0, seed);
		return 0;
	}
	if (bpf_skb_load_bytes_relative(md, 8, words, 16, BPF_HDR_START_NET))
		return -1;
	words[0] = bpf_ntohl(words[0]);
	words[1] = bpf_ntohl(words[1]);
	words[2] = bpf_ntohl(words[2]);
	words[3] = bpf_ntohl(words[3]);
	*hash = jhash(words, 1, seed);
	return 0;
}

SEC("sk_reuseport/selector")
int _selector(struct sk_reuseport_md *md)
{
	__u32 hash, slot;
	long error;

	if (hash_of(md, &hash))
		return SK_DROP; /* no IP header: nobody can say whose it is */
	slot = hash % settled(&size, SLOTS);
	if (md->ip_protocol == IPPROTO_TCP)
		error = bpf_sk_select_reuseport(md, &tcp_balancing_targets, &slot, 0);
	else if (md->ip_protocol == IPPROTO_UDP)
		error = bpf_sk_select_reuseport(md, &udp_balancing_targets, &slot, 0);
	else
		return SK_DROP; /* no map is for it */
	return error ? SK_DROP : SK_PASS; /* an empty slot refuses its senders: nobody else has their state */
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
