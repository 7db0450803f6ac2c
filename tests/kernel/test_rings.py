"""Reading BPF ring buffers, and attaching to tracepoints what may be."""

from __future__ import annotations

import select
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastrecv.bpf import Map, Object, Ring
from fastrecv.errors import BpfError
from tests.kernel.steering import Compile

RINGS = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
struct record { __u64 number; __u16 square; };
const struct record *const volatile layout;
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 1 << 22); } ring SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 1); __type(key, __u32); __type(value, __u32);
} hash SEC(".maps");
__u64 told;
SEC("xdp") int tell(struct xdp_md *ctx)
{
	struct record record = { .number = told, .square = told * told };

	return bpf_ringbuf_output(&ring, &record, sizeof(record), 0) ? 1 : told++ + 10;
}
SEC("xdp") int tell_little(struct xdp_md *ctx)
{
	__u32 little = 7;

	return bpf_ringbuf_output(&ring, &little, sizeof(little), 0);
}
char LICENSE[] SEC("license") = "Dual MIT/GPL";
"""


@pytest.fixture
def rings(compile_bpf: Compile) -> Iterator[Object]:
    with Object(compile_bpf("rings", RINGS), "rings") as opened:
        yield opened.load()


def told(rings: Object, count: int) -> None:
    rings.programs["tell"].run(bytes(64), repeat=count)


def test_a_ring_gives_all_records_at_hand_in_order(rings: Object) -> None:
    record = rings.dtype("record")
    with Ring(rings.maps["ring"]) as ring:
        assert ring.read(record).shape == (0,)
        assert select.select([ring], [], [], 0)[0] == []
        for first, count in ((0, 1), (1, 1000)):
            told(rings, count)
            assert select.select([ring], [], [], 0)[0] == [ring]
            rows = ring.read(record)
            assert rows.dtype == record
            assert rows["number"].tolist() == list(range(first, first + count))
            assert (rows["square"] == rows["number"].astype(np.uint16) ** 2).all()
        assert len(ring.read(record)) == 0


def test_one_read_is_bounded_and_a_full_ring_keeps_the_oldest(rings: Object) -> None:
    record = rings.dtype("record")
    told(rings, 300_000)
    fit = int(rings.get("told"))
    assert fit == (1 << 22) // 24  # 8 bytes of header and 16 of record
    with Ring(rings.maps["ring"]) as ring:
        lengths, numbers = [], []
        while len(rows := ring.read(record)):
            lengths.append(len(rows))
            numbers.append(rows["number"])
    assert lengths == [65536, 65536, fit - 2 * 65536]
    assert (np.concatenate(numbers) == np.arange(fit)).all()


def test_a_pinned_ring_is_read_by_whoever_opens_it(rings: Object, bpffs: Path) -> None:
    rings.maps["ring"].pin(bpffs / "ring")
    told(rings, 3)
    with Map.open(bpffs / "ring") as pinned, Ring(pinned) as ring:
        assert ring.read(rings.dtype("record"))["number"].tolist() == [0, 1, 2]
    with Map.open(bpffs / "ring") as pinned:
        ring = Ring(pinned)
    with ring:  # it stands on its own
        told(rings, 1)
        assert ring.read(rings.dtype("record"))["number"].tolist() == [3]


def test_what_is_no_ring_or_no_record_is_refused(rings: Object) -> None:
    with pytest.raises(BpfError, match="opening map hash as a ring buffer: Invalid argument"):
        Ring(rings.maps["hash"])
    with Ring(rings.maps["ring"]) as ring:
        for bad in (object, "V0", [("a", object)], (np.uint32, (2,))):
            with pytest.raises(ValueError, match="is no layout of a record"):
                ring.read(bad)
        rings.programs["tell_little"].run(bytes(64))
        told(rings, 1)
        with pytest.raises(ValueError, match="ring buffer ring holds a record of 4 bytes, the dtype has 16"):
            ring.read(rings.dtype("record"))
        assert ring.read(rings.dtype("record"))["number"].tolist() == [0]
    for use in (ring.fileno, ring.__enter__, lambda: ring.read(np.uint32)):
        with pytest.raises(ValueError, match="Ring is closed"):
            use()
    ring.close()


def test_a_forgotten_ring_warns(rings: Object) -> None:
    with pytest.warns(ResourceWarning, match="unclosed Ring of map ring"):
        Ring(rings.maps["ring"])


def test_only_tracing_programs_attach_to_tracepoints(rings: Object) -> None:
    with pytest.raises(BpfError, match="attaching program tell to its tracepoint: Invalid argument"):
        rings.programs["tell"].attach_tracing()
