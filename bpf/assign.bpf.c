// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * The floor: an sk_lookup program that decides nothing and assigns one fixed socket. Whatever a dispatcher
 * costs above this is the cost of deciding.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} sockets SEC(".maps");

SEC("sk_lookup")
int assign(struct bpf_sk_lookup *ctx)
{
	const __u32 first = 0;
	struct bpf_sock *sk = bpf_map_lookup_elem(&sockets, &first);
	long refused;

	if (!sk)
		return SK_DROP; /* the sink is gone: the packet must not reach anybody else */
	refused = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	return refused ? SK_DROP : SK_PASS; /* refused: the socket is of another family or protocol */
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
