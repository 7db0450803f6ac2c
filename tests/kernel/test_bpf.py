"""The door to libbpf, on the real kernel."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from errno import E2BIG, EEXIST, ENODEV, ENOENT, ENOSPC
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrecv import bpf
from fastrecv.bpf import Map, Object
from fastrecv.errors import BpfError
from fastrecv.netns import Namespace

MAPS = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
struct key { __u32 number; __be16 port; __u16 rest; };
struct value { __s64 balance; __u8 name[6]; __u16 flags; };
struct odd { __u8 bytes[3]; };
#define MAP(NAME, TYPE, KEY, VALUE, ENTRIES) struct { __uint(type, TYPE); __uint(max_entries, ENTRIES); \\
  __type(key, KEY); __type(value, VALUE); } NAME SEC(".maps")
MAP(table, BPF_MAP_TYPE_HASH, struct key, struct value, 100000);
MAP(array, BPF_MAP_TYPE_ARRAY, __u32, __u64, 1000);
MAP(per_cpu, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct odd, 4);
MAP(small, BPF_MAP_TYPE_HASH, __u32, __u32, 2);
struct { __uint(type, BPF_MAP_TYPE_LPM_TRIE); __uint(map_flags, BPF_F_NO_PREALLOC); __uint(max_entries, 100000);
  __type(key, __u64); __type(value, __u32); } trie SEC(".maps");
struct padded { __u8 kind; __u32 number; };
MAP(padded, BPF_MAP_TYPE_HASH, struct padded, struct padded, 1000);
struct bits { __u32 a:24, b:8; };
MAP(odd_key, BPF_MAP_TYPE_HASH, struct bits, __u32[4], 10);
MAP(sockets, BPF_MAP_TYPE_SOCKMAP, __u32, __u64, 8);
MAP(devices, BPF_MAP_TYPE_DEVMAP, __u32, __u32, 8);
__u32 several[3];
struct { __uint(type, BPF_MAP_TYPE_QUEUE); __uint(max_entries, 4); __uint(value_size, 4); } queue SEC(".maps");
SEC("xdp") int keep(struct xdp_md *ctx) { return bpf_map_lookup_elem(&table, &(struct key){}) ? 1 : several[1]; }
char LICENSE[] SEC("license") = "Dual MIT/GPL";
"""

BROKEN = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
SEC("xdp") int broken(struct xdp_md *ctx) { return *(int *)(long)ctx->data; }
char LICENSE[] SEC("license") = "Dual MIT/GPL";
"""


@pytest.fixture(scope="module")
def compiled(compile_bpf: Callable[[str, str], bytes]) -> bytes:
    return compile_bpf("maps", MAPS)


@pytest.fixture
def maps(compiled: bytes) -> Iterator[Object]:
    with Object(compiled, "maps") as opened:
        yield opened.load()


def test_dtypes_are_those_of_the_c_structs(maps: Object) -> None:
    table = maps.maps["table"]
    assert table.key_dtype == np.dtype([("number", "<u4"), ("port", ">u2"), ("rest", "<u2")])
    assert table.value_dtype == np.dtype([("balance", "<i8"), ("name", "u1", (6,)), ("flags", "<u2")])
    assert maps.maps["per_cpu"].value_dtype.itemsize == 8  # the kernel pads each CPU's value to 8 bytes
    assert maps.maps["queue"].key_dtype.itemsize == 0


def test_the_dtype_of_a_struct_is_found_by_its_name(maps: Object) -> None:
    assert maps.dtype("value") == maps.maps["table"].value_dtype
    for name in ("nothing", "bits"):  # a bit field is no numpy type
        with pytest.raises(KeyError, match=f"maps describes no struct {name} that numpy could hold"):
            maps.dtype(name)
    maps.close()
    with pytest.raises(ValueError, match="BPF object maps is closed"):
        maps.dtype("value")


def test_only_iterators_iterate(maps: Object) -> None:
    with pytest.raises(BpfError, match="attaching program keep to its iterator: Invalid argument"):
        maps.programs["keep"].iterate()


@pytest.mark.parametrize("name", ["table", "trie"])
def test_100_000_entries_go_in_come_out_and_go_away_in_one_call_each(maps: Object, name: str) -> None:
    table = maps.maps[name]
    n = 100_000
    keys = np.zeros(n, table.key_dtype)
    values = np.zeros(n, table.value_dtype)
    if name == "table":
        keys["number"], keys["port"] = np.arange(n), np.arange(n) % 65536
        values["balance"], values["flags"] = -np.arange(n), 7
    else:
        keys[:] = np.arange(n, dtype=np.uint64) << 32 | 32  # 32 bits of prefix: prefixlen first, then the address
        values[:] = np.arange(n)
    table.update(keys, values)
    assert (table.lookup(keys) == values).all()

    found_keys, found_values = table.items()
    assert len(found_keys) == n == len(table)
    order, expected = np.argsort(found_keys), np.argsort(keys)
    assert (found_keys[order] == keys[expected]).all()
    assert (found_values[order] == values[expected]).all()

    table.delete(keys)
    assert len(table) == 0


def test_a_map_without_batches_is_served_one_by_one(maps: Object) -> None:
    devices = maps.maps["devices"]
    devices.update([5, 3, 0], [1, 1, 1])  # lo
    assert devices.lookup([3, 5]).tolist() == [1, 1]
    keys, values = devices.items()
    assert (keys.tolist(), values.tolist()) == ([0, 3, 5], [1, 1, 1])
    devices.delete([0, 5])
    assert devices.items()[0].tolist() == [3]
    with pytest.raises(BpfError, match="entry 1 of 2"):
        devices.update([1, 2], [1, 1 << 30])


def test_an_empty_sockmap_has_no_items(maps: Object) -> None:
    sockets = maps.maps["sockets"]
    assert len(sockets) == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sockets.update([3], [sock.fileno()])
        assert sockets.items()[0].tolist() == [3]


def test_padding_never_counts(maps: Object) -> None:
    """The kernel hashes padding: whatever lies in it in Python must not get there, and must survive items()."""
    padded = maps.maps["padded"]
    assert padded.key_dtype.itemsize == 8
    dirty = np.full(8 * 100, 0xFF, np.uint8).view(padded.key_dtype)
    dirty["kind"], dirty["number"] = 7, np.arange(100)
    padded.update(dirty, dirty)
    assert padded[(7, 42)]["number"] == 42
    padded.update([(7, 42)], [(1, 1)])
    assert len(padded) == 100
    keys, values = padded.items()
    assert keys.dtype == padded.key_dtype
    assert values.dtype == padded.value_dtype
    padded.delete(keys[::2])
    padded.delete(keys[1::2])
    assert len(padded) == 0


def test_what_numpy_cannot_say_is_opaque_and_an_array_is_a_field(maps: Object) -> None:
    odd = maps.maps["odd_key"]
    assert odd.key_dtype == np.dtype("V4")
    assert odd.value_dtype == np.dtype([("value", "<u4", (4,))])
    key = np.array([b"\x01\x02\x03\x04"], "V4")
    values = np.zeros(1, odd.value_dtype)
    values["value"] = [[1, 2, 3, 4]]
    odd.update(key, values)
    assert odd.lookup(key)["value"].tolist() == [[1, 2, 3, 4]]
    maps.set(several=[7, 8, 9])
    assert maps.get("several").tolist() == [7, 8, 9]
    assert maps.programs["keep"].run(bytes(64)).verdict == 8


def test_keys_of_another_layout_are_refused(maps: Object) -> None:
    with pytest.raises(ValueError, match="keys of map padded must be of"):
        maps.maps["padded"].update(np.zeros(3), np.zeros(3, maps.maps["padded"].value_dtype))


def test_integers_that_do_not_fit_are_refused(maps: Object) -> None:
    small = maps.maps["small"]
    with pytest.raises(OverflowError):
        small.update(np.array([2**32 + 5]), np.array([1]))
    with pytest.raises(OverflowError):
        small.update([1], [-1])
    assert len(small) == 0


def test_per_cpu_values_have_a_row_a_cpu(maps: Object) -> None:
    per_cpu = maps.maps["per_cpu"]
    cpus = per_cpu.value_shape[0]
    values = np.zeros((4, cpus), per_cpu.value_dtype)
    values["bytes"] = np.arange(4 * cpus * 3).reshape(4, cpus, 3)
    per_cpu.update([3, 2, 1, 0], values)
    assert (per_cpu.lookup([3, 2, 1, 0])["bytes"] == values["bytes"]).all()
    assert (per_cpu.items()[1]["bytes"] == values["bytes"][::-1]).all()
    with pytest.raises(ValueError, match="must have shape"):
        per_cpu.update([0], values[0, :1])


def test_single_entries_and_what_is_missing(maps: Object) -> None:
    small = maps.maps["small"]
    small.update(7, 70)
    assert small[7] == 70
    with pytest.raises(KeyError):
        small[8]
    with pytest.raises(KeyError):
        small.delete([7, 8])
    assert len(small) == 0
    small.update([], [])
    with pytest.raises(ValueError, match="2 keys but 1 values"):
        small.update([1, 2], [1])
    with pytest.raises(BpfError, match="entry 2 of 3") as caught:
        small.update([1, 2, 3], [1, 2, 3])
    assert caught.value.errno in (ENOSPC, E2BIG)
    assert sorted(small.items()[0]) == [1, 2]


def test_flags_of_an_update_are_the_kernels(maps: Object) -> None:
    small = maps.maps["small"]
    with pytest.raises(BpfError) as caught:
        small.update(1, 1, flags=2)  # BPF_EXIST
    assert caught.value.errno == ENOENT
    small.update([1, 2], [10, 20], flags=1)  # BPF_NOEXIST
    with pytest.raises(BpfError, match="entry 0 of 2") as caught:
        small.update([1, 2], [11, 21], flags=1)
    assert caught.value.errno == EEXIST
    assert small.lookup([1, 2]).tolist() == [10, 20]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["update", "delete"]), st.dictionaries(
    st.integers(0, 30), st.integers(0, 2**63 - 1), min_size=1, max_size=40)), max_size=8))  # fmt: skip
def test_a_hash_map_behaves_like_a_dict(maps: Object, steps: list[tuple[str, dict[int, int]]]) -> None:
    table = maps.maps["table"]
    if len(table):
        table.delete(table.items()[0])
    model: dict[int, int] = {}
    for step, entries in steps:
        keys = np.zeros(len(entries), table.key_dtype)
        keys["number"] = list(entries)
        if step == "update":
            values = np.zeros(len(entries), table.value_dtype)
            values["balance"] = list(entries.values())
            table.update(keys, values)
            model |= entries
        elif set(entries) <= set(model):
            table.delete(keys)
            model = {key: value for key, value in model.items() if key not in entries}
        else:
            with pytest.raises(KeyError):
                table.delete(keys)
            for key in entries:  # those before the missing one are gone
                if key not in model:
                    break
                del model[key]
    found = table.items()
    assert dict(zip(found[0]["number"].tolist(), found[1]["balance"].tolist(), strict=True)) == model


def test_a_map_is_sized_before_the_load_only(compiled: bytes) -> None:
    with Object(compiled, "maps") as opened:
        opened.maps["array"].max_entries = 5
        opened.load()
        assert len(opened.maps["array"]) == 5
        with pytest.raises(ValueError, match="its size is fixed"):
            opened.maps["array"].max_entries = 6


def test_variables_are_constant_or_shared_with_the_kernel() -> None:
    with bpf.packaged("flood") as flood:
        flood.set(sources=3, port_offset=14, checksum_offset=16, first_port=1000)
        flood.load()
        assert flood.get("sources") == 3
        with pytest.raises(ValueError, match="constant"):
            flood.set(sources=4)
        with pytest.raises(KeyError, match="no variable"):
            flood.set(nonsense=1)
        with pytest.raises(OverflowError):
            flood.set(verdict=1 << 32)
        with pytest.raises(ValueError, match="takes one value"):
            flood.set(verdict=[1, 2])
        flood.set(verdict=2)
        assert flood.programs["flood"].run(bytes(64)).verdict == 2  # the kernel reads what was written here
        assert flood.get("frames") == 1  # and the other way round


def test_a_test_run_gives_the_packet_back() -> None:
    with bpf.packaged("flood") as flood:
        flood.set(sources=2, port_offset=14, checksum_offset=16, first_port=0x1234)
        program = flood.load().programs["flood"]
        seen = [program.run(bytes(64), room=64).data[14:16] for _ in range(3)]
        assert seen == [b"\x12\x34", b"\x12\x35", b"\x12\x34"]
        with pytest.raises(BpfError) as caught:
            program.run(bytes(64), room=10)
        assert caught.value.errno == ENOSPC


def test_the_verifiers_words_are_in_the_exception(compile_bpf: Callable[[str, str], bytes]) -> None:
    with Object(compile_bpf("broken", BROKEN), "broken") as broken:
        with pytest.raises(BpfError, match="loading BPF object broken") as caught:
            broken.load()
        assert "invalid access to packet" in caught.value.log
        with pytest.raises(ValueError, match="not loaded"):
            broken.programs["broken"].fileno()


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(BpfError, match="opening BPF object rubbish"):
        Object(b"\x7fELF rubbish", "rubbish")


def test_links_attach_update_detach_and_are_found() -> None:
    namespace = Namespace()
    with bpf.packaged("decoy") as decoy, bpf.packaged("assign") as assign:
        first, second = decoy.load().programs["decoy"], assign.load().programs["assign"]
        with first.attach_netns(namespace.fd) as link:
            info = link.info
            assert bpf.sk_lookup_links()[info.id] == info
            assert info.netns_inode == namespace.inode
            assert info.program_id == first.info.id
            found = bpf.program_info(info.program_id)
            assert found is not None
            assert found.name == "decoy"
            link.update(second)
            assert link.info.program_id == second.info.id
            link.detach()
            assert link.info.netns_inode == 0
        assert info.id not in bpf.link_ids()
        assert bpf.link_info(info.id) is None
    namespace.close()


def test_pins_outlive_their_descriptor(maps: Object, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "bpf", "bpf", str(tmp_path)], check=True)
    namespace = Namespace()
    try:
        maps.maps["small"].update(1, 10)
        maps.maps["small"].pin(tmp_path / "small")
        with Map.open(tmp_path / "small", np.uint32, np.uint32) as again:
            assert again[1] == 10
        with pytest.raises(ValueError, match="dtype"):
            Map.open(tmp_path / "small", np.uint64, np.uint32)
        with bpf.packaged("decoy") as decoy:
            with decoy.load().programs["decoy"].attach_netns(namespace.fd) as link:
                link.pin(tmp_path / "link")
                number = link.info.id
            with bpf.Link.open(tmp_path / "link") as link:
                assert link.info.id == number
        (tmp_path / "link").unlink()
        with pytest.raises(BpfError, match="opening the pin") as caught:
            bpf.Link.open(tmp_path / "link")
        assert caught.value.errno == ENOENT
    finally:
        namespace.close()
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_statistics_count_runs() -> None:
    with bpf.packaged("flood") as flood:
        flood.set(sources=1, port_offset=14, checksum_offset=16)
        program = flood.load().programs["flood"]
        with bpf.Statistics():
            program.run(bytes(64), repeat=1000)
        assert program.info.run_count == 1000
        program.run(bytes(64), repeat=1000)
        assert program.info.run_count == 1000


def test_what_cannot_be_run_is_refused() -> None:
    with bpf.packaged("swallow") as swallow:
        program = swallow.load().programs["swallow"]
        for run in (lambda: program.run(bytes(64), repeat=0), lambda: program.run_live(bytes(64), 1, -1),
                    lambda: program.run_live(b"", 1, 1)):  # fmt: skip
            with pytest.raises(ValueError, match=r"repeat must be|cannot be sent"):
                run()
        with pytest.raises(BpfError, match="test run"):
            program.run(bytes(13))  # shorter than an Ethernet header
    for kind in (bpf.Program, bpf.Map, bpf.Link):
        with pytest.raises(TypeError, match=r"found in|come from"):
            kind()
    with pytest.raises(TypeError):
        bpf.Statistics(2)  # type: ignore[call-arg] # must not close descriptor 2 when it goes


def test_a_map_without_keys_says_so(maps: Object) -> None:
    with pytest.raises(ValueError, match="has no keys"):
        maps.maps["queue"].update([1], [1])


def test_live_frames_need_a_device() -> None:
    with bpf.packaged("swallow") as swallow, pytest.raises(BpfError, match="live run") as caught:
        swallow.load().programs["swallow"].run_live(bytes(64), 1 << 30, 1)
    assert caught.value.errno == ENODEV


def test_what_is_closed_stays_closed(compiled: bytes) -> None:
    opened = Object(compiled, "maps").load()
    table, program = opened.maps["table"], opened.programs["keep"]
    opened.close()
    opened.close()
    for use in (table.items, program.fileno, opened.load, opened.__enter__):
        with pytest.raises(ValueError, match="closed"):
            use()


@pytest.mark.parametrize("what", ["BPF object", "Statistics"])
def test_what_is_forgotten_warns(compiled: bytes, what: str) -> None:
    def forget() -> None:
        Object(compiled, "maps").load() if what == "BPF object" else bpf.Statistics()
        gc.collect()

    with pytest.warns(ResourceWarning, match=f"unclosed {what}"):
        forget()


def test_without_privileges_the_error_says_what_to_do() -> None:
    program = (
        "import os; from fastrecv import bpf; decoy = bpf.packaged('decoy'); os.setgid(65534); os.setuid(65534)\n"
        "try: decoy.load()\n"
        "except OSError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "run as root, or with CAP_BPF and CAP_NET_ADMIN" in done.stdout


def test_a_sockmap_takes_sockets_by_descriptor() -> None:
    with bpf.packaged("assign") as assign, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        assign.load().maps["sockets"].update([0], [sock.fileno()])
        with pytest.raises(BpfError, match="updating map sockets"):
            assign.maps["sockets"].update([0], [99999])
