"""The two services that the sk_lookup patch series was made for, end to end, by the command line alone.

A service for a whole prefix on one port, and a proxy for all ports of one address: TCP and UDP, IPv4 and IPv6, clients
in another namespace behind a router's veth, sockets that know nothing of any of it.
"""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyroute2 import IPRoute
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD

from fastrecv import Receiver
from fastrecv.cli.main import run
from fastrecv.netns import Namespace

SERVICE = {4: "192.0.2.0/24", 6: "2001:db8:1::/64"}
PROXY = {4: "198.51.100.1", 6: "2001:db8:2::1"}
NEAR = {4: "203.0.113.1", 6: "2001:db8:3::1"}
FAR = {4: "203.0.113.2", 6: "2001:db8:3::2"}
LENGTH = {4: 24, 6: 64}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}


@dataclass
class Net:
    """The namespaces of the services and of the clients, and the command line in the former."""

    here: Namespace
    far: Namespace
    bpffs: Path

    def fastrecv(self, *words: object) -> None:
        with self.here:
            assert run(["lookup", *map(str, words), "--bpffs", str(self.bpffs)]) == 0

    def connect(self, kind: int, host: str, port: int) -> socket.socket:
        """A client in the far namespace; connected, so it takes answers from there and from nowhere else."""
        with self.far:
            client = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
        client.settimeout(5)
        try:
            client.connect((host, port))
        except BaseException:
            client.close()
            raise
        return client


@pytest.fixture
def net(bpffs: Path) -> Iterator[Net]:
    with contextlib.closing(Namespace()) as here, contextlib.closing(Namespace()) as far:
        with here, IPRoute() as near:
            near.link("set", index=1, state="up")
            near.link("add", ifname="near", kind="veth", peer={"ifname": "far", "net_ns_fd": far.fd})
            with far, IPRoute() as remote:
                for version in (4, 6):
                    for net_, name, addresses in ((near, "near", NEAR), (remote, "far", FAR)):
                        (index,) = net_.link_lookup(ifname=name)
                        net_.addr("add", index=index, address=addresses[version], prefixlen=LENGTH[version],
                                  flags=IFA_F_NODAD)  # fmt: skip
                        net_.link("set", index=index, state="up")
                for version in (4, 6):
                    for dst in (SERVICE[version], PROXY[version]):
                        remote.route("add", dst=dst, gateway=NEAR[version], family=FAMILY[version])
                        scope = {"scope": 254} if version == 4 else {}
                        near.route("add", dst=dst, oif=1, type="local", table=255, family=FAMILY[version], **scope)
        yield Net(here, far, bpffs)


def answering(listener: socket.socket, name: str) -> Callable[[], None]:
    """Says to every connection who answers and which address was asked, then echoes."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=echo, args=(connection,), daemon=True).start()

    def echo(connection: socket.socket) -> None:
        with connection:
            host, port = connection.getsockname()[:2]
            connection.sendall(f"{name} {host} {port}\n".encode())
            while said := connection.recv(99):
                connection.sendall(said)

    return serve


def echoing(namespace: Namespace, receiver: Receiver, name: str) -> Callable[[], None]:
    """Answers every datagram from where it was sent to, with who answers and which address was asked."""

    def serve() -> None:
        with namespace, contextlib.suppress(ValueError):  # closed
            for batch in receiver:
                told = [batch.destination(row) for row in range(len(batch))]
                assert None not in told
                receiver.reply(
                    batch, [f"{name} {where[0]} {where[1]}\n".encode() for where in told if isinstance(where, tuple)]
                )

    return serve


@contextlib.contextmanager
def services(net: Net, name: str) -> Iterator[dict[tuple[int, int], int]]:
    """A TCP and a UDP socket of each family on loopback and a port of their own, served; their descriptors."""
    threads = []
    with contextlib.ExitStack() as stack:
        found: dict[tuple[int, int], int] = {}
        for version in (4, 6):
            with net.here:
                listener = stack.enter_context(socket.create_server((LOOPBACK[version], 0), family=FAMILY[version]))
                receiver = Receiver.bind((LOOPBACK[version], 0), destinations=True, destination_ports=True)
            stack.callback(receiver.close)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            threads += [threading.Thread(target=answering(listener, name)),
                        threading.Thread(target=echoing(net.here, receiver, name))]  # fmt: skip
            found[version, socket.SOCK_STREAM] = listener.fileno()
            found[version, socket.SOCK_DGRAM] = receiver.socket.fileno()
        for thread in threads:
            thread.start()
        try:
            yield found
        finally:
            stack.close()
            for thread in threads:
                thread.join(5)
    assert not any(thread.is_alive() for thread in threads)


def asked(net: Net, kind: int, host: str, port: int) -> str:
    with net.connect(kind, host, port) as client:
        if kind == socket.SOCK_DGRAM:
            client.send(b"who?")
        return client.recv(99).decode()


def hosts(prefix: str, count: int) -> list[str]:
    """Addresses of a prefix, its first and its last among them."""
    base, length = prefix.split("/")
    bits = (32 if "." in base else 128) - int(length)
    family = socket.AF_INET if "." in base else socket.AF_INET6
    first = int.from_bytes(socket.inet_pton(family, base))
    rng = random.Random(1)
    picked = [0, (1 << bits) - 1, *(rng.randrange(1 << bits) for _ in range(count))]
    return [socket.inet_ntop(family, (first + one).to_bytes(4 if family == socket.AF_INET else 16)) for one in picked]


KINDS = pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


@KINDS
@VERSIONS
def test_one_socket_serves_a_whole_prefix_on_one_port(net: Net, version: int, kind: int) -> None:
    protocol = "tcp" if kind == socket.SOCK_STREAM else "udp"
    with services(net, "web") as found:
        net.fastrecv("load")
        net.fastrecv("bind", "web", protocol, SERVICE[version], 80)
        net.fastrecv("register", "web", "--fd", found[version, kind])
        for host in hosts(SERVICE[version], 30):
            assert asked(net, kind, host, 80) == f"web {host} 80\n"
        with pytest.raises(ConnectionRefusedError):
            asked(net, kind, hosts(SERVICE[version], 0)[1], 81)
        net.fastrecv("unload")


@KINDS
@VERSIONS
def test_one_socket_serves_all_ports_of_an_address(net: Net, version: int, kind: int) -> None:
    protocol = "tcp" if kind == socket.SOCK_STREAM else "udp"
    with services(net, "proxy") as found:
        net.fastrecv("load")
        net.fastrecv("bind", "proxy", protocol, PROXY[version], "any")
        net.fastrecv("register", "proxy", "--fd", found[version, kind])
        for port in (1, 22, 80, 443, 5060, 65535, *random.Random(2).sample(range(1, 65536), 30)):
            assert asked(net, kind, PROXY[version], port) == f"proxy {PROXY[version]} {port}\n"
        with pytest.raises(ConnectionRefusedError):
            asked(net, kind, hosts(SERVICE[version], 0)[1], 80)
        net.fastrecv("unload")


def test_both_together_and_what_is_connected_goes_on_through_load_changes_and_unload(net: Net) -> None:
    with contextlib.ExitStack() as stack:
        kept: list[socket.socket] = []

        def keep(client: socket.socket, greeting: str) -> None:
            kept.append(stack.enter_context(client))
            assert client.recv(99).decode() == greeting

        def all_go_on() -> None:
            for number, client in enumerate(kept):
                client.sendall(b"still there %d" % number)
                assert client.recv(99) == b"still there %d" % number

        with net.here:
            ordinary = stack.enter_context(socket.create_server((hosts(SERVICE[4], 0)[0], 80)))
        accepting = threading.Thread(target=answering(ordinary, "ordinary"))
        accepting.start()
        stack.callback(accepting.join, 5)
        stack.callback(ordinary.shutdown, socket.SHUT_RDWR)
        host = hosts(SERVICE[4], 0)[0]
        keep(net.connect(socket.SOCK_STREAM, host, 80), f"ordinary {host} 80\n")

        web, proxy = stack.enter_context(services(net, "web")), stack.enter_context(services(net, "proxy"))
        net.fastrecv("load")
        all_go_on()
        for version in (4, 6):
            net.fastrecv("bind", "web", "any", SERVICE[version], 80)
            net.fastrecv("bind", "proxy", "any", PROXY[version], "any")
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                for label, found in (("web", web), ("proxy", proxy)):
                    net.fastrecv("register", label, "--fd", found[version, kind])
        all_go_on()
        for version in (4, 6):
            keep(net.connect(socket.SOCK_STREAM, PROXY[version], 4242), f"proxy {PROXY[version]} 4242\n")
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                for host in hosts(SERVICE[version], 5):
                    assert asked(net, kind, host, 80) == f"web {host} 80\n"
                    assert asked(net, kind, PROXY[version], 53) == f"proxy {PROXY[version]} 53\n"
        host = hosts(SERVICE[4], 0)[0]
        keep(net.connect(socket.SOCK_STREAM, host, 80), f"web {host} 80\n")
        all_go_on()
        net.fastrecv("unbind", "web", "any", SERVICE[4], 80)
        all_go_on()
        keep(net.connect(socket.SOCK_STREAM, host, 80), f"ordinary {host} 80\n")
        net.fastrecv("unload")
        all_go_on()
        assert asked(net, socket.SOCK_STREAM, host, 80) == f"ordinary {host} 80\n"
        with pytest.raises(ConnectionRefusedError):
            asked(net, socket.SOCK_STREAM, PROXY[4], 4242)


def test_the_example_serves_every_port_of_a_prefix(net: Net) -> None:
    example = Path(__file__).parents[2] / "examples" / "any_port.py"
    net.fastrecv("load")
    for version in (4, 6):
        net.fastrecv("bind", "everything", "udp", SERVICE[version], "any")
    with net.here:
        service = subprocess.Popen(
            [sys.executable, str(example), "everything", str(net.bpffs)], stdout=subprocess.PIPE, text=True
        )
    with service, contextlib.ExitStack() as stack:
        stack.callback(service.kill)
        assert service.stdout is not None
        assert service.stdout.readline() == "serving everything\n"
        for version in (4, 6):
            for host, port in zip(hosts(SERVICE[version], 20), [53, 1, 65535, *range(4000, 4019)], strict=True):
                assert asked(net, socket.SOCK_DGRAM, host, port) == f"you asked {host} port {port}"
    net.fastrecv("unload")
