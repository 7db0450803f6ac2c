"""Rule sets and programs are exchanged under a flood: every packet counted, by address and by the socket it came to."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from errno import EINTR
from ipaddress import ip_address, ip_network
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pyroute2 import IPRoute

from fastrecv import bpf, lookup_life
from fastrecv.bench.floods import FLOODS, Counter, Flood
from fastrecv.bench.lab import Lab
from fastrecv.bpf import Object
from fastrecv.errors import BpfError, StateError
from fastrecv.lookup import Dispatcher
from fastrecv.rules import Binding, Destination
from fastrecv.sockets import drops
from fastrecv.state import State
from tests.kernel.steering import Compile

SO_ATTACH_BPF = 50  # include/uapi/asm-generic/socket.h
PORT = 9
BITS = 14
ADDRESSES = 1 << BITS
FIRST = {4: "198.18.0.0", 6: "2001:db8:9::"}  # RFC 2544, RFC 3849
LABELS = ("steady", "a", "b", "c", "nobody")  # "nobody": the socket that the ordinary lookup finds
STEADY, NOBODY = 0, len(LABELS) - 1
BURST = 50_000  # frames a call into the kernel
BPF = Path(__file__).parents[2] / "bpf"

# The source counts what it sends, and the filter of a socket what comes to it, both by address. The filter drops, so
# that no queue can overflow.
PROGRAMS = """
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#define ADDRESSES 16384
const volatile __u32 first, address_at, checksum_at, partial_sum; /* of the source */
const volatile __u32 destination_at; /* of a filter: from the start of the IP header */
__u32 next;
__u64 astray;
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, ADDRESSES); __type(key, __u32); __type(value, __u64);
} counts SEC(".maps");

static __always_inline void count(__u32 index)
{
	__u64 *number = bpf_map_lookup_elem(&counts, &index);

	if (number)
		__sync_fetch_and_add(number, 1);
	else
		__sync_fetch_and_add(&astray, 1);
}

SEC("xdp") int source(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u16 *address = data + address_at, *checksum = data + checksum_at;
	__u32 index = next++ * 5077 % ADDRESSES, word = bpf_htonl(first + index), sum;

	if ((void *)(address + 2) > end || (void *)(checksum + 1) > end)
		return XDP_ABORTED;
	address[0] = word & 0xffff;
	address[1] = word >> 16;
	sum = partial_sum + address[0] + address[1];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	*checksum = ~sum;
	count(index);
	return XDP_PASS;
}

SEC("socket") int filter(struct __sk_buff *skb)
{
	__u32 word = 0;

	bpf_skb_load_bytes_relative(skb, destination_at, &word, sizeof(word), BPF_HDR_START_NET);
	count(bpf_ntohl(word) - first);
	return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
"""

Numbers = NDArray[np.int64]


def folded(data: bytes) -> int:
    total = int(np.frombuffer(data, np.uint16).sum(dtype=np.uint64))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@dataclass
class Field:
    """The lab, a socket for each label, and the source of the flood. `first`: the lowest address of the flood."""

    lab: Lab
    flood: Flood
    source: Object
    filters: list[Object]
    sockets: list[socket.socket]
    counter: Counter
    frame: bytes
    bpffs: Path

    @property
    def version(self) -> int:
        return 4 if self.flood.family == socket.AF_INET else 6

    @property
    def sent(self) -> Numbers:
        return self._counts(self.source)

    @property
    def arrived(self) -> Numbers:
        """By label and address."""
        return np.stack([self._counts(made) for made in self.filters])

    @staticmethod
    def _counts(made: Object) -> Numbers:
        assert made.get("astray") == 0
        return made.maps["counts"].lookup(np.arange(ADDRESSES)).astype(np.int64)

    def send(self, packets: int) -> None:
        """At least so many, fewer than twice as many."""
        before = int(self.source.get("next"))
        with self.lab.host:
            while (left := packets - (int(self.source.get("next")) - before)) > 0:
                try:
                    self.source.programs["source"].run_live(self.frame, self.lab.host_index, left)
                except BpfError as error:
                    if error.errno != EINTR:  # else: stopped and continued
                        raise

    @contextlib.contextmanager
    def flooding(self) -> Iterator[None]:
        """Another thread sends without a pause."""
        stop, begun = threading.Event(), threading.Event()

        def flood() -> None:
            while not stop.is_set():
                self.send(BURST)
                begun.set()

        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(flood)
            try:
                assert begun.wait(30) or sending.result()
                yield
            finally:
                stop.set()
            sending.result()

    def dispatcher(self, adopt: bool = False, read_only: bool = False) -> Dispatcher:
        return Dispatcher(bpffs=self.bpffs, adopt=adopt, read_only=read_only)

    def load(self, bindings: Sequence[Binding]) -> None:
        lookup_life.load(bpffs=self.bpffs)
        with self.dispatcher() as dispatcher:
            for label, sock in zip(LABELS[:NOBODY], self.sockets, strict=False):
                dispatcher.register(label, [sock])
            dispatcher.replace_bindings(bindings)

    def lookups(self, dispatcher: Dispatcher) -> list[int]:
        """Packets that each label took; nothing may ever be counted as anything else."""
        found = {serving.destination.label: serving.counters for serving in dispatcher.serving()}
        assert found.keys() == set(LABELS[:NOBODY])
        for counters in found.values():
            assert not any(number for name, number in counters.items() if name != "lookups")
        return [found[label]["lookups"] for label in LABELS[:NOBODY]]

    def judge(self, *expected: Numbers) -> int:
        """Every packet ended at the socket that one of these rule sets names for its address; none is missing."""
        sent, arrived = self.sent, self.arrived
        total = int(sent.sum())
        allowed = np.zeros(arrived.shape, bool)
        for labels in expected:
            allowed[labels, np.arange(ADDRESSES)] = True
        assert arrived[~allowed].sum() == 0, f"{arrived[~allowed].sum()} of {total} misdirected"
        assert (arrived.sum(axis=0) == sent).all(), f"{total - arrived.sum()} of {total} lost"
        # The same by the counters of sockets, stack and dispatcher.
        by_label = arrived.sum(axis=1).tolist()
        assert [drops(sock) for sock in self.sockets] == by_label
        assert self.counter.read() == total
        with self.dispatcher(read_only=True) as dispatcher:
            assert self.lookups(dispatcher) == by_label[:NOBODY]
        return total


@pytest.fixture(params=["udp4", "udp6"])
def field(request: pytest.FixtureRequest, compile_bpf: Compile, bpffs: Path) -> Iterator[Field]:
    flood = FLOODS[request.param]
    version, width = (4, 4) if flood.family == socket.AF_INET else (6, 16)
    first = ip_address(FIRST[version]).packed
    text = compile_bpf("flooding", PROGRAMS)
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab())
        stack.enter_context(lab.host)
        net = stack.enter_context(IPRoute())
        net.route("add", dst=f"{FIRST[version]}/{8 * width - BITS}", family=flood.family, oif=lab.host_index,
                  type="local", table=255, **({"scope": 254} if version == 4 else {}))  # fmt: skip
        counter = stack.enter_context(Counter(lab, flood.counter))
        sockets, filters = [], []
        for place in range(len(LABELS)):
            made = stack.enter_context(Object(text, "flooding"))
            made.set(first=int.from_bytes(first[-4:]), destination_at=16 if version == 4 else 36)
            filters.append(made.load())
            sock = stack.enter_context(socket.socket(flood.family, socket.SOCK_DGRAM))
            sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, made.programs["filter"].fileno())
            sock.bind(("", PORT) if place == NOBODY else (flood.destination, 7000 + place))
            sockets.append(sock)
        frame, *_ = flood.frame(lab)
        # The last word of the address is the source's to write, and of the checksum: of the IP header in IPv4, where
        # UDP needs none; of UDP in IPv6.
        address_at, checksum_at = (30, 24) if version == 4 else (50, 60)
        frame = frame[: address_at + 4 - width] + first[:-4] + bytes(4) + frame[address_at + 4 :]
        frame = frame[:checksum_at] + bytes(2) + frame[checksum_at + 2 :]
        covered = frame[14:34] if version == 4 else frame[22:62] + struct.pack("!II", 8, socket.IPPROTO_UDP)
        source = stack.enter_context(Object(text, "flooding"))
        source.set(first=int.from_bytes(first[-4:]), address_at=address_at, checksum_at=checksum_at,
                   partial_sum=folded(covered))  # fmt: skip
        yield Field(lab, flood, source.load(), filters, sockets, counter, frame, bpffs)
        with contextlib.suppress(StateError):
            lookup_life.unload(bpffs=bpffs)


def rule_set(field: Field, seed: int, labels: Sequence[int], count: int = 10_000) -> tuple[list[Binding], Numbers]:
    """Prefixes in prefixes, and the label of every address; below the first quarter all lead to STEADY."""
    draw = np.random.default_rng(seed)
    quarter = ADDRESSES // 4
    prefixes = {(0, BITS), (0, BITS - 2)}
    while len(prefixes) < count:
        size = int(draw.integers(0, BITS - 2))
        prefixes.add((int(draw.integers(ADDRESSES)) >> size << size, size))
    first, width = int(ip_address(FIRST[field.version])), 32 if field.version == 4 else 128
    named, bindings = np.full(ADDRESSES, NOBODY), []
    for start, size in sorted(prefixes, key=lambda prefix: -prefix[1]):
        label = STEADY if start < quarter and size < BITS else int(draw.choice(labels))
        named[start : start + (1 << size)] = label
        network = ip_network((first + start, width - size))
        bindings.append(Binding("udp", network, (PORT, PORT), LABELS[label]))
    return bindings, named


@pytest.mark.parametrize("seconds", [1.5, pytest.param(30, marks=pytest.mark.proof)])
def test_while_ten_thousand_bindings_are_replaced_every_packet_goes_where_the_old_or_the_new_lead(
    field: Field, seconds: float
) -> None:
    sets = [rule_set(field, 1, [1, 2]), rule_set(field, 2, [2, 3])]
    old, new = (named for _, named in sets)
    alike = int((old == new).sum())
    assert ADDRESSES // 4 < alike < 3 * ADDRESSES // 4
    field.load(sets[0][0])
    swaps, during, deadline = 0, 0, time.monotonic() + seconds
    with field.flooding():
        while swaps < 4 or time.monotonic() < deadline:
            before = int(field.source.get("next"))
            with field.dispatcher() as dispatcher:
                change = dispatcher.replace_bindings(sets[(swaps + 1) % 2][0])
            assert min(len(change.added), len(change.removed)) > 1000
            swaps += 1
            during += int(field.source.get("next")) - before
    assert during > 0
    field.judge(old, new)
    seen = field.arrived > 0
    both = int((seen.sum(axis=0) == 2).sum())
    assert both > 0, "no address has met both rule sets: nothing was shown"
    before_last = field.arrived
    field.send(BURST)  # where nothing changes any more, there is one socket only
    last = field.arrived - before_last
    assert (last.argmax(axis=0) == sets[swaps % 2][1]).all()
    assert ((last > 0).sum(axis=0) == 1).all()
    total = field.judge(old, new)
    print(f"\n{field.flood.name}: {swaps} swaps of 10,000 bindings, {total:,} packets sent ({during:,} during a swap), "
          f"{int(field.arrived.sum()):,} received, 0 misdirected; {both:,} of {ADDRESSES:,} addresses met both rule "
          f"sets, {alike:,} lead to one label in both")  # fmt: skip


@pytest.mark.parametrize("seconds", [1, pytest.param(30, marks=pytest.mark.proof)])
def test_while_the_program_is_upgraded_no_packet_is_lost_and_all_else_stays(field: Field, seconds: float) -> None:
    bindings, named = rule_set(field, 3, [1, 2, 3])
    field.load(bindings)
    names = [Destination(label, field.flood.family, socket.IPPROTO_UDP) for label in LABELS[:NOBODY]]
    with field.dispatcher(read_only=True) as dispatcher:
        cookies = [dispatcher.sockets_of(name) for name in names]
        before, programs = field.lookups(dispatcher), {dispatcher.program.info.id}
    upgrades, deadline = 0, time.monotonic() + seconds
    with field.flooding():
        while upgrades < 4 or time.monotonic() < deadline:
            with field.dispatcher(adopt=True) as dispatcher:
                dispatcher.upgrade()
                upgrades += 1
                programs.add(dispatcher.program.info.id)
                assert dispatcher.bindings == bindings
                assert [dispatcher.sockets_of(name) for name in names] == cookies
                now = field.lookups(dispatcher)
                assert all(new >= old for old, new in zip(before, now, strict=True))
                before = now
    total = field.judge(named)
    assert len(programs) == upgrades + 1
    print(f"\n{field.flood.name}: {upgrades} upgrades, {total:,} packets sent and received, 0 misdirected")


def inlined(compile_bpf: Compile, name: str, *changes: tuple[str, str]) -> bytes:
    """The dispatcher's program with its text changed."""
    text = (BPF / "lookup.bpf.c").read_text().replace('#include "lookup.h"', (BPF / "lookup.h").read_text())
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return compile_bpf(name, text)


def become(monkeypatch: pytest.MonkeyPatch, program: bytes, version: str) -> None:
    """Be a fastrecv of another version, with another program."""
    packaged = bpf.compiled
    monkeypatch.setattr(bpf, "compiled", lambda name: program if name == "lookup" else packaged(name))
    for module in ("generations", "lookup"):
        monkeypatch.setattr(f"fastrecv.{module}.version", lambda _: version)


def test_another_versions_program_is_refused_until_it_is_upgraded_and_no_packet_is_lost(
    field: Field, compile_bpf: Compile
) -> None:
    bindings, named = rule_set(field, 4, [1, 2, 3], 1000)
    other = inlined(
        compile_bpf, "lookup_other",
        ("struct counters {", "__u64 seen;\nstruct {\n\t__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);\n"
         "\t__uint(max_entries, 1);\n\t__type(key, __u32);\n\t__type(value, __u64);\n} also SEC(\".maps\");\n"
         "struct counters {"),
        ("\tcount->lookups += live;", "\tindex = 0;\n\thigh = (__u64)bpf_map_lookup_elem(&also, &index);\n"
         "\tif (high)\n\t\t++*(__u64 *)high;\n\tseen++;\n\tcount->lookups += live;"),
    )  # fmt: skip
    field.load(bindings)
    with field.dispatcher() as dispatcher:
        first = dispatcher.state
    with field.flooding():
        with pytest.MonkeyPatch.context() as monkeypatch:
            become(monkeypatch, other, "9.9")
            second = refused_and_upgraded(field, bindings, first)
            assert (second.version, second.tag != first.tag) == ("9.9", True)
        third = refused_and_upgraded(field, bindings, second)
    assert (third.version, third.tag, third.program) == (first.version, first.tag, first.program)
    field.judge(named)


def refused_and_upgraded(field: Field, bindings: list[Binding], before: State) -> State:
    for adopt in (False, True):
        with field.dispatcher(read_only=True, adopt=adopt) as reading:
            assert reading.bindings == bindings
            assert reading.program.info.tag == before.tag
            assert reading.state == before
            assert sum(field.lookups(reading)) > 0
    with pytest.raises(StateError, match=f"loaded by fastrecv {before.version}.* `fastrecv lookup upgrade`"):
        field.dispatcher()
    with field.dispatcher(adopt=True) as dispatcher:
        dispatcher.upgrade()
    with field.dispatcher() as dispatcher:
        assert dispatcher.bindings == bindings
        assert dispatcher.program.info.tag == dispatcher.state.tag
        assert dispatcher.link is not None
        assert dispatcher.link.program_id == dispatcher.program.info.id
        assert dispatcher.state.program != before.program
        assert dispatcher.state.loaded == before.loaded
        return dispatcher.state


@pytest.mark.parametrize("field", ["udp4"], indirect=True)
@pytest.mark.parametrize("adopt", [False, True])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_program_whose_counters_are_of_another_size_is_refused_and_nothing_changes(
    field: Field, compile_bpf: Compile, adopt: bool, read_only: bool
) -> None:
    bindings, named = rule_set(field, 5, [1, 2, 3], 100)
    wider = inlined(compile_bpf, "lookup_wider", ("\t__u64 other;\n", "\t__u64 other, more;\n"))
    field.load(bindings)
    with field.dispatcher() as dispatcher:
        before = dispatcher.state, dispatcher.program.info.id
    pinned = sorted((root := field.bpffs / "fastrecv").rglob("*"))
    with field.flooding(), pytest.MonkeyPatch.context() as monkeypatch:
        become(monkeypatch, wider, "9.9")
        with pytest.raises(StateError, match=r"counts is of another layout .*`fastrecv lookup unload`, then load"):
            field.dispatcher(adopt, read_only)
    assert sorted(root.rglob("*")) == pinned
    with field.dispatcher() as dispatcher:
        assert (dispatcher.state, dispatcher.program.info.id) == before
    field.judge(named)
