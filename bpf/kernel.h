/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * What the programs that look into the kernel need of its structs. The loader finds each field by name in the running
 * kernel's own description (/sys/kernel/btf/vmlinux), so neither order nor size here means anything.
 */
#define AF_INET 2   /* include/linux/socket.h */
#define AF_INET6 10 /* the same */

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct bpf_prog_aux {
	__u32 id;
};

struct bpf_prog {
	enum bpf_prog_type type;
	struct bpf_prog_aux *aux;
};

struct net {
	__u64 net_cookie;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct in6_addr {
	__u8 bytes[16];
};

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	unsigned char skc_reuse : 4;
	unsigned char skc_reuseport : 1;
	unsigned char skc_ipv6only : 1;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	struct {
		__s64 counter;
	} skc_cookie;
	int skc_incoming_cpu;
};

struct sock;

struct sock_reuseport { /* include/net/sock_reuseport.h */
	__u16 max_socks;
	__u16 num_socks;
	unsigned int reuseport_id;
	struct bpf_prog *prog;
	struct sock *socks[0];
};

struct numa_drop_counters { /* Linux 6.18 */
	struct {
		int counter;
	} drops0, drops1;
};

struct inode {
	unsigned long i_ino;
};

struct socket;

struct socket_alloc { /* the socket stands first in it */
	struct inode vfs_inode;
};

struct sock {
	struct sock_common __sk_common;
	struct {
		int counter;
	} sk_drops;
	struct {
		struct {
			int counter;
		} rmem_alloc;
	} sk_backlog;
	int sk_rcvbuf;
	struct socket *sk_socket;
	__u16 sk_protocol;
	__u32 sk_ack_backlog;
	__u32 sk_max_ack_backlog;
	struct sock_reuseport *sk_reuseport_cb;
	struct numa_drop_counters *sk_drop_counters; /* Linux 6.18 */
};

struct inet_sock {
	__be16 inet_sport;
};

struct udp_sock {
	int forward_deficit;
};

struct net_device {
	possible_net_t nd_net;
};

struct dst_entry {
	struct net_device *dev;
};

struct sk_buff {
	unsigned long _skb_refdst;
	__u16 transport_header;
	__u16 network_header;
	unsigned char *head;
};

#pragma clang attribute pop

/* An address as IPv6 has it: IPv4 as ::ffff:a.b.c.d. */
static __always_inline void mapped_address(__u8 address[16], __be32 four)
{
	address[10] = address[11] = 0xff;
	__builtin_memcpy(address + 12, &four, 4);
}

static __always_inline void local_address(__u8 address[16], struct sock *sk)
{
	if (BPF_CORE_READ(sk, __sk_common.skc_family) == AF_INET)
		mapped_address(address, BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr));
	else
		bpf_core_read(address, 16, &sk->__sk_common.skc_v6_rcv_saddr);
}

static __always_inline void peer_address(__u8 address[16], struct sock *sk)
{
	if (BPF_CORE_READ(sk, __sk_common.skc_family) == AF_INET)
		mapped_address(address, BPF_CORE_READ(sk, __sk_common.skc_daddr));
	else
		bpf_core_read(address, 16, &sk->__sk_common.skc_v6_daddr);
}
