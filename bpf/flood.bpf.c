// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * The bench's traffic source: gives every frame of a BPF_PROG_RUN the next source port and a correct
 * checksum, then the verdict of the measurement that runs: XDP_PASS into the stack of this namespace,
 * XDP_TX to the peer of the device, or XDP_DROP to see what the source alone costs.
 *
 * It runs on one CPU at a time, so its counters need no atomics.
 */
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* Set before load; the verifier knows them as constants. */
const volatile __u32 sources = 1;     /* how many source ports take turns */
const volatile __u32 first_port = 1;  /* the lowest of them */
const volatile __u32 port_offset;     /* bytes from the start of the frame to the source port */
const volatile __u32 checksum_offset; /* the same for the transport checksum */
const volatile __u32 partial_sum;     /* one's complement sum of all the checksum covers,
                                         with source port and checksum taken as 0 (RFC 1071) */

volatile __u32 verdict = XDP_DROP;
__u32 next_source;
__u64 frames;

SEC("xdp")
int flood(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__be16 *port = data + port_offset, *checksum = data + checksum_offset;
	__u32 source = next_source;
	__u32 sum;

	if ((void *)(port + 1) > end || (void *)(checksum + 1) > end)
		return XDP_ABORTED; /* user space gave a frame shorter than its headers */

	/*
	 * Pages come back from the stack without being rewritten: both fields are written absolutely, never
	 * computed from what stands in the frame.
	 */
	*port = bpf_htons(first_port + source);
	sum = partial_sum + *port;
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = ~sum & 0xffff;
	*checksum = sum ? sum : 0xffff; /* RFC 768: a computed 0 is sent as all ones */

	next_source = source + 1 < sources ? source + 1 : 0;
	frames++;
	return verdict;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
