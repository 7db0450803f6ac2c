"""Maps and programs that outlive or span objects: made alone, pinned, opened for reading, shared."""

from __future__ import annotations

from errno import EPERM
from pathlib import Path

import numpy as np
import pytest

from fastrecv.bpf import Map, Object, Program, compiled, packaged
from fastrecv.errors import BpfError

PAIR = np.dtype([("a", "u4"), ("b", "u4")])


def test_an_array_belongs_to_no_object_and_lives_as_long_as_its_pin(bpffs: Path) -> None:
    with Map.array("pairs", PAIR, 3) as made:
        made.update([0, 2], np.array([(1, 2), (3, 4)], PAIR))
        made.pin(bpffs / "pairs")
        assert (made.name, made.max_entries, made.key_dtype) == ("pairs", 3, np.dtype("u4"))
    with Map.open(bpffs / "pairs", np.uint32, PAIR, read_only=True) as again:
        assert again.lookup([0, 1, 2]).tolist() == [(1, 2), (0, 0), (3, 4)]
        with pytest.raises(BpfError) as caught:
            again.update([0], np.zeros(1, PAIR))
        assert caught.value.errno == EPERM
    with pytest.raises(ValueError, match="is closed"):
        made.lookup([0])


@pytest.mark.parametrize(("dtype", "entries"), [(PAIR, 0), (np.dtype("V0"), 1)])
def test_an_array_of_nothing_is_refused(dtype: np.dtype[np.void], entries: int) -> None:
    with pytest.raises(BpfError, match="making map nothing"):
        Map.array("nothing", dtype, entries)


def test_two_objects_share_a_map_with_its_size_and_contents() -> None:
    with packaged("lookup") as first, packaged("lookup") as second:
        first.maps["counts"].max_entries = 7
        first.load()
        row = np.zeros((1, *first.maps["counts"].value_shape), first.maps["counts"].value_dtype)
        row["misses"] = 5
        first.maps["counts"].update([6], row)
        second.maps["counts"].reuse(first.maps["counts"])
        second.load()
        assert second.maps["counts"].max_entries == 7
        assert second.maps["counts"].lookup([6])["misses"].min() == 5
        first.close()
        assert second.maps["counts"].lookup([6])["misses"].min() == 5
        assert len(second.maps["rules"]) == 1, "what is not shared is its own"


def test_maps_of_different_layout_and_those_that_exist_are_not_reused() -> None:
    with packaged("lookup") as loaded, packaged("lookup") as fresh, packaged("lookup") as closed:
        loaded.load()
        with pytest.raises(ValueError, match="map counts cannot reuse map sockets: their layouts differ"):
            fresh.maps["counts"].reuse(loaded.maps["sockets"])
        with pytest.raises(ValueError, match="map counts exists already"):
            loaded.maps["counts"].reuse(loaded.maps["counts"])
        with pytest.raises(ValueError, match="is not loaded"):
            loaded.maps["counts"].reuse(fresh.maps["counts"])
        closed.close()
        with pytest.raises(ValueError, match="is closed"):
            closed.maps["counts"].reuse(loaded.maps["counts"])


def test_a_pinned_program_is_opened_run_and_told_by_its_tag(bpffs: Path) -> None:
    with packaged("lookup") as lookup:
        lookup.load()
        lookup.programs["lookup"].pin(bpffs / "program")
        before = lookup.programs["lookup"].info
    with Program.open(bpffs / "program", read_only=True) as program:
        assert program.owner is None
        assert program.name == "lookup"
        assert (program.info.id, program.info.tag) == (before.id, before.tag)
        assert len(bytes.fromhex(before.tag)) == 8
        context = bytearray(72)  # struct bpf_sk_lookup, of a TCP packet over IPv4
        context[8], context[12] = 2, 6
        assert program.run(context=bytes(context)).verdict == 1
    with pytest.raises(ValueError, match="Program is closed"):
        program.info  # noqa: B018 - reading it is what fails
    with pytest.raises(BpfError, match="opening the pin"):
        Program.open(bpffs / "nothing")
    with pytest.raises(TypeError, match=r"opened by Program\.open"):
        Program()


def test_maps_that_are_pinned_by_name_are_shared_under_a_root(bpffs: Path) -> None:
    with Object(compiled("modulo"), "modulo", pin_root=bpffs / "a") as first:
        first.load()
        assert sorted(pin.name for pin in (bpffs / "a").iterdir()) == sorted(first.maps)
        first.maps["size"].update([0], [9])
    with Object(compiled("modulo"), "modulo", pin_root=bpffs / "a") as second:
        second.load()
        assert second.maps["size"][0] == 9
    with Object(compiled("modulo"), "modulo", pin_root=bpffs / "b") as elsewhere:
        elsewhere.load()
        assert elsewhere.maps["size"][0] == 0


def test_without_a_root_nothing_is_pinned() -> None:
    """Where libbpf would pin by itself."""
    with packaged("modulo") as first, packaged("modulo") as second:
        first.load()
        first.maps["size"].update([0], [9])
        second.load()
        assert second.maps["size"][0] == 0
        assert not any(Path("/sys/fs/bpf", name).exists() for name in first.maps)


def test_a_root_with_other_maps_or_in_no_bpf_file_system_is_refused(bpffs: Path, tmp_path: Path) -> None:
    (bpffs / "a").mkdir()
    with Map.array("size", np.uint64, 1) as other:
        other.pin(bpffs / "a" / "size")
    with (
        Object(compiled("modulo"), "modulo", pin_root=bpffs / "a") as wrong,
        pytest.raises(BpfError, match="loading BPF object modulo") as caught,
    ):
        wrong.load()
    assert "parameter mismatch" in caught.value.log
    assert [pin.name for pin in (bpffs / "a").iterdir()] == ["size"], "what was made before it failed is unpinned"
    with (
        Object(compiled("modulo"), "modulo", pin_root=tmp_path) as nowhere,
        pytest.raises(BpfError, match="loading BPF object modulo"),
    ):
        nowhere.load()


def test_a_reuseport_section_that_libbpf_does_not_know_is_one_all_the_same() -> None:
    with packaged("modulo") as selector, packaged("balance") as balancer:
        assert selector.load().programs["_selector"].info.type == 21  # BPF_PROG_TYPE_SK_REUSEPORT
        assert balancer.load().programs["balance"].info.type == 21
