"""How a dispatcher begins and ends, and what is left where one ended by itself."""

from __future__ import annotations

import contextlib
from errno import E2BIG
from pathlib import Path

from fastrecv import bpf, generations, pins
from fastrecv.bpf import Link
from fastrecv.errors import BpfError, StateError
from fastrecv.lookup import BPFFS, PathLike, directory_of
from fastrecv.members import PLACES
from fastrecv.netns import Namespace
from fastrecv.state import MAX_DESTINATIONS, State

__all__ = ["load", "remnants", "unload"]


def load(
    netns: PathLike | None = None, *, bpffs: PathLike = BPFFS, group: int | None = None, timeout: float = 10.0
) -> list[Path]:
    """Attach a dispatcher without bindings to a network namespace, by default the caller's.

    group : gid whose members may read the state. Gives what was removed on the way: states of namespaces that have
    ended, and of processes that were killed while they loaded one. StateError where one is loaded.
    CAP_BPF and CAP_NET_ADMIN; CAP_SYS_ADMIN for another namespace than one's own.
    """
    root = pins.checked_root(Path(bpffs), create=True)
    with contextlib.closing(Namespace.open(netns)) as namespace:
        directory = directory_of(root, namespace.cookie)
        with pins.locked(directory, exclusive=True, create=True, timeout=timeout):
            if not _over(directory):
                raise StateError("a dispatcher is loaded in this network namespace already")
            for entry in directory.iterdir():  # of a load that was killed, or a program that was detached since
                pins.remove(entry)
            try:
                if group is not None:
                    pins.give_to(directory, group)
                _load(directory, namespace)
            except BaseException:
                pins.remove(directory)
                raise
    return [gone for gone in remnants(root.parent) if _remove_if_over(gone)]


def _load(directory: Path, namespace: Namespace) -> None:
    with bpf.packaged("lookup") as lookup:
        lookup.maps["sockets"].max_entries = PLACES
        lookup.maps["counts"].max_entries = MAX_DESTINATIONS
        generation = generations.first(directory)
        generations.build(generation, lookup, [], State.empty())
        for name in ("sockets", "counts"):
            pins.pin(lookup.maps[name], directory / name)
        pins.point(directory / "current", generation.name)
        try:
            link = lookup.programs["lookup"].attach_netns(namespace.fd)
        except BpfError as error:
            if error.errno != E2BIG:
                raise
            raise StateError(
                "this network namespace has 64 sk_lookup programs attached, the most there can be"
            ) from None
        with link:
            pins.pin(link, directory / "link")


def unload(netns: PathLike | None = None, *, bpffs: PathLike = BPFFS, timeout: float = 10.0) -> None:
    """Detach the dispatcher of a network namespace, and remove its state. StateError where none is loaded."""
    root = pins.checked_root(Path(bpffs))
    with contextlib.closing(Namespace.open(netns)) as namespace:
        directory = directory_of(root, namespace.cookie)
    try:
        with pins.locked(directory, exclusive=True, timeout=timeout):
            loaded = (directory / "link").exists()
            if loaded:  # first, so that no half of a state is ever in force
                _detach(directory / "link")
            pins.remove(directory)
    except FileNotFoundError:
        loaded = False
    if not loaded:
        raise StateError("no dispatcher is loaded in this network namespace")


def _detach(pinned: Path) -> None:
    """Detach at once: when no more than the pin goes, the kernel may leave it to a worker, and packets come still."""
    with Link.open(pinned) as link:
        pins.remove(pinned)
        link.detach()


def remnants(bpffs: PathLike = BPFFS) -> list[Path]:
    """States that nothing will use again: their namespace has ended, or who loaded them was killed half-way."""
    root = pins.checked_root(Path(bpffs))
    found = []
    for directory in sorted(root.glob("lookup-*")):
        with contextlib.suppress(OSError), pins.locked(directory, exclusive=False, timeout=0):
            if _over(directory):
                found.append(directory)
    return found


def _remove_if_over(directory: Path) -> bool:
    with contextlib.suppress(OSError), pins.locked(directory, exclusive=True, timeout=0):
        if _over(directory):
            pins.remove(directory)
            return True
    return False


def _over(directory: Path) -> bool:
    if not (directory / "link").exists():
        return True
    with Link.open(directory / "link") as link:
        return link.info.netns_inode == 0
