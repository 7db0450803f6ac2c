// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * TCP listeners and UDP sockets as the kernel has them, a record each: what /proc/net and sock_diag say, and what they
 * do not, which is the socket's reuseport group and the program that is attached to it.
 *
 * Iterators: the kernel runs them for each socket of the namespace of whoever opens and reads them.
 */
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "kernel.h"

#define TCP_LISTEN 10 /* include/net/tcp_states.h */
#define IPPROTO_TCP 6 /* include/uapi/linux/in.h */
#define SEARCHED 256 /* members of a group among which a socket is sought */

struct seq_file;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
	__u32 uid;
};

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *udp_sk;
	__u32 uid;
};

#pragma clang attribute pop

struct member {
	__u64 cookie;
	__u64 inode; /* 0: no descriptor is left */
	__u64 first; /* the cookie of its group's first member; 0: it has none yet */
	__u8 address[16];
	__u8 peer[16];
	__u32 uid;
	__u32 queue; /* UDP: bytes; TCP: connections that nobody has accepted yet */
	__u32 limit; /* the most that `queue` may be */
	__u32 drops;
	__u32 group; /* its number, from 0; given again once the group has ended */
	__u32 size;  /* of its group; 0: it is in none */
	__u32 room;
	__s32 index; /* in its group; -1: not found */
	__u32 program;
	__s32 program_type; /* -1: no program; 0: a classic one, which has no id */
	__s32 cpu;
	__be16 port;
	__be16 peer_port;
	__u16 family;
	__u8 protocol;
	__u8 state;
	__u8 only6;
	__u8 reuseport;
};

const struct member *const volatile layout; /* so that the object describes the struct */
const volatile __u16 only_port;             /* set before load; 0: every port */

static __always_inline int passed_over(struct sock *sk)
{
	return only_port && BPF_CORE_READ(sk, __sk_common.skc_num) != only_port;
}

static __always_inline __u32 drops_of(struct sock *sk)
{
	struct numa_drop_counters *counters = 0;

	if (bpf_core_field_exists(sk->sk_drop_counters))
		counters = BPF_CORE_READ(sk, sk_drop_counters);
	if (counters)
		return BPF_CORE_READ(counters, drops0.counter) + BPF_CORE_READ(counters, drops1.counter);
	return BPF_CORE_READ(sk, sk_drops.counter);
}

static __always_inline void describe_group(struct member *member, struct sock *sk)
{
	struct sock_reuseport *group = BPF_CORE_READ(sk, sk_reuseport_cb);
	struct sock **members, *other;
	struct bpf_prog *program;
	__u32 i;

	member->index = member->program_type = -1;
	if (!group)
		return;
	member->group = BPF_CORE_READ(group, reuseport_id);
	member->size = BPF_CORE_READ(group, num_socks);
	member->room = BPF_CORE_READ(group, max_socks);
	program = BPF_CORE_READ(group, prog);
	if (program) {
		member->program_type = BPF_CORE_READ(program, type);
		member->program = BPF_CORE_READ(program, aux, id);
	}
	members = (void *)group + bpf_core_field_offset(group->socks);
	for (i = 0; i < SEARCHED && i < member->size; i++) {
		if (bpf_probe_read_kernel(&other, sizeof(other), members + i))
			return;
		if (i == 0)
			member->first = BPF_CORE_READ(other, __sk_common.skc_cookie.counter);
		if (other == sk) {
			member->index = i;
			return;
		}
	}
}

static __always_inline void describe(struct member *member, struct sock *sk, __u32 uid)
{
	struct socket_alloc *file = (void *)BPF_CORE_READ(sk, sk_socket);

	member->cookie = bpf_get_socket_cookie(sk);
	if (file)
		member->inode = BPF_CORE_READ(file, vfs_inode.i_ino);
	local_address(member->address, sk);
	member->port = bpf_htons(BPF_CORE_READ(sk, __sk_common.skc_num));
	member->peer_port = BPF_CORE_READ(sk, __sk_common.skc_dport);
	if (member->peer_port)
		peer_address(member->peer, sk);
	member->uid = uid;
	member->drops = drops_of(sk);
	member->cpu = BPF_CORE_READ(sk, __sk_common.skc_incoming_cpu);
	member->family = BPF_CORE_READ(sk, __sk_common.skc_family);
	member->protocol = BPF_CORE_READ(sk, sk_protocol);
	member->state = BPF_CORE_READ(sk, __sk_common.skc_state);
	member->only6 = BPF_CORE_READ_BITFIELD_PROBED(sk, __sk_common.skc_ipv6only);
	member->reuseport = BPF_CORE_READ_BITFIELD_PROBED(sk, __sk_common.skc_reuseport);
	describe_group(member, sk);
}

SEC("iter/tcp")
int tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *common = ctx->sk_common;
	struct member member = {};
	struct sock *sk = (void *)common;

	if (!common || common->skc_state != TCP_LISTEN || passed_over(sk))
		return 0; /* at the end there is none; the others are no whole sockets, or in no group */
	describe(&member, sk, ctx->uid);
	member.queue = BPF_CORE_READ(sk, sk_ack_backlog);
	member.limit = BPF_CORE_READ(sk, sk_max_ack_backlog);
	bpf_seq_write(ctx->meta->seq, &member, sizeof(member));
	return 0;
}

SEC("iter/udp")
int udp(struct bpf_iter__udp *ctx)
{
	struct udp_sock *udp = ctx->udp_sk;
	struct member member = {};
	struct sock *sk = (void *)udp;
	int queue;

	if (!udp || passed_over(sk))
		return 0;
	describe(&member, sk, ctx->uid);
	/* What its reader has taken out but not given back yet does not wait (net/ipv4/udp.c, udp_rmem_release). */
	queue = BPF_CORE_READ(sk, sk_backlog.rmem_alloc.counter) - BPF_CORE_READ(udp, forward_deficit);
	member.queue = queue > 0 ? queue : 0;
	member.limit = BPF_CORE_READ(sk, sk_rcvbuf);
	bpf_seq_write(ctx->meta->seq, &member, sizeof(member));
	return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
