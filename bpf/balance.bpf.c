// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * The balancer: which member of a reuseport group gets a sender.
 *
 *   prefix of the sender, where one is placed -> slot
 *   key of the sender -> hash -> bucket       -> slot -> socket
 *
 * Which bucket has which slot is a table that is exchanged as a whole (fastrecv/buckets.py makes it), so senders whose
 * bucket stays never move.
 */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "balance.h"
#include "balance_maps.h"

#define ENOENT 2 /* include/uapi/asm-generic/errno-base.h */

/* What becomes of a sender whose slot has no socket. */
#define EMPTY_DROP 0
#define EMPTY_KERNEL 1
#define EMPTY_NEXT 2

/* Set before load. */
const volatile __u32 empty;
const volatile __u32 mapped;       /* SOURCE or DESTINATION: its prefixes may have slots of their own */
const volatile __u32 tracking;     /* whether slots can be drained sender by sender */
const volatile __u32 counting = 1; /* 0: to measure what it costs */

static __always_inline __u32 slot_of_table(__u32 bucket)
{
	__u32 zero = 0, *entry;
	void *table = bpf_map_lookup_elem(&tables, &zero);

	entry = table ? bpf_map_lookup_elem(table, &bucket) : 0;
	return entry && *entry < SLOTS ? *entry : SLOTS;
}

static __always_inline __u32 slot_of_prefix(const struct flow *flow)
{
	struct prefix prefix = { .length = 32 + 128, .version = is_ipv4(flow) ? 4 : 6 };
	__u32 *slot;

	__builtin_memcpy(prefix.address, mapped == SOURCE ? flow->source : flow->destination, 16);
	slot = bpf_map_lookup_elem(&places, &prefix);
	return slot && *slot < SLOTS ? *slot : SLOTS;
}

static __always_inline int leaves(const struct control *now, __u32 slot)
{
	return slot < SLOTS && now->leaving[slot / 64] >> slot % 64 & 1;
}

/*
 * While slots are drained sender by sender: those who came to such a slot stay there, as long as it has a socket. Gives
 * whether that was selected.
 */
static __always_inline int selected_as_known(struct sk_reuseport_md *md, const struct control *now, __u64 hash,
					     __u32 *slot)
{
	struct known *known = bpf_map_lookup_elem(&senders, &hash), fresh = { .slot = *slot };
	__u32 home = known ? known->slot : SLOTS;

	if (known && leaves(now, home)) { /* else it was, and who ended that has been hindered to forget him */
		if (bpf_sk_select_reuseport(md, &slots, &home, 0))
			return 0;
		known->seen = bpf_ktime_get_ns();
		*slot = home;
		return 1;
	}
	if (leaves(now, *slot)) {
		fresh.seen = bpf_ktime_get_ns();
		bpf_map_update_elem(&senders, &hash, &fresh, BPF_ANY);
	}
	return 0;
}

/* One choice in `sampling` goes to whoever watches. A function of its own: CAP_BPF alone is strict about a full stack. */
static __noinline void tell(const struct flow *flow, __u32 bucket, __u32 slot, __u32 taken, int outcome)
{
	struct choice *choice = bpf_ringbuf_reserve(&choices, sizeof(*choice), 0);
	struct counters *count;
	__u32 none = SLOTS;

	if (!choice) { /* nobody reads as fast */
		count = bpf_map_lookup_elem(&counts, &none);
		if (count)
			count->untold++;
		return;
	}
	choice->flow = *flow;
	choice->bucket = bucket;
	choice->slot = slot;
	choice->taken = taken;
	choice->outcome = outcome;
	choice->time = bpf_ktime_get_ns();
	bpf_ringbuf_submit(choice, 0);
}

/*
 * What becomes of a sender whose slot has no socket; gives the slot that takes him instead, SLOTS where none does. Slots
 * without a weight are drained, or not in use: they get nobody.
 */
static __always_inline int without_socket(struct sk_reuseport_md *md, __u32 *slot)
{
	__u32 other = *slot, i, *weight;

	*slot = SLOTS;
	if (empty == EMPTY_KERNEL)
		return SK_PASS; /* nothing is selected: the kernel's hash decides */
	if (empty == EMPTY_NEXT) {
		for (i = 0; i < SLOTS; i++) {
			other = (other + 1) & (SLOTS - 1);
			weight = bpf_map_lookup_elem(&weights, &other);
			if (weight && *weight && !bpf_sk_select_reuseport(md, &slots, &other, 0)) {
				*slot = other;
				return SK_PASS;
			}
		}
	}
	return SK_DROP; /* its slot is empty, and so it is told */
}

SEC("sk_reuseport/migrate")
int balance(struct sk_reuseport_md *md)
{
	struct bpf_sock *migrating = md->migrating_sk;
	__u32 zero = 0, none = SLOTS, bucket, slot, placed, taken, *one_in;
	struct counters *count;
	struct control *now;
	struct flow flow = {};
	int verdict = SK_PASS;
	__u64 hash;
	long error;

	if (migrating) {
		flow_of_socket(migrating, &flow);
	} else if (flow_of_packet(md, &flow, needed() | mapped)) {
		count = bpf_map_lookup_elem(&counts, &none);
		if (count)
			count->unreadable++;
		return SK_DROP; /* nobody can say whose it is */
	}
	now = bpf_map_lookup_elem(&control, &zero);
	if (!now)
		return SK_DROP; /* cannot be: the map has that one entry */
	hash = hash_of(md, !migrating, &flow);
	bucket = bucket_of(!migrating, hash);
	slot = slot_of_table(bucket);
	placed = mapped ? slot_of_prefix(&flow) : SLOTS;
	error = 1;
	if (placed < SLOTS)
		slot = placed;
	else if (tracking && now->draining && selected_as_known(md, now, hash, &slot))
		error = 0;
	taken = slot;
	if (error)
		error = bpf_sk_select_reuseport(md, &slots, &taken, 0);
	count = counting ? bpf_map_lookup_elem(&counts, &slot) : 0;
	if (!error) {
		if (count)
			count->selected++;
	} else if (slot != none && error != -ENOENT) {
		if (count)
			count->wrong++;
		taken = none;
		verdict = SK_DROP; /* the slot has a socket, of another group: nobody else may have its senders */
	} else {
		if (count)
			count->empty++;
		verdict = without_socket(md, &taken);
		count = counting && taken != none ? bpf_map_lookup_elem(&counts, &taken) : 0;
		if (count)
			count->fallback++;
	}
	one_in = bpf_map_lookup_elem(&sampling, &zero);
	if (one_in && *one_in && bpf_get_prandom_u32() % *one_in == 0 &&
	    (migrating || !flow_of_packet(md, &flow, FLOW)))
		tell(&flow, bucket, slot, taken, error);
	return verdict;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
