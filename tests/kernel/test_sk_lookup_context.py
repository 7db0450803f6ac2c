"""The sk_lookup hook from a program's side: what it may assign and read, what several decide together, and their links.

The servers, clients and programs are those of test_sk_lookup.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from errno import E2BIG, EAFNOSUPPORT, EEXIST, EINVAL, ENOLINK, EPROTOTYPE, ESOCKTNOSUPPORT
from ipaddress import ip_address

import numpy as np
import pytest
from pyroute2 import IPRoute

from fastrecv.bpf import SK_LOOKUP, Object
from fastrecv.errors import BpfError
from fastrecv.netns import Namespace
from tests.kernel.steering import (
    NOBODY,
    PORT,
    REFUSED,
    REPLACE,
    SK_DROP,
    SK_PASS,
    TCP,
    UDP,
    A,
    B,
    Compile,
    Stage,
    bound,
    counted,
    kinds,
    nets,
)

RTMGRP_LINK, RTM_DELLINK = 1, 17  # include/uapi/linux/rtnetlink.h
LINKS = 64  # netns_bpf_max_progs() of kernel/bpf/net_namespace.c
PORTS = {"nobody": 0, "a": 8001, "b": 8002}


def stand(stage: Stage, kind: int, net: str) -> tuple[str, list[socket.socket]]:
    """The address that clients ask, where "ordinary" listens, and the servers a and b elsewhere."""
    stage.serve("ordinary", kind, net.format(1), PORT)
    return net.format(1), [stage.serve(name, kind, net.format(2), PORTS[name]) for name in "ab"]


# Places and flags of what is assigned, the results, whom ctx->sk is after each, and who answers.
STEPS = {
    "none": ([], [], [], "ordinary"),
    "second": ([(A, 0), (B, 0)], [0, -EEXIST], ["a", "a"], "a"),
    "same": ([(A, 0), (A, 0)], [0, -EEXIST], ["a", "a"], "a"),
    "replace": ([(A, 0), (B, REPLACE)], [0, 0], ["a", "b"], "b"),
    "replace-nothing": ([(B, REPLACE)], [0], ["b"], "b"),
    "null": ([(NOBODY, 0), (A, 0)], [0, 0], ["nobody", "a"], "a"),
    "null-second": ([(A, 0), (NOBODY, 0)], [0, -EEXIST], ["a", "a"], "a"),
    "null-replaces": ([(A, 0), (NOBODY, REPLACE)], [0, 0], ["a", "nobody"], "ordinary"),
    "null-makes-room": ([(A, 0), (NOBODY, REPLACE), (B, 0)], [0, 0, 0], ["a", "nobody", "b"], "b"),
    "unknown-flag": ([(A, 4), (B, 0)], [-EINVAL, 0], ["nobody", "b"], "b"),
}


@kinds
@nets
@pytest.mark.parametrize(("steps", "results", "after", "by"), STEPS.values(), ids=STEPS)
def test_assignments_select_are_refused_replace_and_clear_and_the_context_shows_it(
    stage: Stage, kind: int, net: str, steps: list[tuple[int, int]], results: list[int], after: list[str], by: str
) -> None:
    asked, servers = stand(stage, kind, net)
    with stage.scripted(servers, steps) as made:
        assert stage.ask(kind, asked) == by
        assert made.get("runs") == 1
        assert made.get("results").tolist()[: len(steps)] == results
        assert made.get("selected").tolist()[: len(steps) + 1] == [0, *(PORTS[name] for name in after)]


@kinds
@nets
@pytest.mark.parametrize("end", [0, 1], ids=["client", "served"])
def test_a_connected_socket_is_refused_as_a_target(stage: Stage, kind: int, net: str, end: int) -> None:
    connected = stage.pair(kind, net.format(1))[end]
    with stage.scripted([connected], [(A, 0)]) as made:
        assert stage.ask(kind, net.format(1)) == "ordinary"
        assert (made.get("results")[0], made.get("selected")[1]) == (-ESOCKTNOSUPPORT, 0)
    with stage.dispatching(bound(kind, net.format(1)), connected) as lookup:
        assert stage.ask(kind, net.format(1)) == REFUSED
        assert counted(lookup) == {"lookups": 1, "unfit": 1}


MISFITS = {
    "ipv4-socket": ("2001:db8:7::1", "198.51.100.2", False, -EAFNOSUPPORT, "family"),
    "ipv6-only-socket": ("198.51.100.1", "2001:db8:7::2", False, -EAFNOSUPPORT, "family"),
    "other-protocol-ipv4": ("198.51.100.1", "198.51.100.2", True, -EPROTOTYPE, "other"),
    "other-protocol-ipv6": ("2001:db8:7::1", "2001:db8:7::2", True, -EPROTOTYPE, "other"),
}


@kinds
@pytest.mark.parametrize(("asked", "home", "crossed", "result", "reason"), MISFITS.values(), ids=MISFITS)
def test_a_socket_of_another_family_or_protocol_is_refused_and_counted(
    stage: Stage, kind: int, asked: str, home: str, crossed: bool, result: int, reason: str
) -> None:
    stage.serve("ordinary", kind, asked, PORT)
    misfit = stage.serve("misfit", TCP + UDP - kind if crossed else kind, home, PORT, only6=":" in home)
    with stage.scripted([misfit], [(A, 0)]) as made:
        assert stage.ask(kind, asked) == "ordinary"
        assert (made.get("results")[0], made.get("selected")[1]) == (result, 0)
    with stage.dispatching(bound(kind, asked), misfit) as lookup:
        assert stage.ask(kind, asked) == REFUSED
        assert counted(lookup) == {"lookups": 1, reason: 1}


@kinds
@pytest.mark.parametrize(("flag", "by", "result"), [(0, "a", -EEXIST), (REPLACE, "b", 0)], ids=["", "replace"])
def test_the_dispatcher_lets_an_earlier_program_have_its_way_and_is_overruled_only_by_one_that_says_so(
    stage: Stage, kind: int, flag: int, by: str, result: int
) -> None:
    a, b = (stage.serve(name, kind, "198.51.100.2", port) for name, port in (("a", 1), ("b", 2)))
    binding = bound(kind, "198.51.100.1")
    with stage.scripted([b], [(A, 0)]), stage.dispatching(binding, a) as lookup:
        assert stage.ask(kind, "198.51.100.1") == "b"
        assert counted(lookup) == {"lookups": 1, "taken": 1}
    with stage.dispatching(binding, a) as lookup, stage.scripted([b], [(A, flag)]) as made:
        assert stage.ask(kind, "198.51.100.1") == by
        assert made.get("results")[0] == result
        assert counted(lookup) == {"lookups": 1}


Script = tuple[list[tuple[int, int]], int]
PASSES: Script = ([], SK_PASS)
DROPS: Script = ([], SK_DROP)
TO_A: Script = ([(A, 0)], SK_PASS)
TO_B: Script = ([(B, 0)], SK_PASS)
INSTEAD_B: Script = ([(B, REPLACE)], SK_PASS)
NOBODY_INSTEAD: Script = ([(NOBODY, REPLACE)], SK_PASS)
TO_B_BUT_DROPS: Script = ([(B, REPLACE)], SK_DROP)
CHAINS: dict[str, tuple[list[Script], str]] = {
    "pass+pass": ([PASSES, PASSES], "ordinary"),
    "pass+drop": ([PASSES, DROPS], REFUSED),
    "drop+pass": ([DROPS, PASSES], REFUSED),
    "drop+drop": ([DROPS, DROPS], REFUSED),
    "pass+redirect": ([PASSES, TO_B], "b"),
    "redirect+pass": ([TO_A, PASSES], "a"),
    "drop+redirect": ([DROPS, TO_B], "b"),
    "redirect+drop": ([TO_A, DROPS], "a"),
    "redirect+redirect": ([TO_A, TO_B], "a"),
    "redirect+replace": ([TO_A, INSTEAD_B], "b"),
    "redirect+replace-with-nobody": ([TO_A, NOBODY_INSTEAD], "a"),
    "redirect+replace-but-drop": ([TO_A, TO_B_BUT_DROPS], "a"),
    "select-but-drop": ([TO_B_BUT_DROPS], REFUSED),
    "three": ([DROPS, TO_A, INSTEAD_B], "b"),
}


@kinds
@nets
@pytest.mark.parametrize(("scripts", "by"), CHAINS.values(), ids=CHAINS)
def test_all_programs_run_a_selected_socket_outweighs_a_drop_and_a_drop_a_pass(
    stage: Stage, kind: int, net: str, scripts: list[Script], by: str
) -> None:
    asked, servers = stand(stage, kind, net)
    made = [stage.stack.enter_context(stage.scripted(servers, steps, verdict)) for steps, verdict in scripts]
    assert stage.ask(kind, asked) == by
    assert [program.get("runs") for program in made] == [1] * len(made)
    if by in PORTS:  # who comes after a program that has selected sees whom
        assert made[-1].get("selected")[0] == (PORTS["a"] if TO_A in scripts[:-1] else 0)


# struct bpf_sk_lookup of include/uapi/linux/bpf.h from `family` to the end of `ingress_ifindex`
BEGIN, END = 8, 68
# Linux 6.18 answers a 2-byte load of the upper half of family, protocol or local_port with the lower half, where 0 is
# due: these three halves are not compared.
REPEATED = [(offset + 2 - BEGIN) // 2 for offset in (8, 12, 60)]
NARROW = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#define AT(TYPE, OFFSET) (*(volatile TYPE *)((char *)ctx + OFFSET))
{images}
SEC("sk_lookup") int reads(struct bpf_sk_lookup *ctx)
{{
{body}
	return SK_PASS;
}}
char LICENSE[] SEC("license") = "Dual MIT/GPL";
"""
TYPES = {1: "__u8", 2: "__u16", 4: "__u32", 8: "__u64"}


@pytest.fixture(scope="module")
def narrow(compile_bpf: Compile) -> bytes:
    """Every byte of the context, read in loads of 1, 2 and 4 bytes."""
    images = "\n".join(f"{TYPES[size]} image{size}[{(END - BEGIN) // size}];" for size in (1, 2, 4))
    loads = [(size, offset) for size in (1, 2, 4) for offset in range(BEGIN, END, size)]
    body = "\n".join(f"\timage{size}[{(at - BEGIN) // size}] = AT({TYPES[size]}, {at});" for size, at in loads)
    return compile_bpf("narrow", NARROW.format(images=images, body=body))


@kinds
@nets
def test_every_byte_of_the_context_reads_the_same_in_wide_and_narrow_loads(
    stage: Stage, narrow: bytes, kind: int, net: str
) -> None:
    asked, sender, sender_port = net.format(129 if "." in net else "8001:203:c0de:1"), net.format(77), 0xFACE
    stage.serve("ordinary", kind, asked, PORT)
    with Object(narrow, "narrow") as made:
        with made.load().programs["reads"].attach_netns(stage.namespace.fd):
            assert stage.ask(kind, asked, source=(sender, sender_port)) == "ordinary"
        there, here = ip_address(sender).packed, ip_address(asked).packed
        four, six = (4, 0) if "." in net else (0, 16)  # the fields of the other family are 0
        family = socket.AF_INET if "." in net else socket.AF_INET6
        protocol = socket.IPPROTO_TCP if kind == TCP else socket.IPPROTO_UDP
        expected = struct.pack(
            "=II4s16s2s2x4s16sII", family, protocol, there[:four], there[:six], struct.pack("!H", sender_port),
            here[:four], here[:six], PORT, socket.if_nametoindex("lo"),
        )  # fmt: skip
        assert made.get("image1").tobytes() == made.get("image4").tobytes() == expected
        halves = np.frombuffer(expected, np.uint16)
        told = np.delete(np.arange(len(halves)), REPEATED)
        assert made.get("image2")[told].tolist() == halves[told].tolist()


FORBIDDEN = {
    "wide": "return AT(__u64, 8) & 1;",
    "crosswise": "return AT(__u16, 9) & 1;",
    "half-a-pointer": "return AT(__u32, 0) & 1;",
    "past-the-end": "return AT(__u32, 72) & 1;",
    "before-the-start": "return AT(__u32, -4) & 1;",
    "store": "AT(__u32, 60) = 1;",
    "store-of-the-socket": "AT(__u64, 0) = 0;",
}


@pytest.mark.parametrize("body", FORBIDDEN.values(), ids=FORBIDDEN)
def test_loads_that_do_not_fit_a_field_and_stores_are_refused(compile_bpf: Compile, body: str) -> None:
    with Object(compile_bpf("forbidden", NARROW.format(images="", body="\t" + body)), "forbidden") as made:
        with pytest.raises(BpfError) as caught:
            made.load()
        assert any(words in caught.value.log for words in ("invalid bpf_context access", "misaligned context access",
                                                           "dereference of modified ctx"))  # fmt: skip


def program_ids(namespace: Namespace) -> list[int]:
    """What bpf(BPF_PROG_QUERY) says is attached, in the order in which it runs."""
    attach_flags, ids, count = ctypes.c_uint32(9), (ctypes.c_uint32 * LINKS)(), ctypes.c_uint32(LINKS)
    query = ctypes.CDLL("libbpf.so.1").bpf_prog_query
    assert query(namespace.fd, SK_LOOKUP, 0, ctypes.byref(attach_flags), ids, ctypes.byref(count)) == 0
    assert attach_flags.value == 0
    return list(ids[: count.value])


@pytest.mark.parametrize("close", [True, False], ids=["close", "detach"])
def test_attached_programs_are_listed_in_order_and_gone_once_detached_or_closed(stage: Stage, close: bool) -> None:
    made = [stage.stack.enter_context(stage.opened()).programs["scripted"] for _ in range(3)]
    ids = [program.info.id for program in made]
    links = [stage.stack.enter_context(program.attach_netns(stage.namespace.fd)) for program in made]
    assert program_ids(stage.namespace) == ids
    for link, program in zip(links, made, strict=True):
        assert (link.info.program_id, link.info.netns_inode) == (program.info.id, stage.namespace.inode)
    for place in (1, 1, 0):
        link = links.pop(place)
        del ids[place]
        if close:
            link.close()
        else:
            link.detach()
            link.detach()  # a second time is no error
            assert link.info.netns_inode == 0
        assert program_ids(stage.namespace) == ids
    with contextlib.closing(Namespace()) as other:
        assert program_ids(other) == []


@kinds
@nets
def test_an_update_of_the_link_puts_another_program_in_place(stage: Stage, kind: int, net: str) -> None:
    asked, servers = stand(stage, kind, net)
    to_a, to_b, drops = (
        stage.stack.enter_context(stage.opened(servers, steps, verdict=verdict)) for steps, verdict in
        (TO_A, TO_B, DROPS)
    )  # fmt: skip
    with to_a.programs["scripted"].attach_netns(stage.namespace.fd) as link:
        for made, by in ((to_a, "a"), (to_b, "b"), (drops, REFUSED), (to_a, "a")):
            link.update(made.programs["scripted"])
            assert program_ids(stage.namespace) == [made.programs["scripted"].info.id]
            assert stage.ask(kind, asked) == by
        with pytest.raises(BpfError) as caught:
            link.update(to_b.programs["chooses"])  # of another type
        assert caught.value.errno == EINVAL
        assert stage.ask(kind, asked) == "a"
    assert stage.ask(kind, asked) == "ordinary"


def test_64_programs_run_and_the_65th_is_one_too_many(stage: Stage) -> None:
    asked, servers = stand(stage, UDP, "198.51.100.{}")
    counting = stage.stack.enter_context(stage.opened())
    counts = counting.programs["scripted"]
    last = stage.stack.enter_context(stage.opened(servers, [(B, 0)])).programs["scripted"]
    links = [
        stage.stack.enter_context(program.attach_netns(stage.namespace.fd))
        for program in [*[counts] * (LINKS - 1), last]
    ]
    assert stage.ask(UDP, asked) == "b"
    assert counting.get("runs") == LINKS - 1
    for _ in range(2):
        with pytest.raises(BpfError) as caught:
            counts.attach_netns(stage.namespace.fd)
        assert caught.value.errno == E2BIG
        links.pop().close()
        assert stage.ask(UDP, asked) == "ordinary"
        links.append(stage.stack.enter_context(last.attach_netns(stage.namespace.fd)))
        assert stage.ask(UDP, asked) == "b"


def died(stage: Stage, namespace: Namespace) -> None:
    """Close a namespace and wait for its end: a device of ours goes with its peer there, after all BPF links."""
    with IPRoute() as net:
        net.link("add", ifname="witness", kind="veth", peer={"ifname": "peer", "net_ns_fd": namespace.fd})
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as events:
        events.bind((0, RTMGRP_LINK))
        events.settimeout(5)
        namespace.close()
        while struct.unpack_from("=IH", events.recv(1 << 16))[1] != RTM_DELLINK:
            pass


@pytest.mark.parametrize("dies", [True, False], ids=["namespace-died", "detached"])
def test_a_link_that_has_lost_its_namespace_says_so_and_takes_no_update(stage: Stage, dies: bool) -> None:
    with contextlib.closing(Namespace()) as namespace, stage.opened() as made:
        program = made.programs["scripted"]
        with program.attach_netns(namespace.fd) as link:
            assert link.info.netns_inode == namespace.inode
            link.update(program)
            died(stage, namespace) if dies else link.detach()
            assert (link.info.netns_inode, link.info.program_id) == (0, program.info.id)
            with pytest.raises(BpfError) as caught:
                link.update(program)
            assert caught.value.errno == ENOLINK
            link.detach()
