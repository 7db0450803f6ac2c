/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * Which frames carry a whole UDP datagram that can be judged without the stack, and where it lies. Read by redirect.bpf.c,
 * which hands such frames on, and by the extension that takes them: the one parser of both, so that they never differ.
 *
 * Whatever this does not know is the stack's: it says so with the reason, and the frame goes on as if nobody had looked.
 */
#ifndef FASTRECV_FRAME_H
#define FASTRECV_FRAME_H

#include <linux/types.h>

/* What becomes of a frame; counted by these numbers. */
enum outcome {
	TAKEN,
	OTHER_PROTOCOL, /* not UDP over IP */
	OTHER_HOST,     /* the Ethernet address is not this device's */
	OTHER_ADDRESS,  /* the IP address is not one that was asked for */
	OTHER_PORT,
	FRAGMENT,
	OPTIONS,     /* IPv4 options, IPv6 extension headers */
	NESTED_VLAN, /* 802.1ad, or a tag within a tag */
	LENGTH,      /* truncated headers, lengths that contradict each other */
	HEADER_SUM,  /* of IPv4 */
	NO_CHECKSUM, /* UDP over IPv6 has one: RFC 8200, 8.1 */
	SOURCE,      /* an address that nobody may send from */
	TOO_LONG,    /* for the frames of the receiver's memory */
	NO_SOCKET,   /* nobody receives from this queue */
	OUTCOMES
};

struct frame {
	const __u8 *network;   /* the IP header */
	const __u8 *transport; /* the UDP header */
	__u16 vlan;            /* number of the tag, 0: none */
	__u16 length;          /* of the datagram, UDP header included */
	__u16 port;            /* it is sent to */
	__u8 version;          /* of IP */
	__u8 tos;
};

#define FRAME_ETHERNET 14 /* bytes of headers: IEEE 802.3, 802.1Q, RFC 791, RFC 8200, RFC 768 */
#define FRAME_TAG 4
#define FRAME_IP4 20
#define FRAME_IP6 40
#define FRAME_UDP 8

static inline __attribute__((always_inline)) __u16 frame_word(const __u8 *at)
{
	return (__u16)(at[0] << 8 | at[1]);
}

static inline __attribute__((always_inline)) __u32 frame_folded(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* RFC 6864 aside, the fields are those of RFC 791. The stack refuses what is SOURCE here, too, or asks its routes first. */
static inline __attribute__((always_inline)) int frame_ip4(const __u8 *at, const __u8 *end, __u32 size,
							    struct frame *frame)
{
	__u32 sum = 0, total, i;

	if (at + FRAME_IP4 > end || at[0] >> 4 != 4)
		return LENGTH;
	if (at[9] != 17)
		return OTHER_PROTOCOL;
	if (frame_word(at + 6) & 0x3fff) /* more fragments, offset */
		return FRAGMENT;
	if (at[0] != 0x45)
		return OPTIONS;
	total = frame_word(at + 2);
	if (total < FRAME_IP4 + FRAME_UDP || total > size)
		return LENGTH;
#pragma GCC unroll 10
	for (i = 0; i < FRAME_IP4; i += 2)
		sum += frame_word(at + i);
	if (frame_folded(sum) != 0xffff)
		return HEADER_SUM;
	if (at[12] == 0 || at[12] == 127 || at[12] >= 224 || !__builtin_memcmp(at + 12, at + 16, 4))
		return SOURCE;
	frame->version = 4;
	frame->tos = at[1];
	frame->length = total - FRAME_IP4;
	frame->transport = at + FRAME_IP4;
	return TAKEN;
}

static inline __attribute__((always_inline)) int frame_ip6(const __u8 *at, const __u8 *end, __u32 size,
							    struct frame *frame)
{
	__u64 source[2], destination[2];

	if (at + FRAME_IP6 > end || at[0] >> 4 != 6)
		return LENGTH;
	switch (at[6]) {
	case 17:
		break;
	case 44:
		return FRAGMENT;
	case 0: case 43: case 50: case 51: case 60: case 135: case 139: case 140: /* IANA, IPv6 Extension Header Types */
		return OPTIONS;
	default:
		return OTHER_PROTOCOL;
	}
	frame->length = frame_word(at + 4);
	if (frame->length < FRAME_UDP || (__u32)FRAME_IP6 + frame->length > size)
		return LENGTH;
	__builtin_memcpy(source, at + 8, 16);
	__builtin_memcpy(destination, at + 24, 16);
	/* multicast; unspecified, loopback, IPv4-mapped; our own */
	if (at[8] == 0xff || source[0] == 0 || (source[0] == destination[0] && source[1] == destination[1]))
		return SOURCE;
	frame->version = 6;
	frame->tos = (__u8)(at[0] << 4 | at[1] >> 4);
	frame->transport = at + FRAME_IP6;
	return TAKEN;
}

/*
 * TAKEN, and everything in `frame` set and within [at, end); or why not. size : of all that, since without CAP_PERFMON
 * the verifier allows neither the difference of two pointers nor a pointer that moves by what a packet says.
 */
static inline __attribute__((always_inline)) int frame_parse(const __u8 *at, const __u8 *end, __u32 size,
							      struct frame *frame)
{
	__u16 protocol;
	int outcome;

	if (at + FRAME_ETHERNET > end)
		return LENGTH;
	protocol = frame_word(at + 12);
	at += FRAME_ETHERNET;
	size -= FRAME_ETHERNET;
	frame->vlan = 0;
	if (protocol == 0x8100) { /* ETH_P_8021Q, include/uapi/linux/if_ether.h */
		if (at + FRAME_TAG > end)
			return LENGTH;
		frame->vlan = frame_word(at) & 0xfff;
		protocol = frame_word(at + 2);
		at += FRAME_TAG;
		size -= FRAME_TAG;
		if (protocol == 0x8100)
			return NESTED_VLAN;
	}
	if (protocol == 0x88a8) /* ETH_P_8021AD */
		return NESTED_VLAN;
	frame->network = at;
	if (protocol == 0x0800)
		outcome = frame_ip4(at, end, size, frame);
	else if (protocol == 0x86dd)
		outcome = frame_ip6(at, end, size, frame);
	else
		return OTHER_PROTOCOL;
	if (outcome != TAKEN)
		return outcome;
	at = frame->transport;
	if (at + FRAME_UDP > end || frame_word(at + 4) != frame->length)
		return LENGTH;
	if (frame->version == 6 && !at[6] && !at[7])
		return NO_CHECKSUM;
	frame->port = frame_word(at + 2);
	return TAKEN;
}

#endif
