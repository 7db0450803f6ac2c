"""What lies in a BPF file system that others may reach, too: whose directories are trusted, their modes, and locks."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from fastrecv import lookup_life, pins, state
from fastrecv.bpf import Link
from fastrecv.errors import StateError
from fastrecv.lookup import Dispatcher, directory_of
from tests.kernel.steering import UDP, Stage, bound

STRANGER, GROUP = 65534, 65532
PR_SET_NAME = 15  # include/uapi/linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def contents(directory: Path) -> dict[str, tuple[int, int]]:
    """All that is in a directory, as what is nowhere made twice: inodes and modes."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(directory))] = (status.st_ino, status.st_mode)
    return found


# Strangers


def linked(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to("elsewhere")


def owned_by_a_stranger(path: Path) -> None:
    path.mkdir(0o755)
    os.chown(path, STRANGER, STRANGER)


def writable_for_its_group(path: Path) -> None:
    path.mkdir()
    path.chmod(0o775)


def writable_for_all(path: Path) -> None:
    path.mkdir()
    path.chmod(0o1757)


MADE = pytest.mark.parametrize("made", [linked, owned_by_a_stranger, writable_for_its_group, writable_for_all])


def refuse(bpffs: Path, said: str) -> None:
    for use in (
        lambda: lookup_life.load(bpffs=bpffs, timeout=0),
        lambda: lookup_life.unload(bpffs=bpffs, timeout=0),
        lambda: Dispatcher(bpffs=bpffs, read_only=True, timeout=0).close(),
        lambda: Dispatcher(bpffs=bpffs, timeout=0).close(),
    ):
        before = contents(bpffs)
        with pytest.raises(OSError, match=said):
            use()
        assert contents(bpffs) == before


@MADE
def test_a_directory_that_others_could_replace_is_neither_loaded_into_nor_read(
    stage: Stage, bpffs: Path, made: Callable[[Path], None]
) -> None:
    made(bpffs / "fastrecv")
    refuse(bpffs, r"/fastrecv belongs to uid \d+, or others may write there, who could keep everybody out: remove it")
    with pytest.raises(StateError, match="who could keep everybody out"):
        lookup_life.remnants(bpffs)


@MADE
def test_a_state_that_others_have_made_beforehand_is_neither_loaded_into_nor_read(
    stage: Stage, bpffs: Path, made: Callable[[Path], None]
) -> None:
    (bpffs / "fastrecv").mkdir(0o755)
    made(directory_of(bpffs / "fastrecv", stage.namespace.cookie))
    refuse(bpffs, "Not a directory|symbolic links" if made is linked else "who could keep everybody out: remove it")


def test_a_state_that_a_stranger_has_made_and_locked_keeps_nobody_waiting(stage: Stage, bpffs: Path) -> None:
    (bpffs / "fastrecv").mkdir(0o755)
    owned_by_a_stranger(directory := directory_of(bpffs / "fastrecv", stage.namespace.cookie))
    held = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StateError, match="who could keep everybody out"):
            lookup_life.load(bpffs=bpffs)
    finally:
        os.close(held)


# Modes


@contextlib.contextmanager
def umask(bits: int) -> Iterator[None]:
    before = os.umask(bits)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("bits", [0o077, 0o022, 0])
def test_modes_are_what_they_should_be_whatever_the_umask(stage: Stage, bpffs: Path, bits: int) -> None:
    for group, expected in ((None, 0o750), (GROUP, 0o2750)):
        with umask(bits):
            lookup_life.load(bpffs=bpffs, group=group)
            with Dispatcher(bpffs=bpffs) as dispatcher:
                dispatcher.bind(bound(UDP, "198.51.100.1"))
                directory = directory_of(bpffs / "fastrecv", dispatcher.cookie)
        assert mode(bpffs / "fastrecv") == 0o755
        generation = (directory / "current").resolve()
        assert (mode(directory), mode(generation)) == (expected, expected)
        for pinned in ("sockets", "counts", "current/program", "current/document"):
            assert mode(directory / pinned) == 0o640
            if group is not None:
                assert (directory / pinned).stat().st_gid == group
        lookup_life.unload(bpffs=bpffs)


# Mounts and locks


@pytest.mark.parametrize("name", [b"\x0c", b"\xff", b"a\x0cb\x1c\x85\xff - bpf", b"\r", b"two words\n\\"])
def test_a_mount_point_with_any_name_disturbs_nobody(bpffs: Path, tmp_path: Path, name: bytes) -> None:
    point = os.fsencode(tmp_path) + b"/" + name
    os.mkdir(point)  # noqa: PTH102 - bytes that are no text
    subprocess.run([b"mount", b"-t", b"tmpfs", b"none", point], check=True)
    try:
        pins.check_mounted(bpffs)
        with pytest.raises(StateError, match="is no BPF file system"):
            pins.check_mounted(tmp_path)
        with pytest.raises(StateError, match="is no BPF file system"):
            pins.check_mounted(Path(os.fsdecode(point)))
    finally:
        subprocess.run([b"umount", point], check=True)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"\x1b[31mred", b"\x9b\xc2\x9bx", b"a\x0cb) c"])
def test_who_holds_the_lock_is_named_whatever_his_name(stage: Stage, bpffs: Path, name: bytes) -> None:
    lookup_life.load(bpffs=bpffs)
    ours, his = socket.socketpair()
    holder = os.fork()
    if holder == 0:
        try:
            _libc.prctl(PR_SET_NAME, name, 0, 0, 0)
            with Dispatcher(bpffs=bpffs):
                his.sendall(b"!")
                his.recv(1)
        finally:
            os._exit(0)
    try:
        assert ours.recv(1) == b"!"
        with pytest.raises(StateError) as caught:
            Dispatcher(bpffs=bpffs, timeout=0)
        said = str(caught.value)
        assert f"is locked by process {holder} (" in said
        assert said.isprintable()
    finally:
        ours.sendall(b"!")
        os.waitpid(holder, 0)
        ours.close()
        his.close()
    lookup_life.unload(bpffs=bpffs)


# States that are not this version's, and links that are not there any more


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("document", ["format 2", "nonsense"])
def test_what_another_version_wrote_is_refused_and_left_as_it_is(
    stage: Stage, bpffs: Path, document: str, read_only: bool
) -> None:
    lookup_life.load(bpffs=bpffs)
    with Dispatcher(bpffs=bpffs) as dispatcher:
        dispatcher.bind(bound(UDP, "198.51.100.1"))
        directory = directory_of(bpffs / "fastrecv", dispatcher.cookie)
        written = dispatcher.state
    current = (directory / "current").resolve()
    other = msgspec.msgpack.encode({"format": 2, "version": "9.9", "news": []})
    pins.write_document(other if document == "format 2" else b"\xc1", current / "document")
    (directory / "generation-99").mkdir(0o750)  # what only the other version knows the use of
    (directory / "current-new").symlink_to("generation-99")
    before = contents(directory)
    said = r"fastrecv 9\.9 \(state format 2, here 1\)" if document == "format 2" else "cannot be read"
    with pytest.raises(StateError, match=said):
        Dispatcher(bpffs=bpffs, read_only=read_only)
    assert contents(directory) == before
    pins.write_document(written.encode(), current / "document")
    with Dispatcher(bpffs=bpffs) as dispatcher:
        assert dispatcher.bindings == [bound(UDP, "198.51.100.1")]
        assert "generation-99" not in contents(directory), "what is this version's is put in order"
    assert state.FORMAT == 1
    lookup_life.unload(bpffs=bpffs)


def test_a_state_whose_link_somebody_has_detached_is_loaded_anew(stage: Stage, bpffs: Path) -> None:
    lookup_life.load(bpffs=bpffs)
    server = stage.serve("service", UDP, "198.51.100.2", 9000)
    with Dispatcher(bpffs=bpffs) as dispatcher:
        dispatcher.bind(bound(UDP, "198.51.100.1"))
        dispatcher.register("service", [server])
        directory = directory_of(bpffs / "fastrecv", dispatcher.cookie)
    with pytest.raises(StateError, match="is loaded in this network namespace already"):
        lookup_life.load(bpffs=bpffs)
    with Link.open(directory / "link") as link:
        link.detach()
    with pytest.raises(StateError, match="was detached by other means"):
        Dispatcher(bpffs=bpffs, read_only=True)
    assert lookup_life.load(bpffs=bpffs) == []
    with Dispatcher(bpffs=bpffs) as dispatcher:
        assert (dispatcher.bindings, dispatcher.serving()) == ([], [])
        dispatcher.bind(bound(UDP, "198.51.100.1"))
        dispatcher.register("service", [server])
    assert stage.ask(UDP, "198.51.100.1") == "service"
    lookup_life.unload(bpffs=bpffs)
