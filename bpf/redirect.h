/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/* What redirect.bpf.c is told: which datagrams are taken. fastrecv/redirect.py fills it. */
#ifndef FASTRECV_REDIRECT_H
#define FASTRECV_REDIRECT_H

#include "frame.h"

/* An address that datagrams are taken for, IPv4 as ::ffff:a.b.c.d, on the device itself or one of its VLANs. */
struct place {
	__u8 address[16];
	__u16 vlan; /* 0: untagged */
	__u16 zero;
};

#define PORT_WORDS (65536 / 64)

#endif
