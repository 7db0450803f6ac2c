"""What outlives a process: directories of bpffs, locked while they are read or changed, and documents.

A document is bytes in an ARRAY map, because bpffs holds nothing but BPF objects, directories and symbolic links.
Everything is put in place by one step that the file system makes atomic, so a reader finds the old or the new.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from fastrecv.bpf import Map
from fastrecv.errors import StateError

__all__ = [
    "DIRECTORY_MODE",
    "check_mounted",
    "checked_root",
    "give_to",
    "is_bpf",
    "locked",
    "make",
    "pin",
    "point",
    "read_document",
    "remove",
    "write_document",
]

DIRECTORY_MODE = 0o750
_PIN_MODE = 0o640
_CHUNK = 4096
_LENGTH = 8  # bytes before the document, which say how long it is
_POLL = 0.02  # seconds between two tries for a lock


class Pinnable(Protocol):
    def pin(self, path: str | os.PathLike[str]) -> None: ...


def checked_root(bpffs: Path, create: bool = False) -> Path:
    """The directory under which this package pins, in a bpffs; made, with `create`, where it is missing.

    StateError where `bpffs` is no BPF file system, or the directory is a stranger's, who could lock everybody out.
    """
    check_mounted(bpffs)
    root = bpffs / "fastrecv"
    if create:
        with contextlib.suppress(FileExistsError):
            root.mkdir(0o755)
            root.chmod(0o755)  # whatever the caller's umask is
    with contextlib.suppress(FileNotFoundError):
        _refuse_strangers(root, root.lstat())
    return root


def _refuse_strangers(directory: Path, status: os.stat_result) -> None:
    """StateError where others than root and the caller could put something else in a directory's place, or into it."""
    trusted = status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022
    if not (stat.S_ISDIR(status.st_mode) and trusted):
        raise StateError(
            f"{directory} belongs to uid {status.st_uid}, or others may write there, who could keep everybody out: "
            "remove it"
        )


def check_mounted(bpffs: Path) -> None:
    """StateError where `bpffs` is not in a BPF file system."""
    try:
        device = os.stat(bpffs).st_dev  # noqa: PTH116 - st_dev is what mountinfo names
    except FileNotFoundError:
        raise StateError(f"{bpffs} does not exist: give the mount point of a BPF file system with --bpffs") from None
    if not is_bpf(device):
        raise StateError(f"{bpffs} is no BPF file system: mount -t bpf bpf {bpffs}, or say with --bpffs where one is")


def is_bpf(device: int) -> bool:
    """Whether a device, as st_dev names it, is a BPF file system."""
    number = f"{os.major(device)}:{os.minor(device)}".encode()
    kinds = {}
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n"):  # proc(5); mount points may hold any bytes
        fields = line.split(b" ")
        if b"-" in fields:
            kinds[fields[2]] = fields[fields.index(b"-") + 1]
    return kinds.get(number) == b"bpf"


@contextlib.contextmanager
def locked(directory: Path, *, exclusive: bool, create: bool = False, timeout: float = 10.0) -> Iterator[None]:
    """Hold a directory's lock: exclusive to change what is in it, shared to read.

    create : make the directory, which then is empty, where it is missing; otherwise FileNotFoundError.
    StateError, naming who holds it, when `timeout` seconds have passed.
    """
    deadline = time.monotonic() + timeout
    while True:
        if create:
            with contextlib.suppress(FileExistsError):
                make(directory)
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            if create:  # somebody has removed it since
                continue
            raise
        try:
            _refuse_strangers(directory, os.fstat(fd))
            _lock(fd, directory, exclusive, deadline)
            if _is(fd, directory):
                yield
                return
        finally:
            os.close(fd)


def _is(fd: int, directory: Path) -> bool:
    """Whether the directory is still the one that was opened: others may remove it while its lock is waited for."""
    try:
        return os.path.samestat(os.fstat(fd), directory.stat())
    except FileNotFoundError:
        return False


def _lock(fd: int, directory: Path, exclusive: bool, deadline: float) -> None:
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(_POLL)
                continue
            raise StateError(f"{directory} is locked by {_holders(fd)}: wait for it to end, or end it") from None
        return


def _holders(fd: int) -> str:
    """Who holds a lock of the file, by /proc/locks (proc(5))."""
    status = os.fstat(fd)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    found = []
    for fields in map(str.split, Path("/proc/locks").read_text().splitlines()):
        if fields[1] == "FLOCK" and fields[5] == place:
            try:
                said = Path("/proc", fields[4], "comm").read_text(errors="replace")
                name = "".join(filter(str.isprintable, said))
            except OSError:
                name = "of another pid namespace" if fields[4] == "0" else "gone"
            found.append(f"process {fields[4]} ({name})")
    return ", ".join(found) or "somebody who has just let go"


def make(directory: Path) -> None:
    """Make a directory for its owner to change and its group to read, whatever the caller's umask is."""
    directory.mkdir(DIRECTORY_MODE)
    mode = stat.S_IMODE(directory.stat().st_mode)
    if mode & 0o777 != DIRECTORY_MODE:  # only then: who is not of the group may not keep S_ISGID
        directory.chmod(DIRECTORY_MODE | mode & stat.S_ISGID)


def give_to(directory: Path, group: int) -> None:
    """Let the members of a group read what is, and will be, in a directory. CAP_CHOWN and CAP_FSETID, or membership."""
    os.chown(directory, -1, group)
    directory.chmod(DIRECTORY_MODE | stat.S_ISGID)  # what is made in it inherits the group


def pin(thing: Pinnable, path: Path) -> None:
    """Pin an object, for the directory's owner to change and its group to read."""
    thing.pin(path)
    path.chmod(_PIN_MODE)


def point(link: Path, target: str) -> None:
    """Make a symbolic link lead to `target`, atomically."""
    aside = link.with_name(f"{link.name}-new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.replace(link)


def remove(path: Path) -> None:
    """Remove a pin, or a directory with all that is in it; nothing where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        for entry in path.iterdir():
            remove(entry)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def write_document(data: bytes, path: Path) -> None:
    """Pin a document, atomically in the place of one that is there. CAP_BPF."""
    chunks = -(-(_LENGTH + len(data)) // _CHUNK)
    text = np.zeros(chunks * _CHUNK, np.uint8)
    text[:_LENGTH] = np.frombuffer(len(data).to_bytes(_LENGTH, "little"), np.uint8)
    text[_LENGTH : _LENGTH + len(data)] = np.frombuffer(data, np.uint8)
    aside = path.with_name(f"{path.name}-new")
    aside.unlink(missing_ok=True)
    with Map.array("document", f"V{_CHUNK}", chunks) as document:
        document.update(np.arange(chunks, dtype=np.uint32), text.view(f"V{_CHUNK}"))
        pin(document, aside)
    aside.replace(path)


def read_document(path: Path) -> bytes:
    """What `write_document` has pinned. Needs no more than read permission."""
    with Map.open(path, np.uint32, f"V{_CHUNK}", read_only=True) as document:
        text = document.lookup(np.arange(document.max_entries, dtype=np.uint32)).tobytes()
    return text[_LENGTH : _LENGTH + int.from_bytes(text[:_LENGTH], "little")]
