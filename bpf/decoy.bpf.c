// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * An sk_lookup program that leaves everything to the ordinary lookup. Attached in another network namespace it
 * turns on the static key of the hook for the whole host: what remains is the price of the hook with no program
 * attached, the cover letter's middle column.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("sk_lookup")
int decoy(struct bpf_sk_lookup *ctx)
{
	return SK_PASS;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
