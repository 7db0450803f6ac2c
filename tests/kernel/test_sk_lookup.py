"""The sk_lookup hook on real traffic: who answers whom, mostly with the package's own program.

Here and in test_sk_lookup_context.py is every behaviour that the kernel's own test of the hook
(tools/testing/selftests/bpf/prog_tests/sk_lookup.c) has and that shows in user space.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import replace
from ipaddress import ip_network
from typing import Literal

import pytest
from pyroute2 import IPRoute
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD

from fastrecv.netns import Namespace
from tests.kernel.steering import (
    NO_REUSEPORT,
    NOBODY,
    PORT,
    REFUSED,
    TCP,
    UDP,
    A,
    B,
    Stage,
    bound,
    counted,
    kinds,
    nets,
)

ELSEWHERE = [(1, 8008), (2, PORT), (2, 8008)]


@kinds
@nets
@pytest.mark.parametrize(("host", "port"), ELSEWHERE, ids=["port", "address", "both"])
def test_a_binding_takes_new_flows_to_another_port_or_address_while_it_is_attached(
    stage: Stage, kind: int, net: str, host: int, port: int
) -> None:
    asked = net.format(1)
    stage.serve("ordinary", kind, asked, PORT)
    service = stage.serve("service", kind, net.format(host), port)
    for _ in range(2):
        assert stage.ask(kind, asked) == "ordinary"
        with stage.dispatching(bound(kind, asked), service) as lookup:
            assert stage.ask(kind, asked) == "service"
            assert stage.ask(kind, net.format(3)) == REFUSED
            assert counted(lookup) == {"lookups": 1}
    assert stage.ask(kind, asked) == "ordinary"


@kinds
@pytest.mark.parametrize("home", ["::", "::ffff:198.51.100.2"])
@pytest.mark.parametrize("port", [PORT, 8008])
def test_an_ipv6_socket_that_takes_both_families_gets_ipv4(stage: Stage, kind: int, home: str, port: int) -> None:
    service = stage.serve("service", kind, home, port)
    with stage.dispatching(bound(kind, "198.51.100.1"), service) as lookup:
        assert stage.ask(kind, "198.51.100.1") == "service"
        assert counted(lookup) == {"lookups": 1}


GROUPS = pytest.mark.parametrize(
    ("kind", "connected"), [(TCP, False), (UDP, False), (UDP, True)], ids=["tcp", "udp", "udp-with-a-connected-member"]
)


@GROUPS
@nets
@pytest.mark.parametrize(("chosen", "by"), [(A, "a"), (B, "b"), (NOBODY, REFUSED)], ids=["a", "b", "drop"])
def test_the_program_of_a_reuseport_group_decides_which_member_gets_what_came_to_one(
    stage: Stage, kind: int, net: str, connected: bool, chosen: int, by: str
) -> None:
    asked = net.format(1)
    stage.serve("ordinary", kind, asked, PORT)
    members = stage.group(kind, net.format(2), 8008, chosen)
    if connected:
        stage.servers["connected"] = stage.bind(kind, net.format(2), 8008, reuseport=True)
        stage.servers["connected"].connect((net.format(3), 9))
    with stage.dispatching(bound(kind, asked), members[A]):
        assert [stage.ask(kind, asked) for _ in range(3)] == [by] * 3
    with stage.scripted(members, [(A, NO_REUSEPORT)]):
        assert stage.ask(kind, asked) == "a", "the group is skipped when the assignment says so"
    assert stage.ask(kind, asked) == "ordinary"


@kinds
@nets
def test_without_a_program_all_members_of_a_reuseport_group_get_some(stage: Stage, kind: int, net: str) -> None:
    members = [stage.serve(name, kind, net.format(2), 8008, reuseport=True) for name in "abc"]
    with stage.dispatching(bound(kind, net.format(1)), members[A]):
        assert {stage.ask(kind, net.format(1)) for _ in range(100)} == set("abc")
    with stage.scripted(members, [(A, NO_REUSEPORT)]):
        assert {stage.ask(kind, net.format(1)) for _ in range(20)} == {"a"}


@kinds
@nets
def test_a_binding_that_drops_refuses_what_a_server_would_have_taken(stage: Stage, kind: int, net: str) -> None:
    asked = net.format(1)
    stage.serve("ordinary", kind, asked, PORT)
    with stage.dispatching(bound(kind, asked, None)) as lookup:
        assert stage.ask(kind, asked) == REFUSED
        assert counted(lookup) == {"lookups": 1}
    assert stage.ask(kind, asked) == "ordinary"


@kinds
@nets
@pytest.mark.parametrize(("label", "by"), [(None, REFUSED), ("service", "service")])
def test_connected_sockets_are_found_before_the_program_whatever_is_attached_or_detached(
    stage: Stage, kind: int, net: str, label: str | None, by: str
) -> None:
    client, served = stage.pair(kind, net.format(1))
    service = stage.serve("service", kind, net.format(2), 8008)

    def talk() -> None:
        client.send(b"?")
        assert served.recv(9) == b"?"
        served.send(b"!")
        assert client.recv(9) == b"!"

    talk()
    for _ in range(2):
        with stage.dispatching(bound(kind, net.format(1), label), service) as lookup:
            talk()
            assert counted(lookup) == {}
            assert stage.ask(kind, net.format(1)) == by
            talk()
            assert counted(lookup) == {"lookups": 1}
        talk()
        assert stage.ask(kind, net.format(1)) == "ordinary"


@nets
def test_a_socket_that_connects_after_it_was_registered_is_counted_as_unfit(stage: Stage, net: str) -> None:
    service = stage.serve("service", UDP, net.format(2), 8008)
    with stage.dispatching(bound(UDP, net.format(1)), service) as lookup:
        assert stage.ask(UDP, net.format(1)) == "service"
        service.connect((net.format(3), 9))
        assert stage.ask(UDP, net.format(1)) == REFUSED
        assert counted(lookup) == {"lookups": 2, "unfit": 1}


@pytest.mark.parametrize("on_miss", ["drop", "pass"])
@pytest.mark.parametrize(("kind", "how", "counter"), [
    (TCP, "close", "misses"), (UDP, "close", "misses"), (TCP, "shutdown", "unfit")
])  # fmt: skip
def test_when_a_socket_goes_the_next_one_takes_over_and_after_the_last_the_binding_drops_or_passes(
    stage: Stage, kind: int, how: str, counter: str, on_miss: Literal["drop", "pass"]
) -> None:
    stage.serve("ordinary", kind, "198.51.100.1", PORT)
    first, second = (stage.serve(name, kind, "198.51.100.2", port) for name, port in (("first", 1), ("second", 2)))
    last = "ordinary" if (how, on_miss) == ("close", "pass") else REFUSED
    with stage.dispatching(replace(bound(kind, "198.51.100.1"), on_miss=on_miss), first, second) as lookup:
        for name, sock, successor in (("first", first, "second"), ("second", second, last)):
            assert stage.ask(kind, "198.51.100.1") == name
            del stage.servers[name]
            sock.shutdown(socket.SHUT_RDWR) if how == "shutdown" else sock.close()
            assert stage.ask(kind, "198.51.100.1") == successor
        assert counted(lookup) == {"lookups": 4, counter: 1}


@kinds
@nets
def test_a_binding_of_an_interface_takes_what_comes_in_by_it_and_no_more(stage: Stage, kind: int, net: str) -> None:
    """A veth pair beside loopback: the same address and port, asked from another namespace and from this one."""
    asked = net.format(1)
    stage.serve("ordinary", kind, asked, PORT)
    service = stage.serve("service", kind, net.format(2), 8008)
    subnet = "2001:db8:8::{}" if ":" in net else "203.0.113.{}"
    family, length = (socket.AF_INET6, 64) if ":" in net else (socket.AF_INET, 24)
    other = stage.stack.enter_context(contextlib.closing(Namespace()))
    with IPRoute() as here:
        here.link("add", ifname="inside", kind="veth", peer={"ifname": "outside", "net_ns_fd": other.fd})
        inside = here.link_lookup(ifname="inside")[0]
        here.addr("add", index=inside, address=subnet.format(1), prefixlen=length, flags=IFA_F_NODAD)
        here.link("set", index=inside, state="up")
    with other, IPRoute() as there:
        outside = there.link_lookup(ifname="outside")[0]
        there.addr("add", index=outside, address=subnet.format(2), prefixlen=length, flags=IFA_F_NODAD)
        there.link("set", index=outside, state="up")
        there.route("add", dst=str(ip_network(net.format(0) + f"/{length}")), gateway=subnet.format(1), family=family)
    for interface, by in ((inside, ("service", "ordinary")), (1, ("ordinary", "service"))):
        with stage.dispatching(bound(kind, asked, interface=interface), service):
            with other:
                from_outside = stage.ask(kind, asked)
            assert (from_outside, stage.ask(kind, asked)) == by
