// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * A peer of fastrecv.modulo that knows nothing of it: what a patched pmacct does with its reuseport_bpf_prog, on plain
 * libbpf. It takes no lock, and knows the ELF file and the four pinned maps only.
 *
 *   peer ELF ROOT tcp|udp ADDRESS PORT INDEX COUNT before-bind|after-bind|after-listen
 *
 * Says "ready", then the address of each sender that comes to it. Exit status 2: wrong count; 3: bind() or listen()
 * failed; 1: anything else.
 */
#include <arpa/inet.h>
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

static void fail(int status, const char *what, int code)
{
	fprintf(stderr, "%s: %s\n", what, strerror(code));
	exit(status);
}

static struct bpf_object *load(const char *path, const char *root)
{
	LIBBPF_OPTS(bpf_object_open_opts, options, .pin_root_path = root);
	struct bpf_object *object = bpf_object__open_file(path, &options);
	struct bpf_program *program;
	int error;

	if (!object)
		fail(1, "open", errno);
	bpf_object__for_each_program(program, object)
		if (bpf_program__type(program) == BPF_PROG_TYPE_UNSPEC) /* libbpf 1.0 and newer */
			bpf_program__set_type(program, BPF_PROG_TYPE_SK_REUSEPORT);
	error = bpf_object__load(object);
	if (error)
		fail(1, "load", -error);
	return object;
}

static int map_of(struct bpf_object *object, const char *name)
{
	int fd = bpf_object__find_map_fd_by_name(object, name);

	if (fd < 0)
		fail(1, name, -fd);
	return fd;
}

/* What is in a map of one; `otherwise` is written where it is 0. */
static unsigned int settle(int map, unsigned int otherwise)
{
	unsigned int zero = 0, found;

	if (bpf_map_lookup_elem(map, &zero, &found))
		fail(1, "lookup", errno);
	if (!found && bpf_map_update_elem(map, &zero, &otherwise, BPF_ANY))
		fail(1, "update", errno);
	return found ? found : otherwise;
}

static void attach(int sock, struct bpf_object *object)
{
	int program = bpf_program__fd(bpf_object__find_program_by_name(object, "_selector"));

	if (setsockopt(sock, SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, &program, sizeof(program)))
		fail(1, "attach", errno);
}

static void tell(const struct sockaddr_storage *from)
{
	const void *address = from->ss_family == AF_INET ? (const void *)&((const struct sockaddr_in *)from)->sin_addr :
							   (const void *)&((const struct sockaddr_in6 *)from)->sin6_addr;
	char text[INET6_ADDRSTRLEN];

	puts(inet_ntop(from->ss_family, address, text, sizeof(text)));
}

static void serve(int sock, int tcp)
{
	struct sockaddr_storage from;
	socklen_t length;
	char data[64];
	int taken;

	for (;;) {
		length = sizeof(from);
		taken = tcp ? accept(sock, (struct sockaddr *)&from, &length) :
			      (int)recvfrom(sock, data, sizeof(data), 0, (struct sockaddr *)&from, &length);
		if (taken < 0)
			fail(1, "receive", errno);
		tell(&from);
		if (tcp)
			close(taken);
	}
}

int main(int count, char **words)
{
	unsigned int index, size, found, nonce = 0, one = 1;
	struct sockaddr_storage place = {};
	struct bpf_object *object;
	unsigned long long value;
	const char *when;
	socklen_t length;
	int sock, tcp;

	if (count != 9)
		fail(1, "usage", EINVAL);
	setvbuf(stdout, NULL, _IOLBF, 0);
	tcp = !strcmp(words[3], "tcp");
	index = atoi(words[6]);
	size = atoi(words[7]);
	when = words[8];

	object = load(words[1], words[2]);
	while (!nonce)
		if (getrandom(&nonce, sizeof(nonce), 0) < 0)
			fail(1, "getrandom", errno);
	settle(map_of(object, "nonce"), nonce);
	found = settle(map_of(object, "size"), size);
	if (found != size) {
		fprintf(stderr, "Mismatched count: configured %u, found %u\n", size, found);
		return 2;
	}

	if (inet_pton(AF_INET, words[4], &((struct sockaddr_in *)&place)->sin_addr) == 1) {
		place.ss_family = AF_INET;
		length = sizeof(struct sockaddr_in);
	} else {
		if (inet_pton(AF_INET6, words[4], &((struct sockaddr_in6 *)&place)->sin6_addr) != 1)
			fail(1, words[4], EINVAL);
		place.ss_family = AF_INET6;
		length = sizeof(struct sockaddr_in6);
	}
	((struct sockaddr_in *)&place)->sin_port = htons(atoi(words[5])); /* in both at the same place */
	sock = socket(place.ss_family, tcp ? SOCK_STREAM : SOCK_DGRAM, 0);
	if (sock < 0 || setsockopt(sock, SOL_SOCKET, SO_REUSEPORT, &one, sizeof(one)))
		fail(1, "socket", errno);
	if (!strcmp(when, "before-bind"))
		attach(sock, object);
	if (bind(sock, (struct sockaddr *)&place, length))
		fail(3, "bind", errno);
	if (!strcmp(when, "after-bind"))
		attach(sock, object);
	if (tcp && listen(sock, 128))
		fail(3, "listen", errno);
	if (!strcmp(when, "after-listen"))
		attach(sock, object);

	value = sock;
	if (bpf_map_update_elem(map_of(object, tcp ? "tcp_balancing_targets" : "udp_balancing_targets"), &index, &value,
				BPF_ANY))
		fail(1, "register", errno);
	puts("ready");
	serve(sock, tcp);
}
