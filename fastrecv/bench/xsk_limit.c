// SPDX-License-Identifier: MIT
/*
 * The limit of AF_XDP: what a receiver written in C takes off the rings of one queue, with nothing behind it. It has the
 * XdpReceiver's ring, frames, batch and mode, so that a ratio to it is what Python costs and not what another layout does.
 * Of every frame it reads where the payload begins, as whoever wants the payload must.
 *
 * Compiled by xsk_limit.py when the bench runs; no part of the package's own code.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <xdp/xsk.h>

#define FRAME 2048
#define HEADERS 42 /* Ethernet, IPv4 without options, UDP */
#define GLANCE 20  /* ms; `stop` is looked at so often */

struct xsk_limit {
	struct xsk_umem *umem;
	struct xsk_socket *socket;
	struct xsk_ring_prod fill;
	struct xsk_ring_cons received, completed;
	void *memory;
	size_t size;
	uint64_t *idle; /* frames that neither the kernel nor the loop has */
	uint32_t count, out, ring;
	volatile uint8_t seen;
};

void xsk_limit_close(struct xsk_limit *limit)
{
	if (!limit)
		return;
	xsk_socket__delete(limit->socket);
	if (limit->umem)
		xsk_umem__delete(limit->umem);
	if (limit->memory && limit->memory != MAP_FAILED)
		munmap(limit->memory, limit->size);
	free(limit->idle);
	free(limit);
}

/* Let the kernel have what is idle, the frame that came back last first: it is warm. */
static void refill(struct xsk_limit *limit)
{
	uint32_t index, n = limit->ring - limit->out, room = xsk_prod_nb_free(&limit->fill, limit->ring);

	n = n < limit->count ? n : limit->count;
	n = n < room ? n : room;
	if (!n || xsk_ring_prod__reserve(&limit->fill, n, &index) != n)
		return;
	for (uint32_t i = 0; i < n; i++)
		*xsk_ring_prod__fill_addr(&limit->fill, index + i) = limit->idle[--limit->count];
	limit->out += n;
	xsk_ring_prod__submit(&limit->fill, n);
	if (xsk_ring_prod__needs_wakeup(&limit->fill))
		recvfrom(xsk_socket__fd(limit->socket), NULL, 0, MSG_DONTWAIT, NULL, NULL);
}

/* A socket for queue 0 of the interface, in copy mode; NULL and errno. */
struct xsk_limit *xsk_limit_open(const char *interface, uint32_t ring, uint32_t frames)
{
	struct xsk_umem_config memory = {.fill_size = ring, .comp_size = ring, .frame_size = FRAME};
	struct xsk_socket_config config = {
		.rx_size = ring,
		.libxdp_flags = XSK_LIBXDP_FLAGS__INHIBIT_PROG_LOAD,
		.bind_flags = XDP_COPY | XDP_USE_NEED_WAKEUP,
	};
	struct xsk_limit *limit = calloc(1, sizeof(*limit));
	int result;

	if (!limit)
		return NULL;
	limit->ring = ring;
	limit->size = (size_t)frames * FRAME;
	limit->idle = calloc(frames, sizeof(*limit->idle));
	limit->memory = mmap(NULL, limit->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!limit->idle || limit->memory == MAP_FAILED) {
		result = -ENOMEM;
	} else {
		result = xsk_umem__create(&limit->umem, limit->memory, limit->size, &limit->fill, &limit->completed, &memory);
		if (!result)
			result = xsk_socket__create(&limit->socket, interface, 0, limit->umem, &limit->received, NULL, &config);
	}
	if (result) {
		xsk_limit_close(limit);
		errno = -result;
		return NULL;
	}
	for (uint32_t i = 0; i < frames; i++)
		limit->idle[limit->count++] = (uint64_t)i * FRAME;
	refill(limit);
	return limit;
}

int xsk_limit_fd(const struct xsk_limit *limit)
{
	return xsk_socket__fd(limit->socket);
}

/* Datagrams that the kernel has lost for want of a frame, or of room in the ring; or -errno. */
long xsk_limit_lost(const struct xsk_limit *limit)
{
	struct xdp_statistics found;
	socklen_t size = sizeof(found);

	memset(&found, 0, sizeof(found));
	if (getsockopt(xsk_limit_fd(limit), SOL_XDP, XDP_STATISTICS, &found, &size) < 0)
		return -errno;
	return found.rx_dropped + found.rx_ring_full;
}

/* Receive, a batch at a time, until *stop is set and the ring is empty; how many datagrams that were, or -errno. */
long xsk_limit_run(struct xsk_limit *limit, uint32_t batch, const volatile int *stop)
{
	struct pollfd polled = {.fd = xsk_limit_fd(limit), .events = POLLIN};
	uint32_t index, n;
	long total = 0;
	int last;

	for (;;) {
		last = *stop; /* before the look: what came until then is in the ring */
		n = xsk_ring_cons__peek(&limit->received, batch, &index);
		for (uint32_t i = 0; i < n; i++) {
			uint64_t address = xsk_ring_cons__rx_desc(&limit->received, index + i)->addr;

			limit->seen = ((const uint8_t *)limit->memory)[address + HEADERS];
			limit->idle[limit->count++] = address & ~(uint64_t)(FRAME - 1);
		}
		if (n) {
			xsk_ring_cons__release(&limit->received, n);
			limit->out -= n;
			total += n;
			refill(limit);
		} else if (last) {
			return total;
		} else if (poll(&polled, 1, GLANCE) < 0 && errno != EINTR) {
			return -errno;
		}
	}
}
