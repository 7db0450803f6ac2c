"""Dispatcher on real traffic: which sockets it takes, whom they serve, and what becomes of its state."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from fastrecv import lookup_life, pins, state
from fastrecv.bpf import Link, Object
from fastrecv.errors import SocketRefusedError, StateError
from fastrecv.listeners import of_process
from fastrecv.lookup import Dispatcher
from fastrecv.netns import Namespace
from fastrecv.rules import MAX_ALTERNATIVES, Binding, RuleSetError
from fastrecv.steerable import cookie_of
from tests.kernel.steering import PORT, REFUSED, SO_ATTACH_REUSEPORT_EBPF, TCP, UDP, Compile, Stage, bound, kinds, nets

SLOTS = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
const volatile __u32 slot;
struct { __uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY); __uint(max_entries, 8);
	__type(key, __u32); __type(value, __u64);
} slots SEC(".maps");
SEC("sk_reuseport") int choose(struct sk_reuseport_md *md)
{
	__u32 place = slot;

	return bpf_sk_select_reuseport(md, &slots, &place, 0) ? SK_DROP : SK_PASS;
}
char LICENSE[] SEC("license") = "Dual MIT/GPL";
"""
Opened = Callable[..., Dispatcher]


@pytest.fixture
def opened(stage: Stage, bpffs: Path) -> Iterator[Opened]:
    """Opens the dispatcher that is loaded in the stage's namespace."""
    lookup_life.load(bpffs=bpffs)

    def call(**options: Any) -> Dispatcher:
        return Dispatcher(bpffs=bpffs, **options)

    yield call
    with contextlib.suppress(StateError):
        lookup_life.unload(bpffs=bpffs)


def counters(dispatcher: Dispatcher) -> list[dict[str, int]]:
    """Of every destination those that are not 0."""
    return [{name: count for name, count in found.counters.items() if count} for found in dispatcher.serving()]


@kinds
@nets
def test_bindings_sockets_and_counters_outlive_who_made_them(stage: Stage, opened: Opened, kind: int, net: str) -> None:
    server = stage.serve("service", kind, net.format(2), 9000)
    with opened() as dispatcher:
        assert dispatcher.bind(bound(kind, net.format(1))).added == [bound(kind, net.format(1))]
        dispatcher.register("service", [server])
    assert stage.ask(kind, net.format(1)) == "service"
    with opened(read_only=True) as dispatcher:
        (found,) = dispatcher.serving()
        assert (found.bindings, found.sockets) == (1, [cookie_of(server)])
        assert counters(dispatcher) == [{"lookups": 1}]
        with pytest.raises(StateError, match="opened read-only"):
            dispatcher.unregister("service")
    with opened() as dispatcher:
        dispatcher.unregister("service")
    assert stage.ask(kind, net.format(1)) == REFUSED
    with opened(read_only=True) as dispatcher:
        assert counters(dispatcher) == [{"lookups": 2, "misses": 1}]


@kinds
def test_every_member_of_a_group_may_die_but_one(stage: Stage, opened: Opened, kind: int) -> None:
    group = [stage.serve(f"member{i}", kind, "198.51.100.2", 9000, reuseport=True) for i in range(6)]
    with opened() as dispatcher:
        dispatcher.bind(bound(kind, "198.51.100.1"))
        dispatcher.register("service", group)
        assert dispatcher.serving()[0].sockets == [cookie_of(member) for member in group[:4]]
    assert len({stage.ask(kind, "198.51.100.1") for _ in range(40)}) > 1, "the group balances by itself"
    for gone, left in zip([0, 2, 1], [5, 4, 3], strict=True):  # in no order
        stage.servers.pop(f"member{gone}").close()
        answers = {stage.ask(kind, "198.51.100.1") for _ in range(20)}
        assert answers <= set(stage.servers)
        assert len(stage.servers) == left
    stage.servers.pop("member3").close()  # the last that was kept: members 4 and 5 were beyond the four
    assert stage.ask(kind, "198.51.100.1") == REFUSED


@kinds
def test_a_balanced_group_is_entered_through_its_anchor(
    stage: Stage, opened: Opened, kind: int, compile_bpf: Compile
) -> None:
    with Object(compile_bpf("slots", SLOTS), "slots") as balancing:
        balancing.set(slot=1)
        balancing.load()
        workers = [stage.serve(f"worker{i}", kind, "198.51.100.2", 9000, reuseport=True) for i in range(3)]
        balancing.maps["slots"].update([0, 1, 2], [worker.fileno() for worker in workers])
        workers[0].setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, balancing.programs["choose"].fileno())
        with opened() as dispatcher:
            dispatcher.bind(bound(kind, "198.51.100.1"))
            with pytest.raises(SocketRefusedError, match=r"a REUSEPORT_SOCKARRAY holds the socket.*Register an anchor"):
                dispatcher.register("service", workers)
            assert dispatcher.serving()[0].sockets == []
            anchor = stage.serve("anchor", kind, "198.51.100.2", 9000, reuseport=True)
            dispatcher.register("service", [*workers, anchor])
            assert dispatcher.serving()[0].sockets == [cookie_of(anchor)]
        assert {stage.ask(kind, "198.51.100.1") for _ in range(20)} == {"worker1"}


@kinds
def test_a_dual_stack_socket_serves_both_families_unless_ipv4_has_its_own(
    stage: Stage, opened: Opened, kind: int
) -> None:
    both = stage.serve("both", kind, "::", 9000)
    asked = ("198.51.100.1", "2001:db8:7::1")
    with opened() as dispatcher:
        dispatcher.bind(*(bound(kind, host) for host in asked))
        assert len(dispatcher.register("service", [both])) == 2
        assert [stage.ask(kind, host) for host in asked] == ["both", "both"]
        own = stage.serve("own", kind, "198.51.100.2", 9002)
        dispatcher.register("service", [both, own])
        assert [stage.ask(kind, host) for host in asked] == ["own", "both"]
        only6 = stage.serve("only6", kind, "2001:db8:7::2", 9001, only6=True)
        assert len(dispatcher.register("service", [only6])) == 1
        assert [stage.ask(kind, host) for host in asked] == ["own", "only6"]


def test_adding_keeps_what_is_registered_and_stops_at_four(stage: Stage, opened: Opened) -> None:
    group = [stage.serve(f"member{i}", UDP, "198.51.100.2", 9000, reuseport=True) for i in range(5)]
    with opened() as dispatcher:
        for member in group[:4]:
            dispatcher.register("service", [member], add=True)
            dispatcher.register("service", [member], add=True)  # is there already
        assert dispatcher.serving()[0].sockets == [cookie_of(member) for member in group[:4]]
        with pytest.raises(SocketRefusedError, match="4 sockets are registered there already"):
            dispatcher.register("service", [group[4]], add=True)
        dispatcher.register("service", [group[4]])
        assert dispatcher.serving()[0].sockets == [cookie_of(group[4])]


def unbound(stage: Stage) -> socket.socket:
    return stage.stack.enter_context(socket.socket(socket.AF_INET, UDP))


def silent(stage: Stage) -> socket.socket:
    return stage.bind(TCP, "198.51.100.2", 9000)


def connected(stage: Stage) -> socket.socket:
    return stage.pair(UDP, "198.51.100.2")[0]


def established(stage: Stage) -> socket.socket:
    return stage.pair(TCP, "198.51.100.2")[1]


def local(stage: Stage) -> socket.socket:
    return stage.stack.enter_context(socket.socket(socket.AF_UNIX, UDP))


def multipath(stage: Stage) -> socket.socket:
    listener = stage.stack.enter_context(socket.socket(socket.AF_INET, TCP, 262))  # IPPROTO_MPTCP
    listener.bind(("198.51.100.2", 9000))
    listener.listen()
    return listener


def abroad(stage: Stage) -> socket.socket:
    with contextlib.closing(Namespace()) as other, other:
        made = stage.stack.enter_context(socket.socket(socket.AF_INET, UDP))
        made.bind(("127.0.0.1", 9000))
    return made


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (unbound, "udp 0.0.0.0 port 0 is not bound: register it after bind()"),
        (silent, "tcp 198.51.100.2 port 9000 does not listen: register it after listen()"),
        (connected, r"udp 198.51.100.2 port \d+ is connected"),
        (established, "tcp 198.51.100.2 port 7007 is connected"),
        (local, "a socket of family AF_UNIX: packets are steered to IPv4 and IPv6 sockets only"),
        (multipath, "is an MPTCP listener, which takes no program and no place in a BPF map: open it as plain TCP"),
        (abroad, "udp 127.0.0.1 port 9000 lives in another network namespace: see --netns"),
    ],
)  # fmt: skip
def test_a_socket_that_cannot_serve_is_refused_with_the_reason(
    stage: Stage, opened: Opened, made: Callable[[Stage], socket.socket], reason: str
) -> None:
    refused = made(stage)
    good = stage.serve("good", UDP, "198.51.100.2", 9001)
    with opened() as dispatcher:
        dispatcher.register("service", [good])
        with pytest.raises(SocketRefusedError, match=reason.replace("()", r"\(\)")):
            dispatcher.register("service", [refused])
        assert dispatcher.serving()[0].sockets == [cookie_of(good)], "what was there stays"


def test_sockets_that_are_not_one_group_are_refused_together(stage: Stage, opened: Opened) -> None:
    first, second = (stage.serve(str(port), UDP, "198.51.100.2", port) for port in (9000, 9001))
    with (
        opened() as dispatcher,
        pytest.raises(SocketRefusedError, match=r"both udp .* 9000 and udp .* 9001 would serve"),
    ):
        dispatcher.register("service", [first, second])
    with (
        pytest.raises(SocketRefusedError, match="is this very process"),
        of_process(os.getpid(), socket.IPPROTO_UDP, ip_network("198.51.100.2").network_address, 9000),
    ):
        pass


def test_what_cannot_be_compiled_leaves_everything_as_it_is(stage: Stage, opened: Opened) -> None:
    server = stage.serve("service", UDP, "198.51.100.2", 9000)
    net = ip_network("198.51.100.0/24")
    many = [Binding("udp", net, (80, 80), "x", interface=number) for number in range(1, MAX_ALTERNATIVES + 2)]
    with opened() as dispatcher:
        dispatcher.bind(bound(UDP, "198.51.100.1"))
        dispatcher.register("service", [server])
        for wrong, reason in (
            (many, "32 can be told apart"),
            ([bound(UDP, "198.51.100.1", "two words")], "printable and without spaces"),
            ([bound(UDP, "198.51.100.1", f"label{number}") for number in range(2)], "is bound twice"),
        ):
            with pytest.raises(RuleSetError, match=reason):
                dispatcher.replace_bindings(wrong)
            assert dispatcher.bindings == [bound(UDP, "198.51.100.1")]
            assert stage.ask(UDP, "198.51.100.1") == "service"
    with opened() as dispatcher:
        assert dispatcher.bindings == [bound(UDP, "198.51.100.1")]


def test_a_number_that_is_given_out_again_begins_at_nothing(
    stage: Stage, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_REST", 0.0)
    with opened() as dispatcher:
        dispatcher.bind(bound(UDP, "198.51.100.1", "old"))
        assert stage.ask(UDP, "198.51.100.1") == REFUSED
        (number,) = dispatcher.state.numbers.values()
        dispatcher.unbind(bound(UDP, "198.51.100.1", "old"))
        dispatcher.bind(bound(UDP, "198.51.100.1", "new"))
        assert list(dispatcher.state.numbers.values()) == [number]
        assert counters(dispatcher) == [{}]


def test_the_state_of_a_namespace_that_has_ended_is_recognised_and_removed(stage: Stage, bpffs: Path) -> None:
    lookup_life.load(bpffs=bpffs)
    gone = contextlib.closing(Namespace())
    with gone as ended, ended:
        lookup_life.load(bpffs=bpffs)
        with Dispatcher(bpffs=bpffs) as dispatcher:
            dispatcher.bind(bound(UDP, "198.51.100.1"))
            dead = bpffs / "fastrecv" / f"lookup-{dispatcher.cookie}"
        assert lookup_life.remnants(bpffs) == []
    _wait_until(lambda: lookup_life.remnants(bpffs) == [dead])
    with contextlib.closing(Namespace()) as remade, remade:
        assert lookup_life.load(bpffs=bpffs) == [dead]
        assert not dead.exists()
        with Dispatcher(bpffs=bpffs) as dispatcher:
            assert dispatcher.bindings == []
        lookup_life.unload(bpffs=bpffs)
    assert lookup_life.remnants(bpffs) == []
    with Dispatcher(bpffs=bpffs, read_only=True) as dispatcher:
        assert dispatcher.link is not None
    lookup_life.unload(bpffs=bpffs)


def _wait_until(true: Callable[[], bool]) -> None:
    """A namespace ends some time after its last user."""
    for _ in range(2000):
        if true():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it did not come about within ten seconds")


def test_a_writer_that_waits_in_vain_names_the_holder_and_readers_share(opened: Opened) -> None:
    holder = rf"is locked by process {os.getpid()} \(.*\): wait for it to end"
    with opened(read_only=True), opened(read_only=True, timeout=0), pytest.raises(StateError, match=holder):
        opened(timeout=0.05)
    with opened(), pytest.raises(StateError, match=f"is locked by process {os.getpid()} "):
        opened(read_only=True, timeout=0.05)


def test_the_65th_program_of_a_namespace_is_refused_and_leaves_nothing(stage: Stage, bpffs: Path) -> None:
    with contextlib.ExitStack() as stack:
        attached = stack.enter_context(stage.opened()).programs["scripted"]
        for _ in range(64):
            stack.enter_context(attached.attach_netns(stage.namespace.fd))
        with pytest.raises(StateError, match="has 64 sk_lookup programs attached, the most there can be"):
            lookup_life.load(bpffs=bpffs)
    assert list((bpffs / "fastrecv").iterdir()) == []


def test_a_program_that_somebody_detached_or_replaced_is_noticed(stage: Stage, opened: Opened, bpffs: Path) -> None:
    with opened() as dispatcher:
        dispatcher.bind(bound(UDP, "198.51.100.1"))
        pin = bpffs / "fastrecv" / f"lookup-{dispatcher.cookie}" / "link"
    with stage.opened() as other, Link.open(pin) as link:
        link.update(other.programs["scripted"])
    for read_only in (True, False):
        with pytest.raises(StateError, match=r"somebody has replaced it\. `fastrecv lookup upgrade` puts"):
            opened(read_only=read_only)
    with opened(adopt=True) as dispatcher:
        dispatcher.upgrade()
    with opened() as dispatcher:
        assert dispatcher.bindings == [bound(UDP, "198.51.100.1")]
    with Link.open(pin) as link:
        link.detach()
    with pytest.raises(StateError, match="was detached by other means: `fastrecv lookup unload`"):
        opened()
    lookup_life.unload(bpffs=bpffs)


def test_what_is_no_state_of_ours_is_refused(bpffs: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=f"{tmp_path} is no BPF file system: mount -t bpf bpf {tmp_path}"):
        Dispatcher(bpffs=tmp_path)
    with pytest.raises(StateError, match="does not exist"):
        Dispatcher(bpffs=tmp_path / "nowhere")
    (bpffs / "fastrecv").mkdir()
    os.chown(bpffs / "fastrecv", 65534, -1)
    with pytest.raises(StateError, match="belongs to uid 65534, or others may write there, who could keep"):
        pins.checked_root(bpffs)
    (bpffs / "fastrecv").rmdir()


def test_a_source_prefix_and_a_range_of_ports_decide_on_real_packets(stage: Stage, opened: Opened) -> None:
    servers = {name: stage.serve(name, UDP, "198.51.100.2", 9000 + i) for i, name in enumerate(("all", "some", "near"))}
    net = ip_network("198.51.100.0/24")
    with opened() as dispatcher:
        dispatcher.bind(
            Binding("any", net, (0, 65535), "all"),
            Binding("udp", net, (7000, 7999), "some"),
            Binding("udp", net, (7000, 7999), "near", source=ip_network("198.51.100.64/26")),
            Binding("udp", net, (PORT, PORT), None, source=ip_network("198.51.100.128/25")),
        )
        for name, server in servers.items():
            dispatcher.register(name, [server])
    for source, port, expected in (
        ("198.51.100.1", 53, "all"), ("198.51.100.1", PORT, "some"), ("198.51.100.65", PORT, "near"),
        ("198.51.100.65", 8000, "all"), ("198.51.100.129", PORT, REFUSED), ("198.51.100.129", 7008, "some"),
    ):  # fmt: skip
        assert stage.ask(UDP, "198.51.100.9", port, (source, 0)) == expected
