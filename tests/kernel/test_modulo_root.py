"""What Modulo keeps under a pin root: who agrees on it, who is refused, and what of it outlives those that die."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from fastrecv import modulo
from fastrecv.bpf import Map, Object, compiled
from fastrecv.errors import StateError
from fastrecv.modulo import Modulo, write_object
from tests.kernel.privileges import CAP_BPF, as_user, only
from tests.kernel.senders import join, serve
from tests.kernel.steering import UDP, Stage

NAMES = ["nonce", "size", "tcp_balancing_targets", "udp_balancing_targets"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(bpffs: Path) -> Path:
    return bpffs / "reuseport"


def test_those_that_share_a_root_agree_or_are_refused_with_both_numbers(root: Path) -> None:
    with Modulo(root, size=4, nonce=7) as first:
        for options in ({}, {"size": 4}, {"nonce": 7}):
            with Modulo(root, **options) as again:
                assert (again.size, again.nonce) == (4, 7)
        with pytest.raises(StateError, match=rf"^.*size is 4 there, 8 here: all that share {root} must agree: give 4"):
            Modulo(root, size=8)
        with pytest.raises(StateError, match="nonce is 7 there, 9 here"):
            Modulo(root, nonce=9)
        assert (first.size, first.nonce) == (4, 7)
    with Modulo(root) as later:
        assert (later.size, later.nonce) == (4, 7), "the pins outlive their makers"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"size": 0}, "size 0: give 1 to 128"),
        ({"size": 129}, "size 129: give 1 to 128"),
        ({"nonce": 0}, r"nonce 0: give 1 to 4294967295; 0 is none"),
        ({"nonce": 1 << 32}, "nonce 4294967296: give 1 to"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(root: Path, options: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Modulo(root, **options)
    assert not root.exists()


def test_a_root_that_is_no_place_for_maps_is_refused(bpffs: Path, root: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"is in no BPF file system: give a directory of one, as /sys/fs/bpf/pmacct"):
        Modulo(tmp_path / "pmacct")
    with pytest.raises(StateError, match=r"no/where does not exist"):
        Modulo(bpffs / "no" / "where" / "maps")
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(StateError, match="others may write there"):
        Modulo(root)
    root.chmod(0o755)
    (bpffs / "link").symlink_to(root)
    with pytest.raises(StateError, match="link is not a directory of yours to change"):
        Modulo(bpffs / "link")
    assert [*root.iterdir()] == [*tmp_path.iterdir()] == []


def test_maps_of_another_layout_are_refused_and_left(root: Path) -> None:
    root.mkdir(0o755)
    with Map.array("size", np.uint64, 2) as other:
        other.pin(root / "size")
    with pytest.raises(StateError, match=r"size has another layout: type 2, 4 and 8 bytes, 2 entries there, type 2, 4"):
        Modulo(root)
    assert [entry.name for entry in root.iterdir()] == ["size"]


def as_nobody(root: Path) -> str:
    """What opening a root comes to in a process of another user."""
    read, write = os.pipe()

    def open_it() -> int:
        try:
            Modulo(root).close()
        except OSError as error:
            os.write(write, str(error).encode())
        return 0

    with os.fdopen(read, "rb") as pipe:
        try:
            child = as_user(65534, 65534, open_it)
        finally:
            os.close(write)
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


def test_it_takes_cap_bpf_and_a_root_of_ones_own(bpffs: Path, root: Path, stage: Stage) -> None:
    bpffs.chmod(0o777)
    assert "run as root, or with CAP_BPF" in as_nobody(bpffs / "mine")
    assert not (bpffs / "mine").exists(), "nothing is left where nothing was"
    members = serve(stage, UDP, "127.0.0.1", 1)
    with only(CAP_BPF), Modulo(root, size=1) as shared:
        with only():
            join(shared, members)
        shared.unregister(0, "udp")
    for mode in (0o755, 0o700):
        root.chmod(mode)
        assert "reuseport is not a directory of yours to change: " in as_nobody(root)


def test_a_root_is_destroyed_only_when_no_slot_is_taken(stage: Stage, root: Path) -> None:
    with Modulo(root) as shared:
        members = serve(stage, UDP, "127.0.0.1", 1)
        shared.register(3, members[0])
        with pytest.raises(StateError, match="is in use, slots udp 3: unregister or close their sockets"):
            shared.destroy()
        assert sorted(entry.name for entry in root.iterdir()) == NAMES
        shared.unregister(3, "udp")
        (root / "mine").mkdir()
        shared.destroy()
        assert [entry.name for entry in root.iterdir()] == ["mine"]
        (root / "mine").rmdir()
        Modulo(root).close()
        shared.destroy()
        assert not root.exists()
        with pytest.raises(StateError, match="does not exist"):
            shared.destroy()
        with Modulo(root) as anew:
            anew.register(3, members[0])
            with pytest.raises(StateError, match="is in use, slots udp 3"):
                shared.destroy()  # its own maps, which are nobody's any more, are empty
            assert sorted(entry.name for entry in root.iterdir()) == NAMES


def test_the_object_is_written_whole_and_over_nothing(tmp_path: Path, root: Path) -> None:
    target = tmp_path / "selector.o"
    write_object(target)
    with Object(target.read_bytes(), "peer", pin_root=root) as peer:
        assert sorted(peer.maps) == NAMES
        assert [*peer.programs] == ["_selector"]
    with pytest.raises(StateError, match=r"selector\.o exists already: remove it, or give another name"):
        write_object(target)
    assert target.read_bytes() == compiled("modulo")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_object(tmp_path / "nowhere" / "selector.o")


# Several at once, and those that die


def opening() -> None:
    """Open the root that each line of the standard input names, with what else it says; and tell what came of it."""
    for line in sys.stdin:
        path, *options = line.split()
        try:
            with Modulo(path, **{name: int(number) for name, number in (word.split("=") for word in options)}) as made:
                print(made.size, made.nonce, flush=True)
        except StateError as error:
            print(error, flush=True)


@contextmanager
def openers() -> Iterator[list[subprocess.Popen[str]]]:
    code = "from tests.kernel.test_modulo_root import opening; opening()"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.communicate()


def both(processes: list[subprocess.Popen[str]], *lines: str) -> list[str]:
    for process, line in zip(processes, lines, strict=True):
        assert process.stdin is not None
        process.stdin.write(f"{line}\n")
    return [process.stdout.readline().strip() for process in processes if process.stdout is not None]


def test_two_first_starts_at_once_agree_or_one_is_refused_with_both_numbers(bpffs: Path) -> None:
    with openers() as processes:
        both(processes, f"{bpffs}/warm", f"{bpffs}/warm")
        for number in range(20):
            said = both(processes, *[f"{bpffs}/free{number}"] * 2)
            assert said[0] == said[1]
            assert re.fullmatch(r"128 [1-9]\d*", said[0])
            said = both(processes, *[f"{bpffs}/sized{number} size={size}" for size in (4, 8)])
            (complaint,) = (each for each in said if "there" in each)
            (made,) = (each for each in said if "there" not in each)
            size = int(made.split()[0])
            assert f"size is {size} there, {12 - size} here" in complaint


def _dying(left: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that kills this process before the nth line of modulo.py, wherever that is."""

    def line(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal left
        left -= event == "line"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return line

    return lambda frame, _event, _argument: line if frame.f_code.co_filename == modulo.__file__ else None


@pytest.mark.parametrize("doing", ["open", "destroy"])
def test_whoever_is_killed_half_way_leaves_what_the_next_can_use(bpffs: Path, doing: str) -> None:
    for number in count(1):
        root = bpffs / f"{doing}{number}"
        child = os.fork()
        if child == 0:
            try:
                if doing == "open":
                    sys.settrace(_dying(number))
                    Modulo(root, size=6)
                else:
                    made = Modulo(root, size=6)
                    sys.settrace(_dying(number))
                    made.destroy()
            finally:
                os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with Modulo(root, size=6) as next_one:
            assert next_one.size == 6
            assert next_one.nonce
            assert sorted(entry.name for entry in root.iterdir()) == NAMES
            next_one.destroy()
        assert not root.exists()
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert number > 20


def test_maps_of_which_some_are_missing_are_completed(root: Path) -> None:
    with Modulo(root, size=6, nonce=5):
        (root / "udp_balancing_targets").unlink()
        (root / "nonce").unlink()
    with Modulo(root) as again:
        assert again.size == 6
        assert again.nonce not in (0, 5)
        assert sorted(entry.name for entry in root.iterdir()) == NAMES
