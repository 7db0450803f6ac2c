"""The lab: two private network namespaces joined by a veth pair, and nothing else.

    far namespace                      host namespace
    far0  192.0.2.2, 2001:db8::2 ----- host0  192.0.2.1, 2001:db8::1
    XDP program `swallow`              the sockets under flood

The namespaces have no name and no pin: they exist while this process (or a socket of it) holds them, so even SIGKILL
leaves nothing behind. All addresses are constants from the ranges for documentation (RFC 5737, RFC 3849) and, where
there are many, for benchmarking (RFC 2544, RFC 5180): nobody can point the traffic source anywhere else, and there is
no route out of the lab.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from pyroute2 import IPRoute
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD

from fastrecv.bpf import packaged
from fastrecv.netns import Namespace

__all__ = [
    "FAR_IP4",
    "FAR_IP6",
    "HOST_IP4",
    "HOST_IP6",
    "MANY_FAR_IP4",
    "MANY_FAR_IP6",
    "MANY_HOST_IP4",
    "MANY_HOST_IP6",
    "BenchBusyError",
    "Lab",
    "device",
    "private_bpffs",
    "quick_grace_periods",
    "sysctl",
]

HOST_IP4, FAR_IP4 = "192.0.2.1", "192.0.2.2"
HOST_IP6, FAR_IP6 = "2001:db8::1", "2001:db8::2"
# Networks whose last 16 bits vary.
MANY_HOST_IP4, MANY_FAR_IP4 = "198.19.0.0", "198.18.0.0"
MANY_HOST_IP6, MANY_FAR_IP6 = "2001:2:0:2::", "2001:2:0:1::"


class Lab:
    """The two namespaces, set up; a context manager.

    wire : the host's end takes frames through NAPI and GRO, as from a network card.
    host, far : Namespace. host_index, far_index : interface indices. host_mac, far_mac : bytes.
    """

    def __init__(self, wire: bool = False) -> None:
        self._undo = contextlib.ExitStack()
        try:
            self._build(wire)
        except BaseException:
            self._undo.close()
            raise

    def _build(self, wire: bool) -> None:
        ipv6 = Path("/proc/sys/net/ipv6").is_dir()  # a kernel may be booted without
        self.host, self.far = (self._namespace() for _ in range(2))
        with self.far:
            far_net = self._undo.enter_context(IPRoute())
            if ipv6:
                sysctl("ipv6/conf/default/disable_ipv6", 1)  # silent: what it would send is no part of a flood
        with self.host:
            sysctl("ipv4/conf/all/rp_filter", 0)
            sysctl("ipv4/conf/default/rp_filter", 0)
            sysctl("ipv4/tcp_syncookies", 2)  # always, as the cover letter had it
            if ipv6:
                sysctl("ipv6/conf/default/accept_dad", 0)
                sysctl("ipv6/conf/default/router_solicitations", 0)
            net = self._undo.enter_context(IPRoute())
            net.link("add", ifname="host0", kind="veth", peer={"ifname": "far0", "net_ns_fd": self.far.fd})
        self.host_index, self.host_mac = device(net, "host0")
        self.far_index, self.far_mac = device(far_net, "far0")
        net.addr("add", index=self.host_index, address=HOST_IP4, prefixlen=24)
        if ipv6:
            net.addr("add", index=self.host_index, address=HOST_IP6, prefixlen=64, flags=IFA_F_NODAD)
        for address in (FAR_IP4, FAR_IP6) if ipv6 else (FAR_IP4,):
            net.neigh("add", dst=address, lladdr=self.far_mac.hex(":"), ifindex=self.host_index, state="permanent")
        self._ipv6 = ipv6
        net.link("set", index=self.host_index, state="up")
        far_net.link("set", index=self.far_index, state="up")
        swallow = self._undo.enter_context(packaged("swallow"))
        swallow.load()
        self._swallow = swallow.programs["swallow"]
        self._net = net
        with self.far:
            self._undo.enter_context(self._swallow.attach_xdp(self.far_index))
        if wire:
            with self.host:
                _receive_offload("host0")

    def open_to_many(self) -> None:
        """Let the host have, and answer to, all addresses of the networks whose last 16 bits vary."""
        families = [(socket.AF_INET, MANY_HOST_IP4, MANY_FAR_IP4, FAR_IP4, 16)]
        if self._ipv6:
            families.append((socket.AF_INET6, MANY_HOST_IP6, MANY_FAR_IP6, FAR_IP6, 112))
        for family, here, there, gateway, length in families:
            local = {"type": "local", "table": 255, "scope": 254}  # ip-route(8): local, table local, scope host
            self._net.route("add", family=family, dst=f"{here}/{length}", oif=self.host_index, **local)
            self._net.route("add", family=family, dst=f"{there}/{length}", gateway=gateway, oif=self.host_index)

    @contextlib.contextmanager
    def swallowing(self) -> Iterator[None]:
        """While it lasts, host0 drops every frame before the stack sees it: what wire and source cost alone."""
        with self.host:
            link = self._swallow.attach_xdp(self.host_index)
        with link:
            yield

    def received(self) -> int:
        """Packets that host0 has received, by its interface counters."""
        (link,) = self._net.get_links(index=self.host_index)
        return int(link.get("stats64")["rx_packets"])

    def _namespace(self) -> Namespace:
        namespace = Namespace()
        self._undo.callback(namespace.close)
        return namespace

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()


def sysctl(name: str, value: int) -> None:
    """Set net.<name> of the calling thread's network namespace; it ends with the namespace."""
    Path("/proc/sys/net", name).write_text(f"{value}\n")


def _receive_offload(name: str) -> None:
    """Turn GRO on: a veth end then receives through NAPI. ethtool(8); SIOCETHTOOL of linux/sockios.h."""
    set_gro = ctypes.create_string_buffer(struct.pack("II", 0x2C, 1))  # struct ethtool_value, ETHTOOL_SGRO
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, 0x8946, struct.pack("16sP", name.encode(), ctypes.addressof(set_gro)))


def device(net: IPRoute, name: str) -> tuple[int, bytes]:
    """Index and hardware address of an interface."""
    (link,) = net.get_links(ifname=name)
    return link["index"], bytes.fromhex(link.get("address").replace(":", ""))


@contextlib.contextmanager
def quick_grace_periods() -> Iterator[None]:
    """Expedite RCU while the bench runs: a live BPF_PROG_RUN then costs 0.4 ms to set up instead of 25.

    The knob is the whole host's, so a second process keeps watch: it writes the old value back as soon as this one
    closes the pipe between them, on whatever way this one ends. A lock on the knob keeps a second bench out, which
    would read the changed value as the old one (and spoil both measurements).
    """
    knob = Path("/sys/kernel/rcu_expedited")
    with knob.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BenchBusyError("another fastrecv bench is running on this host: wait for it to end") from None
        before = file.read().strip()
        watch = subprocess.Popen(  # noqa: S603 - a constant script and the knob's own value
            ["/bin/sh", "-c", 'trap "" TERM INT HUP; read -r _; echo "$1" >"$0"', str(knob), before],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C at the terminal is not for it
        )
        try:
            knob.write_text("1\n")
            yield
        finally:
            knob.write_text(before)
            watch.communicate()


@contextlib.contextmanager
def private_bpffs() -> Iterator[Path]:
    """A BPF file system that is seen nowhere else; what is pinned in it goes with it. CAP_SYS_ADMIN."""
    with tempfile.TemporaryDirectory(prefix="fastrecv-") as made:
        subprocess.run(["/bin/mount", "-t", "bpf", "bpf", made], check=True)  # noqa: S603 - a directory just made
        try:
            yield Path(made)
        finally:
            subprocess.run(["/bin/umount", made], check=True)  # noqa: S603 - the same


class BenchBusyError(RuntimeError):
    """Another bench runs on this host."""
