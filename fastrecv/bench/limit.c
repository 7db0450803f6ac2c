// SPDX-License-Identifier: MIT
/*
 * The limit: what a receiver written in C gets out of a socket, with nothing behind it. It has the Receiver's
 * batch, slots and names, so that a ratio to it is what Python costs and not what another layout does.
 *
 * Compiled by limit.py when the bench runs; no part of the package's own code.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>

#define SLOT 65535
#define STRIDE 65536

struct limit {
	int slots;
	size_t control; /* bytes of control messages a datagram may bring */
	char *data, *controls;
	struct mmsghdr *headers;
	struct iovec *vectors;
	struct sockaddr_in6 *names;
};

void limit_close(struct limit *limit)
{
	if (!limit)
		return;
	free(limit->data);
	free(limit->controls);
	free(limit->headers);
	free(limit->vectors);
	free(limit->names);
	free(limit);
}

struct limit *limit_open(int slots, size_t control)
{
	struct limit *limit = calloc(1, sizeof(*limit));

	if (!limit)
		return NULL;
	limit->slots = slots;
	limit->control = control;
	limit->controls = calloc(slots, control + 1);
	limit->headers = calloc(slots, sizeof(*limit->headers));
	limit->vectors = calloc(slots, sizeof(*limit->vectors));
	limit->names = calloc(slots, sizeof(*limit->names));
	if (posix_memalign((void **)&limit->data, 4096, (size_t)slots * STRIDE) || !limit->controls ||
	    !limit->headers || !limit->vectors || !limit->names) {
		limit_close(limit);
		return NULL;
	}
	for (int i = 0; i < slots; i++) {
		struct msghdr *header = &limit->headers[i].msg_hdr;

		limit->vectors[i] = (struct iovec){limit->data + (size_t)i * STRIDE, SLOT};
		header->msg_iov = &limit->vectors[i];
		header->msg_iovlen = 1;
		header->msg_name = &limit->names[i];
		if (control)
			header->msg_control = limit->controls + i * control;
	}
	return limit;
}

/* Receive until the queue is empty; how many datagrams that were, or -errno. */
long limit_drain(struct limit *limit, int fd)
{
	int used = limit->slots;
	long total = 0;

	for (;;) {
		for (int i = 0; i < used; i++) { /* the kernel wrote the lengths of what it filled */
			limit->headers[i].msg_hdr.msg_namelen = sizeof(limit->names[i]);
			limit->headers[i].msg_hdr.msg_controllen = limit->control;
		}
		used = recvmmsg(fd, limit->headers, limit->slots, MSG_DONTWAIT, NULL);
		if (used >= 0) {
			total += used;
			continue;
		}
		if (errno == EAGAIN)
			return total;
		if (errno != EINTR)
			return -errno;
		used = 0;
	}
}
