"""What an XdpReceiver may be asked for, checked; and its memory and sockets, opened in the best mode that works."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from errno import EINVAL, EOPNOTSUPP, ERANGE
from typing import NamedTuple, TypedDict, TypeVar

from fastrecv import sockets
from fastrecv.errors import XdpError
from fastrecv.interfaces import Interface
from fastrecv.redirect import Redirect

try:
    from fastrecv._xsk import MAX_BATCH, MAX_QUEUES, PARTIAL, TRUST, VERIFY, Reader, Umem, grace_period
except ImportError as error:
    raise ImportError(
        f"fastrecv's AF_XDP part cannot be loaded ({error}): install libxdp 1.2 or newer (Debian: libxdp1); "
        "where fastrecv was built without it, apt install libxdp-dev and build again",
        name="fastrecv._xsk",
    ) from error

__all__ = [
    "MODES",
    "Opened",
    "Reader",
    "Umem",
    "XdpOptions",
    "grace_period",
    "in_best",
    "opened",
    "reader_of",
    "reserved",
]

MODES = ("zero-copy", "copy", "generic")
Made = TypeVar("Made")
_CHECKSUMS = {"trust": TRUST, "verify": VERIFY, "partial": PARTIAL}
_MAX_MEMORY = (1 << 31) - 1  # bytes; offsets in Arrow's views are 32 bits wide
_MAX_RING = 1 << 15
_MAX_BUSY = (1 << 16) - 1
_COLUMNS = {"timestamps": 2, "tos": 16}  # Column of _recv
_AF_XDP = 44  # include/linux/socket.h


class XdpOptions(TypedDict, total=False):
    """All that an XdpReceiver may be asked for beside what it receives: see there."""

    batch_size: int
    ring_size: int
    frames: int
    checksums: str
    timestamps: bool
    tos: bool
    need_wakeup: bool
    busy_poll: int
    prefer_busy_poll: bool
    busy_poll_budget: int


class Opened(NamedTuple):
    """mode : one of MODES. refused : why not those before it, by mode."""

    reader: Reader
    umem: Umem
    mode: str
    refused: dict[str, str]


def opened(redirect: Redirect, queues: Sequence[int] | None, mode: str, options: XdpOptions, attach: bool) -> Opened:
    """Sockets for the queues, in the places that `redirect` sends to.

    attach : attach it, too, as the mode wants it; else the mode is as it is attached already.
    """
    _check(options)
    if mode not in {"auto", *MODES}:
        raise ValueError(f"mode is {mode!r}: choose auto, {', '.join(MODES)}")
    numbers = _queues(redirect.interface, queues)
    made, refused = in_best(
        MODES if mode == "auto" else (mode,),
        lambda candidate: _opened_as(candidate, redirect, numbers, options, attach),
    )
    return made._replace(refused=refused)


def in_best(modes: Sequence[str], attempt: Callable[[str], Made]) -> tuple[Made, dict[str, str]]:
    """What `attempt` makes in the first of `modes` that the driver has; and why not in those before it, by mode."""
    refused: dict[str, str] = {}
    for mode in modes:
        try:
            return attempt(mode), refused
        except XdpError as error:
            if mode == modes[-1] or error.errno not in (EOPNOTSUPP, EINVAL, ERANGE):
                raise
            refused[mode] = str(error)
    raise AssertionError("the last mode returns, or raises")


def _opened_as(mode: str, redirect: Redirect, queues: list[int], options: XdpOptions, attach: bool) -> Opened:
    umem = reserved(redirect.interface, queues, redirect.frame_size, options)
    try:
        umem.open(zero_copy=mode == "zero-copy")
        if options.get("busy_poll") is not None:
            _poll_busily(umem, options)
        reader = reader_of(umem, redirect.interface, options)
        for number, descriptor in zip(queues, umem.descriptors, strict=True):
            redirect.put(number, descriptor)
        if attach:
            redirect.attach("generic" if mode == "generic" else "native")
        elif redirect.mode == "generic":
            mode = "generic"
    except BaseException:
        umem.close()
        raise
    return Opened(reader, umem, mode, {})


def reserved(interface: Interface, queues: list[int], frame_size: int, options: XdpOptions) -> Umem:
    """The memory of these queues, whose sockets are still to be opened."""
    ring_size = options.get("ring_size", 2048)
    frames = options.get("frames", 2 * ring_size)
    if (size := frames * len(queues) * frame_size) > _MAX_MEMORY:
        raise ValueError(f"{size:,} bytes of frames are more than {_MAX_MEMORY:,}: give fewer frames, or queues")
    return Umem(
        interface.name, queues, frame_size=frame_size, frames=frames * len(queues), ring_size=ring_size,
        need_wakeup=options.get("need_wakeup", True),
        columns=sum(column for name, column in _COLUMNS.items() if options.get(name)),
        rows=options.get("batch_size", 64),
    )  # fmt: skip


def reader_of(umem: Umem, interface: Interface, options: XdpOptions) -> Reader:
    """Who reads the sockets of `umem`, which are open, and closes them."""
    checksums = options.get("checksums", "partial" if interface.kind == "veth" else "verify")
    reader = Reader(umem, checksums=_CHECKSUMS[checksums], busy=options.get("busy_poll") is not None)
    reader.place({0: interface.index, **interface.vlans}, interface.martians())
    return reader


def _poll_busily(umem: Umem, options: XdpOptions) -> None:
    for descriptor in umem.descriptors:
        with socket.socket(_AF_XDP, socket.SOCK_RAW, 0, fileno=os.dup(descriptor)) as sock:
            sockets.busy_poll(sock, options["busy_poll"], prefer=options.get("prefer_busy_poll", False),
                              budget=options.get("busy_poll_budget"))  # fmt: skip


def _queues(interface: Interface, queues: Sequence[int] | None) -> list[int]:
    if queues is not None and not isinstance(queues, Sequence):
        raise TypeError(f"queues is {queues!r}: give a list of their numbers, None for all")
    numbers = list(range(interface.queues)) if queues is None else list(queues)
    for number in numbers:
        if not isinstance(number, int) or not 0 <= number < interface.queues:
            raise ValueError(f"interface {interface.name} has no queue {number!r}: give 0 to {interface.queues - 1}")
    if not numbers or len(set(numbers)) != len(numbers) or len(numbers) > MAX_QUEUES:
        raise ValueError(f"queues are {numbers}: give each once, at least one and {MAX_QUEUES} at most")
    return numbers


def _check(options: XdpOptions) -> None:
    for name in options:
        if name not in XdpOptions.__annotations__:
            raise TypeError(f"no option {name!r}: choose from {', '.join(XdpOptions.__annotations__)}")
    ring_size = options.get("ring_size", 2048)
    limits = {"batch_size": (1, MAX_BATCH), "ring_size": (2, _MAX_RING), "frames": (ring_size, _MAX_MEMORY),
              "busy_poll": (0, _MAX_BUSY), "busy_poll_budget": (1, _MAX_BUSY)}  # fmt: skip
    for name, (low, high) in limits.items():
        value = options.get(name, low)
        if not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}: give {low:,} to {high:,}")
    if ring_size & (ring_size - 1):
        raise ValueError(f"ring_size is {ring_size}: give a power of two")
    for name in ("timestamps", "tos", "need_wakeup", "prefer_busy_poll"):
        if not isinstance(options.get(name, False), bool):
            raise TypeError(f"{name} is {options.get(name)!r}: give True or False")
    if options.get("checksums", "verify") not in _CHECKSUMS:
        raise ValueError(f"checksums is {options.get('checksums')!r}: choose {', '.join(_CHECKSUMS)}")
    if options.get("busy_poll") is None and (options.get("prefer_busy_poll") or "busy_poll_budget" in options):
        raise ValueError("prefer_busy_poll and busy_poll_budget need busy_poll: give its microseconds")
