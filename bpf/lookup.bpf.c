// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * The dispatcher: which service gets a packet, by protocol, destination prefix, port, source prefix and interface.
 *
 * A rule set is compiled in user space into arrays that the JIT inlines, and a new rule set is a new instance of
 * this program with tables of its own, put in place by one link update: a packet sees one rule set or the other,
 * never a mixture. Sockets and counters are shared by all instances.
 *
 *   ports[family, protocol, port]   nothing | one answer | a list of a few prefixes | a table by address
 *   lists, first4 + blocks4, trie6  by destination address: where the rules begin that may apply
 *   rules                           in order of precedence, to the first whose source and interface match
 *   sockets[destination, member]    the first that is there
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2 /* include/linux/socket.h */
#define IPPROTO_TCP 6

#define MEMBERS 4     /* sockets kept of a destination */
#define LIST 8        /* prefixes of a list at most */
#define CONDITIONS 32 /* rules of one prefix and port at most */

/* An entry of `ports`: kind in the top two bits, number below. */
#define NOTHING 0
#define ANSWER 1
#define LISTED 2
#define TABLE 3
#define NUMBER 0x3fffffff

/* An entry of first4 and blocks4: 0, the first of some rules, or with this bit the next block. */
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

struct listed4 {
	__u32 address, mask; /* network byte order */
	__u32 rule;
};

struct list4 {
	struct listed4 prefix[LIST]; /* the longest first; rule 0 ends it */
};

struct prefix6 {
	__u32 length; /* bits, those of `table` included */
	__u32 table;
	__u8 address[16];
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
	__u64 refused; /* of them, whose socket the kernel refused: connected, or of another family */
};

/* Set before load. */
const volatile __u32 conditions; /* whether any rule has a source or an interface */

/* Sizes are set before load. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct words);
} ports SEC(".maps"), first4 SEC(".maps");

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
	__type(value, struct list4);
} lists SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct prefix6);
	__type(value, __u32);
} trie6 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct rule);
} rules SEC(".maps");

/* Of all instances. */
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

static __always_inline __u32 word_of(void *map, __u32 index)
{
	__u32 element = index >> 4;
	struct words *words = bpf_map_lookup_elem(map, &element);

	return words ? words->word[index & 15] : 0;
}

/* The first rule for an IPv4 address (network byte order) of a table or list; 0 where none covers it. */
static __always_inline __u32 find4(__u32 entry, __u32 address)
{
	__u32 number = entry & NUMBER, found, block;
	struct list4 *list;
	struct block *next;
	int i;

	if (entry >> 30 == LISTED) {
		list = bpf_map_lookup_elem(&lists, &number);
		if (!list)
			return 0;
		for (i = 0; i < LIST && list->prefix[i].rule; i++)
			if ((address & list->prefix[i].mask) == list->prefix[i].address)
				return list->prefix[i].rule;
		return 0;
	}
	address = __builtin_bswap32(address);
	found = word_of(&first4, (number << 16) + (address >> 16));
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

SEC("sk_lookup")
int lookup(struct bpf_sk_lookup *ctx)
{
	/* Every field before the first branch: see letter.bpf.c. */
	__u32 family = ctx->family, protocol = ctx->protocol, port = ctx->local_port, ip4 = ctx->local_ip4;
	__u32 ip6[4] = { ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2], ctx->local_ip6[3] };
	__u32 from4 = ctx->remote_ip4, ifindex = ctx->ingress_ifindex;
	__u32 from6[4] = { ctx->remote_ip6[0], ctx->remote_ip6[1], ctx->remote_ip6[2], ctx->remote_ip6[3] };
	__u32 entry, number, index, member;
	struct counters *count;
	struct bpf_sock *sk;
	struct rule *rule;
	__u32 *first;
	int i;

	asm volatile("" : "+r"(ip4), "+r"(ip6[0]), "+r"(ip6[1]), "+r"(ip6[2]), "+r"(ip6[3]));
	asm volatile("" : "+r"(from4), "+r"(from6[0]), "+r"(from6[1]), "+r"(from6[2]), "+r"(from6[3]));

	entry = word_of(&ports, ((family != AF_INET) << 17) + ((protocol != IPPROTO_TCP) << 16) + port);
	if (!entry)
		return SK_PASS; /* nothing is bound on this port: the ordinary lookup decides */
	if (entry >> 30 == ANSWER) {
		number = entry & NUMBER;
	} else if (family == AF_INET) {
		number = find4(entry, ip4);
	} else {
		struct prefix6 key = { .length = 32 + 128, .table = entry & NUMBER };

		__builtin_memcpy(key.address, ip6, sizeof(key.address));
		first = bpf_map_lookup_elem(&trie6, &key);
		number = first ? *first : 0;
	}
	if (!number)
		return SK_PASS; /* the address is not bound on this port */
	rule = bpf_map_lookup_elem(&rules, &number);
	if (!rule)
		return SK_PASS;
	if (conditions) {
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
	count->lookups++;
	if (rule->flags & DROP)
		return SK_DROP; /* the binding says so */
	for (member = 0; member < MEMBERS; member++) {
		index = rule->destination * MEMBERS + member;
		sk = bpf_map_lookup_elem(&sockets, &index);
		if (!sk)
			continue;
		i = bpf_sk_assign(ctx, sk, 0);
		bpf_sk_release(sk);
		if (!i)
			return SK_PASS;
		count->refused++;
		return SK_DROP; /* bound, and nobody else may have it */
	}
	count->misses++;
	return rule->flags & ON_PASS ? SK_PASS : SK_DROP; /* no socket of the destination is there */
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
