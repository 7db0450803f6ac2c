// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * Takes whatever the flooded host sends back (SYN-ACKs) off the far end of the lab's veth. No stack sees the
 * replies, so none answers them with a RST.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("xdp")
int swallow(struct xdp_md *ctx)
{
	return XDP_DROP;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
