"""What this kernel and these privileges allow, and why not.

Every feature is data: its name, the kernel that brought it, the privilege it takes, and a probe that tries it for real.
`check` answers by running the probe once; a probe that fails on a kernel that is new enough and with the privilege at
hand is a defect of this package or of the kernel's configuration, and is reported as what it is.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from errno import EACCES, ENOSYS, EPERM
from pathlib import Path

from fastrecv.errors import NotSupported
from fastrecv.netns import Namespace

__all__ = ["FEATURES", "Feature", "check", "kernel_version"]


@dataclass(frozen=True)
class Feature:
    """One thing a kernel may do. part : of fastrecv, that needs it. kernel : (major, minor) that brought it.

    privilege : "" where none is needed.
    """

    part: str
    name: str
    kernel: tuple[int, int]
    privilege: str
    probe: Callable[[], object]

    @property
    def requires(self) -> str:
        needs = f"Linux {self.kernel[0]}.{self.kernel[1]}"
        return f"{needs} and {self.privilege}" if self.privilege else needs


def kernel_version() -> tuple[int, int]:
    """(major, minor) of the running kernel."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert match is not None
    return int(match[1]), int(match[2])


def check(name: str) -> None:
    """Return when the feature (a name in FEATURES) works here; raise NotSupported, with the reason, when not."""
    if name not in FEATURES:
        raise ValueError(f"no feature {name!r}: choose from {', '.join(FEATURES)}")
    failure = _failure(name)
    if failure is not None:
        feature = FEATURES[name]
        raise NotSupported(name, feature.requires, *failure)


@functools.cache
def _failure(name: str) -> tuple[int, str] | None:
    """(errno, reason) of a feature that does not work; None when it does."""
    feature = FEATURES[name]
    if kernel_version() < feature.kernel:
        return ENOSYS, f"this is Linux {os.uname().release}, a newer one has it"
    try:
        feature.probe()
    except ImportError as error:
        return ENOSYS, str(error)
    except OSError as error:
        if error.errno in (EPERM, EACCES):
            return error.errno, "run as root, or grant the privilege"
        return error.errno or ENOSYS, str(error)
    return None


def _namespace() -> None:
    Namespace().close()


def _veth() -> None:
    from pyroute2 import IPRoute  # noqa: PLC0415 - an optional dependency; only the lab needs it
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    namespace = Namespace()
    try:
        with namespace, IPRoute() as net:
            net.link("add", ifname="probe0", kind="veth", peer={"ifname": "probe1"})
    except NetlinkError as error:
        raise OSError(error.code, f"cannot create a veth pair: {os.strerror(error.code)}") from error
    finally:
        namespace.close()


def _sk_lookup() -> None:
    from fastrecv.bpf import packaged  # noqa: PLC0415 - the receive core works without libbpf

    namespace = Namespace()
    try:
        with packaged("decoy") as decoy, decoy.load().programs["decoy"].attach_netns(namespace.fd):
            pass
    finally:
        namespace.close()


def _sockmap() -> None:
    from fastrecv.bpf import packaged  # noqa: PLC0415 - the receive core works without libbpf

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, packaged("assign") as assign:
        sock.bind(("127.0.0.1", 0))
        assign.load().maps["sockets"].update([0], [sock.fileno()])


def _live_frames() -> None:
    from fastrecv.bpf import packaged  # noqa: PLC0415 - the receive core works without libbpf

    namespace = Namespace()
    try:
        with namespace, packaged("swallow") as swallow:
            swallow.load().programs["swallow"].run_live(bytes(64), socket.if_nametoindex("lo"), 1)
    finally:
        namespace.close()


def _bpf_enumeration() -> None:
    from fastrecv.bpf import sk_lookup_links  # noqa: PLC0415 - the receive core works without libbpf

    sk_lookup_links()


def _bpf_statistics() -> None:
    from fastrecv.bpf import Statistics  # noqa: PLC0415 - the receive core works without libbpf

    Statistics().close()


def _ipv6() -> None:
    socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()


def _cookies() -> None:
    with contextlib.closing(Namespace.open()) as here:
        assert here.cookie


def _bpffs() -> None:
    from fastrecv.pins import check_mounted  # noqa: PLC0415 - the receive core works without libbpf

    check_mounted(Path("/sys/fs/bpf"))


def _dispatcher() -> None:
    from fastrecv.bpf import packaged  # noqa: PLC0415 - the receive core works without libbpf

    with packaged("lookup") as lookup:
        lookup.load()


def _balancer() -> None:
    from fastrecv.bpf import packaged  # noqa: PLC0415 - the receive core works without libbpf

    with packaged("balance") as balance:
        balance.load()


def _foreign_sockets() -> None:
    from fastrecv.listeners import check_tracing  # noqa: PLC0415 - only who asks for it needs ctypes

    check_tracing()


def _groups() -> None:
    from fastrecv.groups import Groups  # noqa: PLC0415 - the receive core works without libbpf

    with Groups() as groups:
        groups.sockets()


def _watching() -> None:
    from fastrecv.watching import Watch  # noqa: PLC0415 - the receive core works without libbpf

    Watch().close()


def _af_xdp() -> None:
    from pyroute2 import IPRoute  # noqa: PLC0415 - an optional dependency; a veth is what there is everywhere

    from fastrecv.xdp import XdpReceiver  # noqa: PLC0415 - the receive core works without libxdp

    namespace = Namespace()
    try:
        with namespace, IPRoute() as net:
            net.link("add", ifname="probe0", kind="veth", peer={"ifname": "probe1"})
            net.addr("add", index=socket.if_nametoindex("probe0"), address="192.0.2.1", prefixlen=24)  # RFC 5737
            XdpReceiver("probe0", 9, ring_size=2, frames=2).close()
    finally:
        namespace.close()


def _rcu_expedited() -> None:
    Path("/sys/kernel/rcu_expedited").open("r+").close()


FEATURES = {
    feature.name: feature
    for feature in (
        Feature("bench", "network namespaces", (3, 0), "CAP_SYS_ADMIN", _namespace),
        Feature("bench", "veth devices", (2, 6), "CAP_NET_ADMIN and CAP_SYS_ADMIN", _veth),
        Feature("steering", "cookies of network namespaces", (5, 14), "", _cookies),
        Feature("all", "IPv6", (2, 6), "", _ipv6),
        Feature("steering", "sk_lookup programs", (5, 9), "CAP_BPF and CAP_NET_ADMIN", _sk_lookup),
        Feature("steering", "the dispatcher's program", (5, 17), "CAP_BPF and CAP_NET_ADMIN", _dispatcher),
        Feature("steering", "the balancer's program", (5, 14), "CAP_BPF", _balancer),
        Feature("steering", "a BPF file system at /sys/fs/bpf", (4, 4), "", _bpffs),
        Feature(
            "steering",
            "sockets of other processes",
            (5, 6),
            "CAP_SYS_PTRACE for those of other users",
            _foreign_sockets,
        ),
        Feature("steering", "UDP sockets in a SOCKMAP", (5, 7), "CAP_BPF and CAP_NET_ADMIN", _sockmap),
        Feature("steering", "reading reuseport groups", (5, 12), "CAP_BPF and CAP_PERFMON", _groups),
        Feature("steering", "watching sockets", (5, 17), "CAP_BPF and CAP_PERFMON", _watching),
        Feature("AF_XDP", "AF_XDP in copy mode", (5, 18), "CAP_BPF, CAP_NET_ADMIN and CAP_NET_RAW", _af_xdp),
        Feature("bench", "live frames in BPF_PROG_RUN", (5, 18), "CAP_BPF and CAP_NET_ADMIN", _live_frames),
        Feature("bench", "enumeration of BPF links", (5, 8), "CAP_SYS_ADMIN", _bpf_enumeration),
        Feature("bench", "BPF run-time statistics", (5, 8), "CAP_SYS_ADMIN", _bpf_statistics),
        Feature("bench", "expedited RCU grace periods", (3, 19), "root", _rcu_expedited),
    )
}
