// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * The method that the sk_lookup cover letter measured: find the packet's destination address in an
 * LPM_TRIE of prefixes, take the socket that the entry names out of a SOCKMAP, assign it.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2 /* include/linux/socket.h */

struct prefix4 {
	__u32 length; /* bits */
	__u8 address[4];
};

struct prefix6 {
	__u32 length; /* bits */
	__u8 address[16];
};

/* max_entries of both tries is set before load. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct prefix4);
	__type(value, __u32);
} prefixes4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct prefix6);
	__type(value, __u32);
} prefixes6 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} sockets SEC(".maps");

SEC("sk_lookup")
int letter(struct bpf_sk_lookup *ctx)
{
	/*
	 * Every field is loaded before the first branch: clang would merge the loads of both branches into one
	 * through a selected pointer, which the verifier refuses on a context.
	 */
	__u32 family = ctx->family, ip4 = ctx->local_ip4;
	__u32 ip6[4] = { ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2], ctx->local_ip6[3] };
	struct bpf_sock *sk;
	__u32 *index;
	long refused;

	asm volatile("" : "+r"(ip4), "+r"(ip6[0]), "+r"(ip6[1]), "+r"(ip6[2]), "+r"(ip6[3]));

	if (family == AF_INET) {
		struct prefix4 key = { .length = 32 };

		__builtin_memcpy(key.address, &ip4, sizeof(key.address));
		index = bpf_map_lookup_elem(&prefixes4, &key);
	} else {
		struct prefix6 key = { .length = 128 };

		__builtin_memcpy(key.address, ip6, sizeof(key.address));
		index = bpf_map_lookup_elem(&prefixes6, &key);
	}
	if (!index)
		return SK_PASS; /* not one of ours: the ordinary lookup decides */

	sk = bpf_map_lookup_elem(&sockets, index);
	if (!sk)
		return SK_DROP; /* ours, but its socket is gone: nobody else may have the packet */
	refused = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	return refused ? SK_DROP : SK_PASS; /* refused: the socket is of another family or protocol */
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
