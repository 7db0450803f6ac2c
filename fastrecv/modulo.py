"""Modulo: members of ours in one reuseport group with those of a patched pmacct, or of the program that it comes from.

Whose a sender is, is jhash(source address, nonce) % size; the maps that say so are pinned under names that all of them
know (github.com/eduarrrd/reuseport; branch `reuse` of eduarrrd/pmacct). Who is bound to no such peer has more of
fastrecv.balance: there, few senders move when the group grows; by this rule nearly all do.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import socket
from collections.abc import Iterator
from errno import EACCES, ENOENT
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from fastrecv import bpf, pins, reuseport
from fastrecv.closing import Closing
from fastrecv.errors import BpfError, StateError
from fastrecv.jhash import jhash
from fastrecv.steerable import check_member, protocol_of

__all__ = ["SLOTS", "Modulo", "Seen", "look", "moved", "slot_of", "write_object"]

SLOTS = 128  # of bpf/modulo.bpf.c, and of the original as it is built
_TARGETS = {"tcp": "tcp_balancing_targets", "udp": "udp_balancing_targets"}
_ARRAY, _SOCKARRAY = 2, 20  # include/uapi/linux/bpf.h
_LAYOUT = {  # type, bytes of a key and of a value, entries
    "nonce": (_ARRAY, 4, 4, 1),
    "size": (_ARRAY, 4, 4, 1),
    **dict.fromkeys(_TARGETS.values(), (_SOCKARRAY, 4, 8, SLOTS)),
}
_WORD = (1 << 32) - 1

Protocol = Literal["tcp", "udp"]


class Modulo(Closing):
    """The four maps under a pin root, and a program over them; a context manager.

    root : a directory of a BPF file system: /sys/fs/bpf/pmacct is the patched pmacct's, /sys/fs/bpf/reuseport the
    original program's. It and the maps are made where they are missing. One root serves one TCP and one UDP group.
    size : by how many slots senders are divided, 1 to 128; nonce : the seed of the hash, 1 to 2**32 - 1. None takes
    what is there; and where nothing is, 128, and a nonce that nobody can guess.

    Several that start at once agree, or fail with StateError, which says both numbers; it is also raised where the root
    is no place for maps, or holds maps of another layout. Ours take a lock while they look and write. The peers take
    none: what was written is read again, and what the peers have changed since is noticed by register().

    A sender whose slot is empty is refused (ECONNREFUSED), as by the original. IPv4 senders come where the original
    brings them. IPv6 ones do only while a program of ours is attached (this class, or a peer that loads what
    `write_object` writes): the original hashes no more of them than bytes 4 to 7. The last to attach decides for all.
    Connections that wait in the queue of a listener which closes do not come by the program: they are reset, or go to
    any member where net.ipv4.tcp_migrate_req is 1.

    CAP_BPF to make one; Linux 5.12 (atomic exchange in BPF).
    """

    def __init__(self, root: str | os.PathLike[str], size: int | None = None, nonce: int | None = None) -> None:
        if size is not None and not 1 <= size <= SLOTS:
            raise ValueError(f"size {size}: give 1 to {SLOTS}")
        if nonce is not None and not 1 <= nonce <= _WORD:
            raise ValueError(f"nonce {nonce}: give 1 to {_WORD}; 0 is none")
        self.root = Path(root)
        self._wanted = {"size": size, "nonce": nonce}
        made = not self.root.exists()
        with _locked(self.root, create=True), contextlib.ExitStack() as undo:
            if made:
                undo.callback(_remove_empty, self.root)
            self._check_layouts()
            self._object = bpf.Object(bpf.compiled("modulo"), "modulo", pin_root=self.root)
            undo.callback(self._object.close)
            self._object.load()
            self._agree()
            for name, otherwise in (("size", SLOTS), ("nonce", 1 + secrets.randbelow(_WORD))):
                if not self._read(name):
                    self._write(name, self._wanted[name] or otherwise)
            self._agree()  # again: who knows no lock may have been as quick
            undo.pop_all()

    def close(self) -> None:
        """Let go of the program and the maps: they stay pinned, and the program in force."""
        self._object.close()

    @property
    def size(self) -> int:
        """As it is now."""
        return self._read("size")

    @property
    def nonce(self) -> int:
        """As it is now."""
        return self._read("nonce")

    def index(self, sender: IPv4Address | IPv6Address) -> int:
        """The slot of a sender, as the program finds it; a mapped address (::ffff:a.b.c.d) is IPv4."""
        return slot_of(sender, self.size, self.nonce)

    def attach(self, sock: socket.socket) -> None:
        """Attach the program to a socket's group, in the place of any other. SocketRefusedError.

        After bind(), and of TCP after listen(): the kernel lets no socket that has a program into a group. (The
        patched nfacctd attaches before: its first instance starts, every later one gets EADDRINUSE from bind().)
        """
        reuseport.attach(sock, self._object.programs["_selector"])

    def register(self, index: int, sock: socket.socket, *, take_over: bool = False) -> None:
        """Give a slot to a member of the group; nothing where it has it. Replacing another, with take_over, is atomic.

        One beyond the size has no senders, until `resize`. SocketRefusedError where the socket cannot have it, or
        another has it; StateError where size or nonce are no longer what this instance was made with.
        """
        _check_slot(index)
        check_member(sock)
        self._agree()
        reuseport.put(self._targets(_protocol(sock)), index, sock, take_over)

    def check(self, index: int, sock: socket.socket, *, take_over: bool = False) -> None:
        """SocketRefusedError where `register` is known to refuse: to look at several before any is changed."""
        _check_slot(index)
        reuseport.check(self._targets(_protocol(sock)), index, sock, take_over)

    def unregister(self, index: int, protocol: Protocol) -> None:
        """Empty a slot; nothing where it is empty."""
        _check_slot(index)
        with contextlib.suppress(KeyError):
            self._targets(protocol).delete([index])

    def members(self, protocol: Protocol) -> dict[int, int]:
        """The slots that have a socket, and its cookie (listeners.cookie_of); those of peers as well."""
        return reuseport.in_slots(self._targets(protocol))

    def resize(self, size: int) -> float:
        """Divide the senders by `size` slots from now on; gives the share of them that changes its slot (see `moved`).

        To lose nobody, register the members of new slots before; those beyond the new size get no more senders.
        Peers read the size when they start: those that are told another one by their configuration then refuse to.
        """
        if not 1 <= size <= SLOTS:
            raise ValueError(f"size {size}: give 1 to {SLOTS}")
        with _locked(self.root, create=False):
            before = self.size
            self._write("size", size)
            if self._wanted["size"] is not None:
                self._wanted["size"] = size
        return moved(before, size)

    def destroy(self) -> None:
        """Unpin the maps, and remove the root where nothing else is in it. StateError while a socket is in a slot.

        Who starts later would make maps of his own, and those of the group that have none would lose their senders.
        """
        with _locked(self.root, create=False):
            self._check_layouts()
            held = []
            for protocol, name in _TARGETS.items():
                if (self.root / name).exists():  # which others may have made since these were unpinned
                    with bpf.Map.open(self.root / name, np.uint32, np.uint64) as there:
                        held += [f"{protocol} {slot}" for slot in there.items()[0]]
            if held:
                raise StateError(f"{self.root} is in use, slots {', '.join(held)}: unregister or close their sockets")
            for name in _LAYOUT:
                pins.remove(self.root / name)
            _remove_empty(self.root)

    def _targets(self, protocol: Protocol) -> bpf.Map:
        if protocol not in _TARGETS:
            raise ValueError(f"protocol {protocol!r}: give {' or '.join(_TARGETS)}")
        return self._object.maps[_TARGETS[protocol]]

    def _read(self, name: str) -> int:
        return int(self._object.maps[name][0])

    def _write(self, name: str, number: int) -> None:
        self._object.maps[name].update([0], [number])

    def _agree(self) -> None:
        """StateError where a number that is set is not the one that was asked for."""
        for name, wanted in self._wanted.items():
            found = self._read(name)
            if found and wanted not in (None, found):
                raise StateError(
                    f"{name} is {found} there, {wanted} here: all that share {self.root} must agree: give {found}, or "
                    "none to take what is there"
                )

    def _check_layouts(self) -> None:
        """StateError where something else than these maps is pinned under their names."""
        for name, wanted in _LAYOUT.items():
            path = self.root / name
            if not path.exists():
                continue
            with bpf.Map.open(path) as found:
                layout = (found.type, found.key_dtype.itemsize, found.value_dtype.itemsize, found.max_entries)
            if layout != wanted:
                words = "type {}, {} and {} bytes, {} entries"
                raise StateError(
                    f"{path} has another layout: {words.format(*layout)} there, {words.format(*wanted)} here: another "
                    "program's, or built for another number of slots; choose another root, or remove it"
                )


class Seen(NamedTuple):
    """What stands under a root: nonce and size (0: not set yet), and the cookies of the sockets in the slots."""

    nonce: int
    size: int
    tcp: dict[int, int]
    udp: dict[int, int]


def look(root: str | os.PathLike[str]) -> Seen:
    """Read the maps of a root, and change nothing. Read permission on the pins; StateError where there are none."""
    found = []
    for name, (_, _, width, _) in _LAYOUT.items():
        try:
            with bpf.Map.open(Path(root) / name, np.uint32, np.dtype(f"u{width}"), read_only=True) as opened:
                found.append(int(opened[0]) if opened.max_entries == 1 else reuseport.in_slots(opened))
        except BpfError as error:
            if error.errno != ENOENT:
                raise
            raise StateError(f"{root} holds no maps of that kind: `fastrecv balance modulo create`") from None
        except ValueError as error:
            raise StateError(f"{root} holds maps of another layout: {error}") from None
    return Seen(*found)  # type: ignore[arg-type] # two numbers and two maps, in the order of _LAYOUT


def slot_of(sender: IPv4Address | IPv6Address, size: int, nonce: int) -> int:
    """The slot of a sender; a mapped address (::ffff:a.b.c.d) is IPv4."""
    mapped = sender.ipv4_mapped if isinstance(sender, IPv6Address) else None
    packed = (mapped or sender).packed
    words = [int.from_bytes(packed[start : start + 4]) for start in range(0, len(packed), 4)]
    return jhash(words if len(words) == 4 else [*words, 0, 0], nonce) % size


def moved(before: int, after: int) -> float:
    """The share of all senders, 0 to 1, whose slot changes from size `before` to `after`: 0.8 from 4 to 5.

    Of every lcm(before, after) hashes, only the first min(before, after) give the same remainder by both.
    """
    return 1 - min(before, after) / math.lcm(before, after)


def write_object(path: str | os.PathLike[str]) -> None:
    """Write the program as an ELF file that a peer loads itself: pmacct's reuseport_bpf_prog.

    Section sk_reuseport/selector, function _selector, four maps pinned by name: with libbpf's pin_root_path the peer
    finds the same ones as `Modulo` with that root. A peer with libbpf 1.0 or newer, which does not know the section,
    sets the program's type itself: bpf_program__set_type(program, BPF_PROG_TYPE_SK_REUSEPORT); older ones take it from
    the section's name. No privilege needed. StateError where the file exists: a peer may be told to load it.
    """
    target = Path(path)
    try:
        file = target.open("xb")
    except FileExistsError:
        raise StateError(f"{target} exists already: remove it, or give another name") from None
    try:
        with file:
            file.write(bpf.compiled("modulo"))
    except BaseException:
        target.unlink()  # half of it would be refused, later, by whom it is for
        raise


def _check_slot(index: int) -> None:
    if not 0 <= index < SLOTS:
        raise ValueError(f"slot {index}: give 0 to {SLOTS - 1}")


def _protocol(sock: socket.socket) -> Protocol:
    return "tcp" if protocol_of(sock) == socket.IPPROTO_TCP else "udp"


def _remove_empty(root: Path) -> None:
    with contextlib.suppress(OSError):  # others keep something there, or it is a mount point
        root.rmdir()


@contextlib.contextmanager
def _locked(root: Path, *, create: bool) -> Iterator[None]:
    """Hold the root's lock. StateError where it is no directory of a BPF file system, or not the caller's to change."""
    place = root.parent if create and not root.exists() else root
    try:
        device = place.stat().st_dev
    except FileNotFoundError:
        raise StateError(f"{place} does not exist: give a directory of a BPF file system") from None
    if not pins.is_bpf(device):
        raise StateError(
            f"{place} is in no BPF file system: give a directory of one, as /sys/fs/bpf/pmacct or /sys/fs/bpf/reuseport"
        )
    try:
        with pins.locked(root, exclusive=True, create=create):
            yield
    except OSError as error:
        if not isinstance(error, (PermissionError, NotADirectoryError)) and error.errno != EACCES:
            raise
        raise StateError(f"{root} is not a directory of yours to change: {error.strerror}") from None
