"""The test bed: exporters, a router with ECMP, hosts, and the engine, each a private network namespace.

    exporters ── router ─┬─ host 1 ─┐
    198.18/16            ├─ host 2 ─┼─ engine
                         └─ host 3 ─┘  203.0.113.1
         every host: 198.51.100.1, the collector's address

Flows come by the links on the left and nothing else does (neighbours are permanent, IPv6 is off), so that what a host's
link has received is what has come for its collector. What is on the right is TCP. As in `lab`, namespaces have no name,
addresses are those of documentation and benchmarking (RFC 5737, RFC 2544), and there is no way out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

from pyroute2 import IPRoute

from fastrecv.bench.lab import device, sysctl
from fastrecv.bench.numbered import udp_counters
from fastrecv.bench.scale_out.addresses import COLLECTOR, ENGINE, EXPORTERS
from fastrecv.netns import Namespace

__all__ = ["MOST_HOSTS", "Bed", "Policy"]

MOST_HOSTS = 32
Policy = Literal[0, 1]
"""net.ipv4.fib_multipath_hash_policy: 0 by addresses, 1 by addresses, protocol and ports (ip-sysctl.rst)."""

_NEXT_HOPS, _FABRIC = "192.0.2", "203.0.113"  # a /30 each: 0 is the exporters', then one a host


class Bed:
    """A context manager. Root: CAP_NET_ADMIN, CAP_SYS_ADMIN. Hosts are numbered from 1, and made by `add_host`.

    exporters, router, engine : Namespace. hosts : by number.
    """

    def __init__(self, policy: Policy) -> None:
        self._undo = contextlib.ExitStack()
        self.hosts: dict[int, Namespace] = {}
        try:
            self._build(policy)
        except BaseException:
            self._undo.close()
            raise

    def _build(self, policy: Policy) -> None:
        self.exporters, self._exporters = self._namespace()
        self.router, self._router = self._namespace()
        self.engine, self._engine = self._namespace()
        with self.router:
            sysctl("ipv4/ip_forward", 1)
            sysctl("ipv4/fib_multipath_hash_policy", policy)
        here, there = self._join(self._router, "exporters", self._exporters, self.exporters, "uplink", _NEXT_HOPS, 0)
        self._router.route("add", dst=f"{EXPORTERS}/16", gateway=there)
        self._exporters.route("add", dst=f"{COLLECTOR}/32", gateway=here)
        loopback = {"type": "local", "table": 255, "scope": 254}  # ip-route(8): local, table local, scope host
        self._exporters.route("add", dst=f"{EXPORTERS}/16", oif=1, **loopback)
        self._engine.addr("add", index=1, address=ENGINE, prefixlen=32)

    def add_host(self) -> int:
        """Another host, linked to router and engine, to which nothing is routed yet; its number."""
        number = len(self.hosts) + 1
        if number > MOST_HOSTS:
            raise ValueError(f"{number} hosts: {MOST_HOSTS} at most")
        space, net = self._namespace()
        here, _ = self._join(self._router, f"host{number}", net, space, "data", _NEXT_HOPS, number)
        net.addr("add", index=1, address=COLLECTOR, prefixlen=32)
        net.route("add", dst=f"{EXPORTERS}/16", gateway=here)
        here, _ = self._join(self._engine, f"host{number}", net, space, "fabric", _FABRIC, number)
        net.route("add", dst=f"{ENGINE}/32", gateway=here)
        self.hosts[number] = space
        return number

    def route(self, hosts: Sequence[int]) -> None:
        """From now on the router shares the collector's address among these hosts, one at least, in this order."""
        hops = [{"gateway": f"{_NEXT_HOPS}.{4 * number + 2}", "hops": 0} for number in hosts]
        self._router.route("replace", dst=f"{COLLECTOR}/32", multipath=hops)

    def arrived(self, number: int) -> int:
        """Datagrams that have come to a host."""
        with self.hosts[number], IPRoute() as net:
            (link,) = net.get_links(ifname="data")
        return int(link.get("stats64")["rx_packets"])

    def counters(self, number: int) -> dict[str, int]:
        """What UDP has counted at a host (/proc/net/snmp)."""
        return udp_counters(self.hosts[number])

    def _namespace(self) -> tuple[Namespace, IPRoute]:
        space = Namespace()
        self._undo.callback(space.close)
        with space:
            for name in ("all", "default"):
                with contextlib.suppress(FileNotFoundError):  # a kernel may be booted without
                    sysctl(f"ipv6/conf/{name}/disable_ipv6", 1)
                sysctl(f"ipv4/conf/{name}/rp_filter", 0)
            net = self._undo.enter_context(IPRoute())
        net.link("set", index=1, state="up")
        return space, net

    def _join(
        self, near: IPRoute, name: str, far: IPRoute, space: Namespace, far_name: str, network: str, number: int
    ) -> tuple[str, str]:  # fmt: skip
        """A veth pair between two namespaces; the addresses of both ends."""
        addresses = f"{network}.{4 * number + 1}", f"{network}.{4 * number + 2}"
        near.link("add", ifname=name, kind="veth", peer={"ifname": far_name, "net_ns_fd": space.fd})
        ends = [(near, *device(near, name)), (far, *device(far, far_name))]
        for (net, index, _), (_, _, mac), own, other in zip(
            ends, reversed(ends), addresses, reversed(addresses), strict=True
        ):
            net.addr("add", index=index, address=own, prefixlen=30)
            net.neigh("add", dst=other, lladdr=mac.hex(":"), ifindex=index, state="permanent")
        for net, index, _ in ends:
            net.link("set", index=index, state="up")
        return addresses

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()
