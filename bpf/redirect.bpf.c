// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * XDP: datagrams for the asked addresses and ports leave the stack here, for the AF_XDP socket of the queue they came by.
 * Everything else goes on as if this program were not there: no verdict but "taken" and "passed".
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "redirect.h"

/* Set before load. */
const volatile __u32 capacity; /* bytes that a frame of the receiver's memory holds */
/* Set at any time. */
volatile __u16 device[3]; /* the device's Ethernet address, in memory order */

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, 1); /* as many as the device has queues: set before load */
	__type(key, __u32);
	__type(value, __u32);
} sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct place);
	__type(value, __u32);
} places SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PORT_WORDS);
	__type(key, __u32);
	__type(value, __u64); /* one bit a port */
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, OUTCOMES);
	__type(key, __u32);
	__type(value, __u64);
} outcomes SEC(".maps");

static __always_inline void count(__u32 outcome)
{
	__u64 *counted = bpf_map_lookup_elem(&outcomes, &outcome);

	if (counted)
		++*counted;
}

static __always_inline int is_asked_port(__u16 port)
{
	__u32 word = port / 64;
	__u64 *bits = bpf_map_lookup_elem(&ports, &word);

	return bits && *bits >> port % 64 & 1;
}

static __always_inline int is_asked_address(const struct frame *frame)
{
	struct place place = { .vlan = frame->vlan };

	if (frame->version == 6) {
		__builtin_memcpy(place.address, frame->network + 24, 16);
	} else {
		place.address[10] = place.address[11] = 0xff;
		__builtin_memcpy(place.address + 12, frame->network + 16, 4);
	}
	return bpf_map_lookup_elem(&places, &place) != 0;
}

static __always_inline int is_for_device(const __u8 *ethernet)
{
	const __u16 *to = (const __u16 *)ethernet;

	return to[0] == device[0] && to[1] == device[1] && to[2] == device[2];
}

/* Ports come first: what is not asked for should cost least. */
static __always_inline int judged(const __u8 *data, const __u8 *end, __u32 size)
{
	struct frame frame;
	int outcome = frame_parse(data, end, size, &frame);

	if (outcome != TAKEN)
		return outcome;
	if (!is_asked_port(frame.port))
		return OTHER_PORT;
	if (data + FRAME_ETHERNET > end || !is_for_device(data))
		return OTHER_HOST;
	if (!is_asked_address(&frame))
		return OTHER_ADDRESS;
	if (size > capacity)
		return TOO_LONG;
	return TAKEN;
}

SEC("xdp")
int redirect(struct xdp_md *ctx)
{
	__u32 size = bpf_xdp_get_buff_len(ctx);
	int outcome = judged((void *)(long)ctx->data, (void *)(long)ctx->data_end, size), verdict = XDP_PASS;

	if (outcome == TAKEN) {
		/* A queue whose socket is gone, as after a SIGKILL, is the stack's again. */
		verdict = bpf_redirect_map(&sockets, ctx->rx_queue_index, XDP_PASS);
		if (verdict != XDP_REDIRECT)
			outcome = NO_SOCKET;
	}
	count(outcome);
	return verdict;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
