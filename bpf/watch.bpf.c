// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * What becomes of the sockets of one network namespace: TCP connections that change their state, datagrams that find a
 * queue full, packets that are dropped for a socket's sake. From the kernel's own tracepoints into one ring buffer.
 */
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "kernel.h"

/* include/uapi/linux/in.h */
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17

/* include/net/tcp_states.h */
#define TCP_SYN_SENT 2
#define TCP_FIN_WAIT1 4
#define TCP_CLOSE 7
#define TCP_LAST_ACK 9
#define TCP_LISTEN 10

#define STATE 1
#define OVERFLOW 2
#define DROP 3

/* Set before load. */
const volatile __u64 namespace; /* its cookie */
const volatile __u16 port;      /* only what comes from it or goes to it; 0: all */
const volatile __u32 receivers; /* whether the kernel says for whom a dropped packet was: Linux 6.11 */

__u64 lost; /* events for which the ring had no room */

struct event {
	__u64 time; /* ns, CLOCK_MONOTONIC */
	__u64 cookie; /* 0: of no socket, or of one that is not known */
	__u8 source[16]; /* of a socket: its own address; of a packet: its sender's */
	__u8 destination[16];
	__be16 source_port;
	__be16 destination_port; /* of a socket: 0 without a peer */
	__u32 pid; /* 0: no process did that */
	char command[16];
	__s32 code; /* OVERFLOW: a negative errno; DROP: the place of the reason in `place_of` */
	__u8 kind;
	__u8 protocol;
	__u8 old;
	__u8 new;
};

const struct event *const volatile layout; /* so that the object describes the struct */

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

/* Numbers differ from kernel to kernel: the loader asks the running one for each. */
enum skb_drop_reason {
	SKB_DROP_REASON_NO_SOCKET,
	SKB_DROP_REASON_SOCKET_CLOSE,
	SKB_DROP_REASON_SOCKET_FILTER,
	SKB_DROP_REASON_SOCKET_RCVBUFF,
	SKB_DROP_REASON_SOCKET_BACKLOG,
	SKB_DROP_REASON_PROTO_MEM,
	SKB_DROP_REASON_TCP_LISTEN_OVERFLOW,
};

#define IS(REASON)                                                                         \
	(bpf_core_enum_value_exists(enum skb_drop_reason, SKB_DROP_REASON_##REASON) &&     \
	 reason == bpf_core_enum_value(enum skb_drop_reason, SKB_DROP_REASON_##REASON))

/* The place of a reason among those that concern sockets (fastrecv/watching.py names them); 0: it does not. */
static __always_inline int place_of(__u32 reason)
{
	if (IS(NO_SOCKET))
		return 1;
	if (IS(SOCKET_CLOSE))
		return 2;
	if (IS(SOCKET_FILTER))
		return 3;
	if (IS(SOCKET_RCVBUFF))
		return 4;
	if (IS(SOCKET_BACKLOG))
		return 5;
	if (IS(PROTO_MEM))
		return 6;
	if (IS(TCP_LISTEN_OVERFLOW))
		return 7;
	return 0;
}

static __always_inline void tell(struct event *event)
{
	if (port && event->source_port != bpf_htons(port) && event->destination_port != bpf_htons(port))
		return;
	event->time = bpf_ktime_get_ns();
	if (bpf_ringbuf_output(&events, event, sizeof(*event), 0))
		__sync_fetch_and_add(&lost, 1);
}

static __always_inline int is_here(struct sock *sk)
{
	return BPF_CORE_READ(sk, __sk_common.skc_net.net, net_cookie) == namespace;
}

static __always_inline void describe(struct event *event, struct sock *sk)
{
	event->cookie = bpf_get_socket_cookie(sk);
	local_address(event->source, sk);
	peer_address(event->destination, sk);
	/* A TCP socket that has just been closed keeps its port only there. */
	event->source_port = BPF_CORE_READ((struct inet_sock *)sk, inet_sport);
	event->destination_port = BPF_CORE_READ(sk, __sk_common.skc_dport);
}

/* Whether a process does that by a system call; all else is done when a packet comes, whoever runs meanwhile. */
static __always_inline int is_done_by_process(int old, int new)
{
	return new == TCP_SYN_SENT || new == TCP_LISTEN || new == TCP_FIN_WAIT1 || new == TCP_LAST_ACK ||
	       (old == TCP_LISTEN && new == TCP_CLOSE);
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state, struct sock *sk, int old, int new)
{
	struct event event = { .kind = STATE, .protocol = IPPROTO_TCP };

	if (BPF_CORE_READ(sk, sk_protocol) != IPPROTO_TCP || !is_here(sk))
		return 0; /* SCTP and MPTCP sockets have states of their own */
	describe(&event, sk);
	event.old = old;
	event.new = new;
	if (is_done_by_process(old, new)) {
		event.pid = bpf_get_current_pid_tgid() >> 32;
		bpf_get_current_comm(event.command, sizeof(event.command));
	}
	tell(&event);
	return 0;
}

SEC("tp_btf/udp_fail_queue_rcv_skb")
int BPF_PROG(overflow, int error, struct sock *sk)
{
	struct event event = { .kind = OVERFLOW, .protocol = IPPROTO_UDP, .code = error };

	if (!is_here(sk))
		return 0;
	describe(&event, sk);
	tell(&event);
	return 0;
}

/* Addresses and ports as they stand in the packet. 0: it is neither TCP nor UDP. */
static __always_inline int describe_packet(struct event *event, struct sk_buff *skb)
{
	unsigned char *head = BPF_CORE_READ(skb, head);
	unsigned char *ip = head + BPF_CORE_READ(skb, network_header);
	__u8 packet[20] __attribute__((aligned(8))) = {};
	__u16 ports[2] = {};

	bpf_probe_read_kernel(packet, 20, ip);
	if (packet[0] >> 4 == 4) {
		event->protocol = packet[9];
		mapped_address(event->source, *(__be32 *)(packet + 12));
		mapped_address(event->destination, *(__be32 *)(packet + 16));
	} else {
		event->protocol = packet[6];
		bpf_probe_read_kernel(event->source, 16, ip + 8);
		bpf_probe_read_kernel(event->destination, 16, ip + 24);
	}
	bpf_probe_read_kernel(ports, sizeof(ports), head + BPF_CORE_READ(skb, transport_header));
	event->source_port = ports[0];
	event->destination_port = ports[1];
	return event->protocol == IPPROTO_TCP || event->protocol == IPPROTO_UDP;
}

SEC("tp_btf/kfree_skb")
int drop(unsigned long long *ctx)
{
	struct sk_buff *skb = (void *)ctx[0];
	struct event event = { .kind = DROP, .code = place_of(ctx[2]) };
	struct dst_entry *route;
	struct sock *receiver;

	if (!event.code)
		return 0;
	if (receivers) {
		receiver = (void *)ctx[3];
		if (receiver) {
			event.cookie = bpf_get_socket_cookie(receiver);
			if (!is_here(receiver))
				return 0;
		}
	}
	if (!event.cookie) {
		/* The packet's device is no help: TCP and UDP use its place for other things. Its route still is there. */
		route = (void *)(BPF_CORE_READ(skb, _skb_refdst) & ~3UL);
		if (BPF_CORE_READ(route, dev, nd_net.net, net_cookie) != namespace)
			return 0;
	}
	if (describe_packet(&event, skb))
		tell(&event);
	return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
