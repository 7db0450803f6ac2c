"""Balancers that outlive the processes that use them: how they begin, are opened, and end.

Each is a directory of pins in bpffs, and needs no process:

    balance-<name>/program, slots, tables, table-0, ...    as fastrecv.balance_maps has them
    balance-<name>/document                                pinned last: with it the balancer is whole

What changes while it lives (weights, sockets, places) is in its maps alone, and every change of them is one step of the
kernel's; a process that is killed between setting weights and putting a table in force leaves that to the next.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import msgspec

from fastrecv import bpf, pins
from fastrecv.balance import Balancer, Empty
from fastrecv.balance_maps import Maps
from fastrecv.errors import StateError
from fastrecv.lookup import BPFFS, PathLike
from fastrecv.policies import Mapped, Policy
from fastrecv.watching import Choices, sampled

__all__ = ["check_name", "choices", "create", "destroy", "document", "names", "opened"]

_PREFIX = "balance-"
_WATCHED = "watched"  # a directory in a balancer's own, locked by whom its choices are told to
_FORMAT = 1  # of the document and of the maps beside it; another number is another fastrecv's
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Document(msgspec.Struct, forbid_unknown_fields=True):
    """What a balancer was made by; it never changes."""

    format: int
    version: str
    program: str
    policy: str
    mapped: Mapped | None
    seed: int
    empty: Empty
    senders: int
    created: float


class _Head(msgspec.Struct):
    """What every format has."""

    format: int
    version: str


def check_name(name: str) -> None:
    """ValueError for what cannot be the name of a balancer: bpffs takes no dots."""
    if not _NAME.fullmatch(name):
        shown = repr(name) if len(name) <= 40 else f"{name[:40]!r}..."
        raise ValueError(f"name {shown}: give 1 to 64 of the letters A to Z, a to z, digits, - and _")


def names(bpffs: PathLike = BPFFS) -> list[str]:
    """The balancers that there are."""
    root = pins.checked_root(Path(bpffs))
    return sorted(path.name.removeprefix(_PREFIX) for path in root.glob(f"{_PREFIX}*") if _is_whole(path))


def _is_whole(directory: Path) -> bool:
    """Whether it is one; what may not be looked into is taken for one, so that whoever opens it hears so."""
    try:
        return (directory / "document").exists()
    except PermissionError:
        return True


@contextlib.contextmanager
def create(
    name: str, policy: Policy, size: int | None = None, *, empty: Empty = "drop", senders: int = 0,
    bpffs: PathLike = BPFFS, group: int | None = None, timeout: float = 10.0,
) -> Iterator[Balancer]:  # fmt: skip
    """Make a balancer, or join the one of that name that others have made alike; its lock is held within the context.

    Of several that begin at once the first makes it. StateError, which names both values, where the one that is there
    has another policy, seed, size, number of senders or program; a seed or a size of None, or 0 senders, agree to any.

    size : slots 0 to size - 1 share the senders; needed by the first. group : gid whose members may read it.
    CAP_BPF to make one.
    """
    directory = _directory(name, bpffs, create=True)
    with pins.locked(directory, exclusive=True, create=True, timeout=timeout):
        if not (directory / "document").exists():
            try:
                _make(directory, policy, size, empty, senders, group)
            except BaseException:
                pins.remove(directory)
                raise
        with _open(directory, read_only=False) as balancer:
            _agree(name, document(directory), balancer, policy, size, empty, senders)
            there = directory.stat().st_gid
            if group not in (None, there):
                raise StateError(f"balancer {name!r} is there for group {there} to read, not {group}: destroy it first")
            yield balancer


@contextlib.contextmanager
def opened(name: str, *, bpffs: PathLike = BPFFS, read_only: bool = False, timeout: float = 10.0) -> Iterator[Balancer]:
    """Open a balancer; its lock, shared with other readers where read_only, is held within the context.

    StateError where there is none, it is another version's, or the lock is not to be had. The privileges of the pins'
    owner to change it, CAP_BPF not among them; those of their group to read. Linux 5.19 for either without CAP_BPF.
    """
    directory = _directory(name, bpffs)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(pins.locked(directory, exclusive=not read_only, timeout=timeout))
            (directory / "document").lstat()
        except FileNotFoundError:
            raise _missing(name, bpffs) from None
        yield stack.enter_context(_open(directory, read_only=read_only))


@contextlib.contextmanager
def choices(name: str, one_in: int, *, bpffs: PathLike = BPFFS) -> Iterator[Choices]:
    """A balancer's choices, one in so many, told while the context lasts; its lock is not held meanwhile.

    StateError where somebody else is being told.
    """
    directory = _directory(name, bpffs)
    with contextlib.ExitStack() as stack:
        with opened(name, bpffs=bpffs):
            stack.enter_context(pins.locked(directory / _WATCHED, exclusive=True, create=True, timeout=0))
            maps = stack.enter_context(Maps.open(directory, read_only=False))
        yield stack.enter_context(sampled(maps, one_in))


def destroy(name: str, *, bpffs: PathLike = BPFFS, timeout: float = 10.0) -> None:
    """Forget a balancer. Groups that have its program keep it, as it is now, until it is detached or they end."""
    directory = _directory(name, bpffs)
    try:
        with pins.locked(directory, exclusive=True, timeout=timeout):
            whole = (directory / "document").exists()
            pins.remove(directory / "document")  # first: without it the rest is none, whoever is killed here
            pins.remove(directory)
    except FileNotFoundError:
        whole = False
    if not whole:
        raise _missing(name, bpffs)


def document(directory: Path) -> Document:
    """StateError where another version, with another format, has written it."""
    data = pins.read_document(directory / "document")
    try:
        head = msgspec.msgpack.decode(data, type=_Head)
        if head.format != _FORMAT:
            raise StateError(
                f"{directory} was made by fastrecv {head.version} (format {head.format}, here {_FORMAT}): use that "
                "version, or destroy it and create it anew"
            )
        return msgspec.msgpack.decode(data, type=Document)
    except msgspec.DecodeError as error:
        raise StateError(f"the document of {directory} cannot be read ({error}): destroy it, create it anew") from None


def _directory(name: str, bpffs: PathLike, create: bool = False) -> Path:
    check_name(name)
    return pins.checked_root(Path(bpffs), create=create) / f"{_PREFIX}{name}"


def _missing(name: str, bpffs: PathLike) -> StateError:
    others = ", ".join(names(bpffs))
    return StateError(f"there is no balancer {name!r}{f', only {others}' if others else ''}: make it by `create`")


def _make(directory: Path, policy: Policy, size: int | None, empty: Empty, senders: int, group: int | None) -> None:
    for entry in directory.iterdir():  # of one who was killed meanwhile
        pins.remove(entry)
    if size is None:
        raise StateError(f"{directory.name.removeprefix(_PREFIX)} is not there yet: give it a size (--size)")
    if group is not None:
        pins.give_to(directory, group)
    with Balancer(policy, size=size, empty=empty, senders=senders) as made:
        made.maps.pin(directory)
        assert made.policy.seed is not None
        said = Document(
            _FORMAT, version("fastrecv"), bpf.digest("balance"), str(policy), policy.mapped, made.policy.seed, empty,
            senders, time.time(),
        )  # fmt: skip
        pins.write_document(msgspec.msgpack.encode(said), directory / "document")


@contextlib.contextmanager
def _open(directory: Path, *, read_only: bool) -> Iterator[Balancer]:
    said = document(directory)
    if not read_only and said.program != bpf.digest("balance"):
        raise StateError(
            f"{directory.name} was made by fastrecv {said.version}, and this fastrecv ({version('fastrecv')}) has "
            "another program: use that version, or destroy it and create it anew"
        )
    policy = Policy.parse(said.policy, mapped=said.mapped, seed=said.seed)
    with Balancer.of(Maps.open(directory, read_only=read_only), policy, said.empty, said.senders) as balancer:
        if not read_only:
            balancer.settle()
            _hush(directory, balancer)
        yield balancer


def _hush(directory: Path, balancer: Balancer) -> None:
    """Tell no choices any more where who had them told was killed."""
    if balancer.sampling:
        with contextlib.suppress(OSError), pins.locked(directory / _WATCHED, exclusive=True, create=True, timeout=0):
            balancer.sample(0)


def _agree(
    name: str, there: Document, balancer: Balancer, policy: Policy, size: int | None, empty: Empty, senders: int
) -> None:
    """StateError where what is there is not what was asked for."""
    present = balancer.size
    for what, old, new in (
        ("policy", there.policy, str(policy)),
        ("map", there.mapped or "none", policy.mapped or "none"),
        ("seed", there.seed, there.seed if policy.seed is None else policy.seed),
        ("size", present, present if size is None else size),
        ("empty", there.empty, empty),
        ("senders", there.senders, senders or there.senders),
    ):
        if old != new:
            raise StateError(f"balancer {name!r} is there with {what} {old}, not {new}: take that, or destroy it first")
