"""A namespace with named servers, clients that learn whom they came to, and a program that does what a test says."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network

import pytest
from pyroute2 import IPRoute

from fastrecv.bpf import Object, packaged
from fastrecv.netns import Namespace
from fastrecv.rules import MEMBERS, Binding, compile_rules, destinations_of

# include/uapi/linux/bpf.h, asm-generic/socket.h, linux/in.h
SK_DROP, SK_PASS, REPLACE, NO_REUSEPORT = 0, 1, 1, 2
SO_ATTACH_REUSEPORT_EBPF, IP_FREEBIND = 52, 15
PORT = 7007  # clients ask on this one
A, B, NOBODY = 0, 1, 99  # places in the map of the programs below
REFUSED = "refused"

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
kinds = pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])
nets = pytest.mark.parametrize("net", ["198.51.100.{}", "2001:db8:7::{}"], ids=["ipv4", "ipv6"])

SCRIPTED = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#define NULL ((void *)0)
#define STEPS 5
const volatile __u32 steps, whom[STEPS], flags[STEPS]; /* what `scripted` assigns, one after the other */
const volatile __u32 verdict = SK_PASS, member;        /* `member` is whom `chooses` chooses: none of a group drops */
__u64 runs;
__s64 results[STEPS]; /* of each bpf_sk_assign */
__u32 selected[STEPS + 1]; /* the port of ctx->sk before the first step and after each */
struct { __uint(type, BPF_MAP_TYPE_SOCKMAP); __uint(max_entries, 4); __type(key, __u32); __type(value, __u64);
} sockets SEC(".maps");

static __always_inline __u32 port_of(struct bpf_sock *sk) { return sk ? sk->src_port : 0; }

SEC("sk_lookup") int scripted(struct bpf_sk_lookup *ctx)
{
	__sync_fetch_and_add(&runs, 1);
	selected[0] = port_of(ctx->sk);
#pragma unroll
	for (int i = 0; i < STEPS; i++) {
		__u32 place = whom[i];
		struct bpf_sock *sk;

		if (i >= steps)
			break;
		sk = bpf_map_lookup_elem(&sockets, &place);
		if (sk) {
			results[i] = bpf_sk_assign(ctx, sk, flags[i]);
			bpf_sk_release(sk);
		} else {
			results[i] = bpf_sk_assign(ctx, NULL, flags[i]);
		}
		selected[i + 1] = port_of(ctx->sk);
	}
	return verdict;
}

SEC("sk_reuseport") int chooses(struct sk_reuseport_md *md)
{
	__u32 place = member;

	return bpf_sk_select_reuseport(md, &sockets, &place, 0) ? SK_DROP : SK_PASS;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
"""
Compile = Callable[[str, str], bytes]


@dataclass
class Stage:
    """A namespace with named servers, and clients that learn which of them they have come to."""

    namespace: Namespace
    stack: contextlib.ExitStack
    compiled: bytes = field(repr=False)
    servers: dict[str, socket.socket] = field(default_factory=dict)

    def bind(self, kind: int, host: str, port: int, reuseport: bool = False, only6: bool = False) -> socket.socket:
        made = self.stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind))
        made.settimeout(5)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuseport)
        made.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        if made.family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only6)
        made.bind((host, port))
        return made

    def serve(
        self, name: str, kind: int, host: str, port: int, reuseport: bool = False, only6: bool = False
    ) -> socket.socket:
        server = self.servers[name] = self.bind(kind, host, port, reuseport, only6)
        if server.type == TCP:
            server.listen()
        return server

    def ask(self, kind: int, host: str, port: int = PORT, source: tuple[str, int] | None = None) -> str:
        """The name that a new client is answered with, or REFUSED."""
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as client:
            client.settimeout(5)
            if source is not None:
                client.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
                client.bind(source)
            try:
                client.connect((host, port))
                client.send(b"who?")
                ready = select.select([*self.servers.values(), client], [], [], 5)[0]
                assert len(ready) == 1, f"{len(ready)} sockets have something to read"
                if ready[0] is not client:
                    self._answer(ready[0], client, (host, port))
                return client.recv(99).decode()
            except ConnectionRefusedError:
                return REFUSED

    def _answer(self, server: socket.socket, client: socket.socket, asked: tuple[str, int]) -> None:
        """A UDP server answers from the address and port that was asked: the client takes nothing else."""
        (name,) = (name for name, known in self.servers.items() if known is server)
        if server.type == TCP:
            accepted, peer = server.accept()
            with accepted:
                accepted.settimeout(5)
                assert accepted.recv(99) == b"who?"
                accepted.sendall(name.encode())
        else:
            question, peer = server.recvfrom(99)
            assert question == b"who?"
            with self.namespace, contextlib.closing(self.bind(UDP, *asked)) as answering:
                answering.sendto(name.encode(), client.getsockname())
        assert (peer[0].removeprefix("::ffff:"), peer[1]) == client.getsockname()[:2]

    def pair(self, kind: int, host: str) -> tuple[socket.socket, socket.socket]:
        """A client and the socket that serves it alone, beside the server "ordinary" on the same address and port."""
        ordinary = self.serve("ordinary", kind, host, PORT)
        client = self.bind(kind, host, 0)
        client.connect((host, PORT))
        if kind == TCP:
            served = self.stack.enter_context(ordinary.accept()[0])
            served.settimeout(5)
        else:
            served = self.bind(kind, host, PORT)
            served.connect(client.getsockname())
        return client, served

    def group(self, kind: int, host: str, port: int, chosen: int) -> list[socket.socket]:
        """Servers a and b share address and port; the program of their group chooses `chosen`, NOBODY drops."""
        group = [self.serve(name, kind, host, port, reuseport=True) for name in "ab"]
        choosing = self.stack.enter_context(self.opened(group, member=chosen)).programs["chooses"]
        group[0].setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, choosing.fileno())
        return group

    def opened(
        self, sockets: Sequence[socket.socket] = (), steps: Sequence[tuple[int, int]] = (), **settings: int
    ) -> Object:
        """The programs above, loaded; `steps` are places and flags, `sockets` stand at the places A, B, ..."""
        made = Object(self.compiled, "scripted")
        try:
            padded = [*steps, *[(NOBODY, 0)] * (5 - len(steps))]
            made.set(
                steps=len(steps), whom=[place for place, _ in padded], flags=[flag for _, flag in padded], **settings
            )
            made.load()
            made.maps["sockets"].update(list(range(len(sockets))), [sock.fileno() for sock in sockets])
        except BaseException:
            made.close()
            raise
        return made

    @contextlib.contextmanager
    def scripted(
        self, sockets: Sequence[socket.socket] = (), steps: Sequence[tuple[int, int]] = (), verdict: int = SK_PASS
    ) -> Iterator[Object]:
        with (
            self.opened(sockets, steps, verdict=verdict) as made,
            made.programs["scripted"].attach_netns(self.namespace.fd),
        ):
            yield made

    @contextlib.contextmanager
    def dispatching(self, binding: Binding, *members: socket.socket) -> Iterator[Object]:
        """The package's program, attached with one binding, whose label has these sockets."""
        numbers = {name: number for number, name in enumerate(destinations_of([binding]))}
        assert len(numbers) == 1
        with packaged("lookup") as lookup:
            lookup.maps["sockets"].max_entries, lookup.maps["counts"].max_entries = MEMBERS, 1
            compile_rules([binding], numbers).load(lookup)
            lookup.maps["sockets"].update(list(range(len(members))), [sock.fileno() for sock in members])
            with lookup.programs["lookup"].attach_netns(self.namespace.fd):
                yield lookup


@contextlib.contextmanager
def staged(compiled: bytes) -> Iterator[Stage]:
    """Loopback is up, and whole prefixes are local (RFC 5737, RFC 3849)."""
    with contextlib.closing(Namespace()) as namespace, namespace, contextlib.ExitStack() as stack:
        with IPRoute() as net:
            net.link("set", index=1, state="up")
            here = {"oif": 1, "type": "local", "table": 255}  # ip-route(8): local, table local
            net.route("add", dst="198.51.100.0/24", scope=254, **here)
            net.route("add", dst="2001:db8:7::/64", family=socket.AF_INET6, **here)
        yield Stage(namespace, stack, compiled)


def bound(kind: int, host: str, label: str | None = "service", interface: int = 0) -> Binding:
    return Binding("tcp" if kind == TCP else "udp", ip_network(host), (PORT, PORT), label, interface=interface)


def counted(lookup: Object) -> dict[str, int]:
    """The counters of the one destination that are not 0."""
    rows = lookup.maps["counts"].lookup([0])
    sums = {name: int(rows[name].sum()) for name in rows.dtype.names or ()}
    return {name: number for name, number in sums.items() if number}
