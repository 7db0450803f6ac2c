// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * The dispatcher: which service gets a packet, by protocol, destination prefix, port, source prefix and interface.
 *
 * A rule set is compiled in user space into arrays that the JIT inlines. An instance of this program has one rule
 * set for life, its tables sized to it.
 *
 *   ports[family, protocol, port]   nothing | one answer | a tree or a table by address
 *   first, blocks4, nodes           by destination address: where the rules begin that may apply
 *   rules                           in order of precedence, to the first whose source and interface match
 *   sockets[destination, member]    the first that is there
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "lookup.h"

static __always_inline __u32 word_of(void *map, __u32 index)
{
	__u32 element = index >> 4;
	struct words *words = bpf_map_lookup_elem(map, &element);

	return words ? words->word[index & 15] : 0;
}

static __always_inline __u64 half_of(__u32 first, __u32 second) /* network byte order */
{
	return (__u64)__builtin_bswap32(first) << 32 | __builtin_bswap32(second);
}

/* The first rule for an IPv4 address of a table; 0 where no prefix covers it. */
static __always_inline __u32 in_table(__u32 table, __u32 address)
{
	__u32 found = word_of(&first, (table << 16) + (address >> 16)), block;
	struct block *next;

	if (!(found & BLOCK))
		return found;
	block = found & ~BLOCK;
	next = bpf_map_lookup_elem(&blocks4, &block);
	if (!next)
		return 0;
	found = next->entry[address >> 8 & 255];
	if (!(found & BLOCK))
		return found;
	block = found & ~BLOCK;
	next = bpf_map_lookup_elem(&blocks4, &block);
	return next ? next->entry[address & 255] : 0;
}

/*
 * number >= key without a branch, as 1 less the borrow of number - key: with a branch for every key the verifier
 * walks more paths than it has time for.
 */
static __always_inline __u32 reaches(__u64 number, __u64 key)
{
	return 1 - (((~number & key) | (~(number ^ key) & (number - key))) >> 63);
}

/* The same in a tree: IPv4 addresses are the high half, IPv6 addresses take both. */
static __always_inline __u32 in_tree(__u32 number, __u64 high, __u64 low)
{
	struct node *node;
	__u32 child, slot;
	int depth, i;

	for (depth = 0; depth < DEPTH; depth++) {
		node = bpf_map_lookup_elem(&nodes, &number);
		if (!node)
			return 0;
		slot = 0;
#pragma unroll
		for (i = 0; i < FAN - 1; i++)
			slot += reaches(high, node->key[i]);
		asm volatile("" : "+r"(slot)); /* the compiler knows the bound, the verifier does not: keep the mask */
		child = node->child[slot & (FAN - 1)];
		if (child & LEAF)
			return child & ~LEAF;
		if (child & LOW)
			high = low;
		number = child & NUMBER;
	}
	return 0;
}

SEC("sk_lookup")
int lookup(struct bpf_sk_lookup *ctx)
{
	__u32 family = ctx->family, protocol = ctx->protocol, port = ctx->local_port, ip4, ip6[4];
	__u32 ifindex = ctx->ingress_ifindex, from4, from6[4];
	__u32 entry, number, index, member;
	struct counters *count;
	struct bpf_sock *sk;
	struct rule *rule;
	__u64 high = 0, low = 0, live;
	int i, tree, error = 0;

	live = ifindex != 0; /* packets come in by an interface, test runs do not: they count nothing */
	if (as_if_from)
		ifindex = as_if_from;

	entry = word_of(&ports, ((family != AF_INET) << 17) + ((protocol != IPPROTO_TCP) << 16) + port);
	if (!entry)
		return SK_PASS; /* nothing is bound on this port: the ordinary lookup decides */
	number = entry & NUMBER;
	tree = entry >> 30 == TREE;
	if (entry >> 30 != ANSWER && family == AF_INET) {
		ip4 = ctx->local_ip4;
		/* Else the compiler makes one load through a selected pointer of those in both branches: see letter.bpf.c. */
		asm volatile("" : "+r"(ip4));
		high = __builtin_bswap32(ip4);
		if (!tree)
			number = in_table(number, high);
	} else if (entry >> 30 != ANSWER) {
		ip6[0] = ctx->local_ip6[0];
		ip6[1] = ctx->local_ip6[1];
		ip6[2] = ctx->local_ip6[2];
		ip6[3] = ctx->local_ip6[3];
		asm volatile("" : "+r"(ip6[0]), "+r"(ip6[1]), "+r"(ip6[2]), "+r"(ip6[3]));
		high = half_of(ip6[0], ip6[1]);
		low = half_of(ip6[2], ip6[3]);
		if (!tree) {
			number = word_of(&first, (number << 16) + (high >> 48));
			tree = number & BLOCK;
			high <<= 16;
		}
	}
	if (tree)
		number = in_tree(number & ~BLOCK, high, low);
	if (!number)
		return SK_PASS; /* the address is not bound on this port */
	rule = bpf_map_lookup_elem(&rules, &number);
	if (!rule)
		return SK_PASS;
	if (conditions) { /* all of them before the next branch, for the same reason */
		from4 = ctx->remote_ip4;
		from6[0] = ctx->remote_ip6[0];
		from6[1] = ctx->remote_ip6[1];
		from6[2] = ctx->remote_ip6[2];
		from6[3] = ctx->remote_ip6[3];
		asm volatile("" : "+r"(from4), "+r"(from6[0]), "+r"(from6[1]), "+r"(from6[2]), "+r"(from6[3]));
		if (family == AF_INET) {
			from6[0] = from4;
			from6[1] = from6[2] = from6[3] = 0;
		}
		for (i = 0; i < CONDITIONS; i++) {
			if ((!rule->ifindex || rule->ifindex == ifindex) &&
			    (from6[0] & rule->mask[0]) == rule->source[0] &&
			    (from6[1] & rule->mask[1]) == rule->source[1] &&
			    (from6[2] & rule->mask[2]) == rule->source[2] &&
			    (from6[3] & rule->mask[3]) == rule->source[3])
				break;
			if (rule->flags & LAST)
				return SK_PASS; /* bound, but not for this sender or interface */
			number++;
			rule = bpf_map_lookup_elem(&rules, &number);
			if (!rule)
				return SK_PASS;
		}
	}
	count = bpf_map_lookup_elem(&counts, &rule->destination);
	if (!count)
		return SK_DROP;
	count->lookups += live;
	if (rule->flags & DROP)
		return SK_DROP; /* the binding says so */
	for (member = 0; member < MEMBERS; member++) {
		index = rule->destination * MEMBERS + member;
		sk = bpf_map_lookup_elem(&sockets, &index);
		if (!sk)
			continue;
		error = bpf_sk_assign(ctx, sk, 0);
		bpf_sk_release(sk);
		if (!error)
			return SK_PASS;
	}
	if (!error) {
		count->misses += live;
		return rule->flags & ON_PASS ? SK_PASS : SK_DROP; /* no socket of the destination is there */
	}
	if (error == -ESOCKTNOSUPPORT)
		count->unfit += live;
	else if (error == -EAFNOSUPPORT)
		count->family += live;
	else if (error == -EEXIST)
		count->taken += live;
	else
		count->other += live;
	return SK_DROP; /* bound, and nobody else may have it */
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
