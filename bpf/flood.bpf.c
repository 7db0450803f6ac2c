// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * The bench's traffic source: gives every frame of a BPF_PROG_RUN the next source port and a correct
 * checksum, then the verdict of the measurement that runs: XDP_PASS into the stack of this namespace,
 * XDP_TX to the peer of the device, or XDP_DROP to see what the source alone costs. A spread flood has a
 * source address, a destination address and a payload for every source as well. A paced one waits until its frames are
 * due.
 *
 * It runs on one CPU at a time, so its counters need no atomics.
 */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* Set before load; the verifier knows them as constants. Offsets are in bytes from the start of the frame. */
const volatile __u32 sources = 1;     /* how many source ports take turns */
const volatile __u32 first_port = 1;  /* the lowest of them */
const volatile __u32 port_offset;     /* to the source port */
const volatile __u32 checksum_offset; /* to the transport checksum */

/* Of a spread flood. */
const volatile __u32 spread;
const volatile __u32 destinations = 1;   /* how many destination addresses take turns, a power of two */
const volatile __u32 source_offset;      /* to the last 16 bits of the source address */
const volatile __u32 destination_offset; /* to the same of the destination address */
const volatile __u32 payload_offset;     /* 0: none */
const volatile __u32 header_offset;      /* to the checksum of an IPv4 header; 0: IPv6, which has none */
const volatile __u32 header_sum;         /* one's complement sum of that header, with what is written taken as 0 */

/* Of a paced flood: frames leave in bursts, as many as one softirq section of BPF_PROG_RUN sends (batch_size). */
#define BURST 64
#define LONGEST (1 << 20) /* looks at the clock, tens of nanoseconds each: no wait is endless */
const volatile __u32 paced;
volatile __u64 gap; /* ns from the beginning of one burst to that of the next */
volatile __u64 due; /* when the next one is to begin; 0: it is the first */
__u64 began, latest; /* when the first one and the last one began */

/* One's complement sum of all the transport checksum covers, with what is written taken as 0 (RFC 1071). */
volatile __u32 partial_sum;
volatile __u32 verdict = XDP_DROP;
__u32 next_source;
__u64 frames;

static __always_inline __u16 complement(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* Write what else of a source is its own; gives what that adds to the sum of the transport checksum, -1 for a frame
 * that is too short. A source's port is the last 16 bits of its address and the beginning of its payload, too. */
static __always_inline long spread_out(struct xdp_md *ctx, __u16 word, __u16 to)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u16 *source = data + source_offset, *destination = data + destination_offset;
	__u16 *payload = data + payload_offset, *header = data + header_offset;

	if ((void *)(source + 1) > end || (void *)(destination + 1) > end)
		return -1;
	*source = word;
	*destination = to;
	if (header_offset) {
		if ((void *)(header + 1) > end)
			return -1;
		*header = complement(header_sum + word + to);
	}
	if (!payload_offset)
		return word + to;
	if ((void *)(payload + 1) > end)
		return -1;
	*payload = word;
	return 2 * word + to;
}

static long is_due(__u32 looked, void *context)
{
	return bpf_ktime_get_ns() >= due;
}

/* What is late begins anew: a burst that made up for it would be the source's own doing, not the offered rate. */
static __always_inline void wait_for_burst(void)
{
	__u64 now;

	if (frames % BURST)
		return;
	now = bpf_ktime_get_ns();
	if (!due)
		began = now;
	if (now < due) {
		bpf_loop(LONGEST, is_due, NULL, 0);
		now = bpf_ktime_get_ns();
	} else if (now > due + gap) {
		due = now;
	}
	due += gap;
	latest = now;
}

SEC("xdp")
int flood(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__be16 *port = data + port_offset, *checksum = data + checksum_offset;
	__u32 source = next_source;
	__u32 sum;
	long more;

	if ((void *)(port + 1) > end || (void *)(checksum + 1) > end)
		return XDP_ABORTED; /* user space gave a frame shorter than its headers */

	if (paced)
		wait_for_burst();

	/*
	 * Pages come back from the stack without being rewritten: all is written absolutely, never computed
	 * from what stands in the frame.
	 */
	*port = bpf_htons(first_port + source);
	sum = partial_sum + *port;
	if (spread) {
		more = spread_out(ctx, *port, bpf_htons(source & (destinations - 1)));
		if (more < 0)
			return XDP_ABORTED;
		sum += more;
	}
	sum = complement(sum);
	*checksum = sum ? sum : 0xffff; /* RFC 768: a computed 0 is sent as all ones */

	next_source = source + 1 < sources ? source + 1 : 0;
	frames++;
	return verdict;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
