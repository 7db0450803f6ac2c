"""The lab: two private network namespaces joined by a veth pair, and nothing else.

    far namespace                      host namespace
    far0  192.0.2.2, 2001:db8::2 ----- host0  192.0.2.1, 2001:db8::1
    XDP program `swallow`              the sockets under flood

The namespaces have no name and no pin: they exist while this process (or a socket of it) holds them, so even SIGKILL
leaves nothing behind. All addresses are constants from the documentation ranges (RFC 5737, RFC 3849): nobody can point
the traffic source anywhere else, and there is no route out of the lab.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from pyroute2 import IPRoute
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD

from fastrecv.bpf import packaged

__all__ = ["BenchBusyError", "FAR_IP4", "FAR_IP6", "HOST_IP4", "HOST_IP6", "Lab", "Namespace", "quick_grace_periods"]

HOST_IP4, FAR_IP4 = "192.0.2.1", "192.0.2.2"
HOST_IP6, FAR_IP6 = "2001:db8::1", "2001:db8::2"

_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int) -> None:
    """unshare(2) and setns(2), which Python has only since 3.12."""
    if getattr(_libc, name)(*arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


class Namespace:
    """A nameless network namespace; `with namespace:` moves the calling thread into it. CAP_SYS_ADMIN."""

    def __init__(self) -> None:
        self._outside = threading.local()
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _call("unshare", _CLONE_NEWNET)
            self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            _call("setns", home, _CLONE_NEWNET)
        finally:
            os.close(home)

    @property
    def inode(self) -> int:
        return os.fstat(self.fd).st_ino

    def __enter__(self) -> Self:
        outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        _call("setns", self.fd, _CLONE_NEWNET)
        self._outside.stack = [*getattr(self._outside, "stack", []), outside]
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        outside = self._outside.stack.pop()
        _call("setns", outside, _CLONE_NEWNET)
        os.close(outside)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Lab:
    """The two namespaces, set up; a context manager.

    host, far : Namespace. host_index, far_index : interface indices. host_mac, far_mac : bytes.
    """

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        try:
            self._build()
        except BaseException:
            self._undo.close()
            raise

    def _build(self) -> None:
        self.host, self.far = (self._namespace() for _ in range(2))
        with self.far:
            far_net = self._undo.enter_context(IPRoute())
            _sysctl("ipv6/conf/default/disable_ipv6", 1)  # silent: what it would send is no part of a flood
        with self.host:
            _sysctl("ipv4/conf/all/rp_filter", 0)
            _sysctl("ipv4/conf/default/rp_filter", 0)
            _sysctl("ipv4/tcp_syncookies", 2)  # always, as the cover letter had it
            _sysctl("ipv6/conf/default/accept_dad", 0)
            _sysctl("ipv6/conf/default/router_solicitations", 0)
            net = self._undo.enter_context(IPRoute())
            net.link("add", ifname="host0", kind="veth", peer={"ifname": "far0", "net_ns_fd": self.far.fd})
        self.host_index, self.host_mac = _device(net, "host0")
        self.far_index, self.far_mac = _device(far_net, "far0")
        net.addr("add", index=self.host_index, address=HOST_IP4, prefixlen=24)
        net.addr("add", index=self.host_index, address=HOST_IP6, prefixlen=64, flags=IFA_F_NODAD)
        for address in (FAR_IP4, FAR_IP6):
            net.neigh("add", dst=address, lladdr=self.far_mac.hex(":"), ifindex=self.host_index, state="permanent")
        net.link("set", index=self.host_index, state="up")
        far_net.link("set", index=self.far_index, state="up")
        swallow = self._undo.enter_context(packaged("swallow"))
        swallow.load()
        with self.far:
            self._undo.enter_context(swallow.programs["swallow"].attach_xdp(self.far_index))

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


def _sysctl(name: str, value: int) -> None:
    """Set net.<name> of the calling thread's network namespace; it ends with the namespace."""
    Path("/proc/sys/net", name).write_text(f"{value}\n")


def _device(net: IPRoute, name: str) -> tuple[int, bytes]:
    (link,) = net.get_links(ifname=name)
    return link["index"], bytes.fromhex(link.get("address").replace(":", ""))


@contextlib.contextmanager
def quick_grace_periods() -> Iterator[None]:
    """Expedite RCU while the bench runs: a live BPF_PROG_RUN then costs 0.4 ms to set up instead of 25.

    The knob is the whole host's, so a second process keeps watch: it writes the old value back as soon as this one
    closes the pipe between them, on whatever way this one ends. A lock on the knob keeps a second bench out, which would
    read the changed value as the old one (and spoil both measurements).
    """
    knob = Path("/sys/kernel/rcu_expedited")
    with knob.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BenchBusyError("another fastrecv bench is running on this host: wait for it to end") from None
        before = file.read().strip()
        watch = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; echo "$1" >"$0"', str(knob), before],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C at the terminal is not for it
        )
        try:
            knob.write_text("1\n")
            yield
        finally:
            watch.communicate()


class BenchBusyError(RuntimeError):
    """Another bench runs on this host."""
