"""Dispatcher: which service gets a packet, by protocol, destination prefix, port, source prefix and interface.

Its state outlives the process and needs none: everything is pinned in bpffs, in one directory a network namespace.

    lookup-<cookie>/link          while this pin is there the program is attached, and the state loaded
    lookup-<cookie>/sockets       SOCKMAP, of all rule sets
    lookup-<cookie>/counts        PERCPU_ARRAY, of all rule sets
    lookup-<cookie>/current       leads to the rule set in force
    lookup-<cookie>/generation-7/program, document

A change of rules builds a generation beside the present one and puts it in force by one bpf_link_update. A process that
is killed after that and before it has turned `current` leaves the turning to whoever next opens the state to change it:
the link says which program is attached, to readers, too, who may open it.
"""

from __future__ import annotations

import contextlib
import copy
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from errno import EACCES, EPERM
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastrecv import bpf, generations, listeners, pins, ruletext
from fastrecv.bpf import Link, LinkInfo, Map, Program
from fastrecv.closing import Closing
from fastrecv.errors import BpfError, StateError
from fastrecv.members import Members
from fastrecv.netns import Namespace
from fastrecv.rules import Binding, Destination, compile_rules
from fastrecv.state import ANEW, DROP, Change, State, check_label, key_of

__all__ = ["BPFFS", "COUNTERS", "ERRORS", "Dispatcher", "PathLike", "Serving", "directory_of"]

BPFFS = Path("/sys/fs/bpf")
COUNTERS = ("lookups", "misses", "unfit", "family", "taken", "other")
"""Of a destination: struct counters of bpf/lookup.h."""
ERRORS = COUNTERS[2:]

PathLike = str | os.PathLike[str]


class Serving(NamedTuple):
    """A destination as it stands.

    bindings : how many lead to it. sockets : cookies of its members, as SO_COOKIE and `ss -e` (sk:) say them.
    counters : by their names in COUNTERS, since the destination was first bound or registered.
    """

    destination: Destination
    bindings: int
    sockets: list[int]
    counters: dict[str, int]


class Dispatcher(Closing):
    """The dispatcher of one network namespace, opened: a context manager that holds its lock.

    Opened to change it, the lock is exclusive; read_only, it is shared with other readers.

    netns : path of a network namespace, by default the caller's own (another takes CAP_SYS_ADMIN). timeout : seconds to
    wait for the lock. adopt : take what another version has loaded, or somebody has replaced, to `upgrade` it.

    StateError where nothing is loaded, where it is not this version's, and where the lock is not to be had: the message
    names who holds it.

    Privileges: those of the pins' owner to change it, with CAP_BPF for whatever changes bindings; those of their group
    to read. Linux 5.17 (ingress_ifindex).

    Attributes: cookie, of the namespace; state, what the dispatcher has been told (fastrecv.state.State); program,
    attached; sockets, a SOCKMAP.
    """

    def __init__(
        self,
        netns: PathLike | None = None,
        *,
        bpffs: PathLike = BPFFS,
        read_only: bool = False,
        timeout: float = 10.0,
        adopt: bool = False,
    ) -> None:
        """Open what `load` has loaded."""
        with contextlib.closing(Namespace.open(netns)) as namespace:
            self.cookie = namespace.cookie
        self._directory = directory_of(pins.checked_root(Path(bpffs)), self.cookie)
        self._read_only = read_only
        self._held = contextlib.ExitStack()
        try:
            self._lock(timeout)
            self._read(adopt)
        except BaseException:
            self._held.close()
            raise

    def _lock(self, timeout: float) -> None:
        try:
            self._held.enter_context(pins.locked(self._directory, exclusive=not self._read_only, timeout=timeout))
            (self._directory / "link").lstat()
        except FileNotFoundError:
            raise StateError("no dispatcher is loaded in this network namespace: `fastrecv lookup load`") from None

    def _read(self, adopt: bool) -> None:
        self._link = self._linked()
        self._generation = self._in_force()
        self.program = Program.open(self._generation / "program", read_only=self._read_only)
        self._held.callback(self._close_program)
        self.state = State.decode(pins.read_document(self._generation / "document"))
        self.sockets, self._counts = self._maps()
        self._check(adopt)
        self._members = Members(self.sockets)
        if not self._read_only:
            self._heal()

    def _linked(self) -> Link | None:
        """The link, which the kernel opens to nobody who may not change it; None for a mere reader."""
        try:
            link = self._held.enter_context(Link.open(self._directory / "link"))
        except BpfError as error:
            if self._read_only and error.errno in (EACCES, EPERM):
                return None
            raise
        if link.info.netns_inode == 0:
            raise StateError(f"the program was detached by other means: {ANEW}")
        return link

    def _in_force(self) -> Path:
        """The generation that `current` leads to, unless a process was killed before it turned that to the attached."""
        current = self._directory / (self._directory / "current").readlink()
        if self._link is not None:
            attached = self._link.info.program_id
            for entry in self._directory.glob(generations.PATTERN):
                if entry.name != current.name and generations.holds(entry, attached):
                    return entry
        return current

    def _heal(self) -> None:
        """Finish, or take back, what a killed process has left half-way."""
        name = self._generation.name
        if (self._directory / "current").readlink().name != name:
            pins.point(self._directory / "current", name)
        for entry in [*self._directory.glob(generations.PATTERN), *self._directory.rglob("*-new")]:
            if entry.name != name:
                pins.remove(entry)

    def _check(self, adopt: bool) -> None:
        info = self.program.info
        if adopt:
            return
        if self._link is not None and self._link.info.program_id != info.id:
            raise StateError(
                f"program {self._link.info.program_id} stands in the dispatcher's link instead of {info.id}: somebody "
                "has replaced it. `fastrecv lookup upgrade` puts this version's in its place"
            )
        if info.tag != self.state.tag:
            raise StateError(f"the program has tag {info.tag}, its state was written for {self.state.tag}: {ANEW}")
        if not self._read_only and self.state.program != bpf.digest("lookup"):
            raise StateError(
                f"program {info.tag} was loaded by fastrecv {self.state.version}, and this fastrecv "
                f"({version('fastrecv')}) has another: `fastrecv lookup upgrade` replaces it, and keeps all else"
            )

    def _maps(self) -> Iterator[Map]:
        with bpf.packaged("lookup") as layout:
            dtypes = {name: layout.maps[name].value_dtype for name in ("sockets", "counts")}
        for name, dtype in dtypes.items():
            try:
                opened = Map.open(self._directory / name, np.uint32, dtype, read_only=self._read_only)
            except ValueError as error:
                raise StateError(f"its map {name} is of another layout ({error}): {ANEW}") from None
            yield self._held.enter_context(opened)

    def _close_program(self) -> None:
        self.program.close()  # not the first one, where a change has put another in its place

    def close(self) -> None:
        """Let the lock go. Everything stays as it is, and in force."""
        self._held.close()

    # What stands

    @property
    def link(self) -> LinkInfo | None:
        """What the kernel says of the link; None for readers who may not open it."""
        return self._link.info if self._link is not None else None

    @property
    def bindings(self) -> list[Binding]:
        return self.state.bindings

    def serving(self) -> list[Serving]:
        """Every destination, with its sockets and counters."""
        numbers = self.state.numbers
        counts = self._counts.lookup(np.fromiter(numbers.values(), np.uint32, len(numbers)))
        members = self._members.present(numbers.values())
        bound = self.state.bound()
        return [
            Serving(destination, bound[destination], members.get(number, []),
                    {name: int(row[name].sum()) for name in COUNTERS})
            for (destination, number), row in zip(numbers.items(), counts, strict=True)
        ]  # fmt: skip

    def sockets_of(self, destination: Destination) -> list[int]:
        """Cookies of the members of a destination; the first is the one that packets are given to."""
        number = self.state.numbers.get(destination)
        return [] if number is None else list(self._members.places(number).values())

    # What changes

    def replace_bindings(self, bindings: Sequence[Binding]) -> Change:
        """Put these bindings in the place of all that are there; atomic for the packets.

        RuleSetError, with nothing changed, where they cannot be compiled.
        """
        self._writable()
        state = copy.copy(self.state)
        change = state.replace(bindings)
        if change.added or change.removed:
            self._put_in_force(state, bindings)
        return change

    def compare(self, bindings: Sequence[Binding]) -> Change:
        """What replace_bindings would do; it is tried as far as can be without doing it. RuleSetError."""
        state = copy.copy(self.state)
        change = state.replace(bindings)
        state.number(bindings, set(self._members.present(state.numbers.values())))
        compile_rules(bindings, state.numbers)
        return change

    def bind(self, *bindings: Binding) -> Change:
        """Add bindings. One that differs from a present one only in its label, or in on_miss, takes its place."""
        named = {key_of(binding) for binding in bindings}
        return self.replace_bindings([*(row.binding for row in self.state.rows if row.key not in named), *bindings])

    def unbind(self, *bindings: Binding) -> Change:
        """Remove bindings. StateError, with nothing changed, where one is not there or leads to another label."""
        present = {row.key: row.label for row in self.state.rows}
        for binding in bindings:
            key = key_of(binding)
            if key not in present:
                raise StateError(f"not bound: {ruletext.text(binding)}")
            if present[key] != binding.label:
                raise StateError(f"not bound: {ruletext.text(binding)}; that is bound to {present[key] or DROP}")
        named = {key_of(binding) for binding in bindings}
        return self.replace_bindings([row.binding for row in self.state.rows if row.key not in named])

    def upgrade(self) -> None:
        """Put this version's program in the place of the attached one: bindings, sockets and counters stay."""
        self._writable()
        self._put_in_force(copy.copy(self.state), self.state.bindings)

    def register(self, label: str, sockets: Iterable[socket.socket], *, add: bool = False) -> list[Destination]:
        """Make sockets those of a label: for each family and protocol one, or the members of one reuseport group.

        MEMBERS of a group are kept: one is enough to enter it, the others stand in when that one is closed. What the
        label had for the same family and protocol goes, or stays with `add`. A dual-stack socket serves IPv4, too,
        where no IPv4 socket is given. The caller keeps its sockets; they serve as long as any process holds them.

        SocketRefusedError, with nothing changed, where one cannot be taken. Takes write access to the pins, and CAP_BPF
        where the label is neither bound nor registered yet.
        """
        self._writable()
        check_label(label)
        given = listeners.by_destination(label, sockets, self.cookie)
        found = {destination: self._members.fitting(group) for destination, group in given.items()}
        if add:
            for destination in found.keys() & self.state.numbers.keys():
                self._members.room(self.state.numbers[destination], found[destination])
        state = copy.copy(self.state)
        new = state.add(found)
        if new:
            self._clean(new.values())
            pins.write_document(state.encode(), self._generation / "document")
            self.state = state
        numbers = self.state.numbers
        for destination, group in found.items():
            self._members.put(numbers[destination], group, add)
        return list(found)

    def unregister(self, label: str, family: int | None = None, protocol: int | None = None) -> list[Destination]:
        """Forget the sockets of a label, of one family (AF_*) or protocol (IPPROTO_*) only where given."""
        self._writable()
        wanted = {
            name: number for name, number in self.state.numbers.items()
            if name.label == label and family in (None, name.family) and protocol in (None, name.protocol)
        }  # fmt: skip
        gone = [name for name, number in wanted.items() if self._members.places(number)]
        if not gone:
            raise StateError(f"no socket is registered there for {label!r}")
        for name in gone:
            self._members.clear(wanted[name])
        return gone

    def _writable(self) -> None:
        if self._read_only:
            raise StateError("the dispatcher was opened read-only")

    def _put_in_force(self, state: State, bindings: Sequence[Binding]) -> None:
        """Build the next generation, and let it take over."""
        registered = set(self._members.present(state.numbers.values()))
        self._clean(state.number(bindings, registered).values())
        generation = generations.following(self._generation)
        with bpf.packaged("lookup") as lookup:
            lookup.maps["sockets"].reuse(self.sockets)
            lookup.maps["counts"].reuse(self._counts)
            generations.build(generation, lookup, bindings, state)
            assert self._link is not None  # only readers have none
            self._link.update(lookup.programs["lookup"])
        pins.point(self._directory / "current", generation.name)
        pins.remove(self._generation)
        self._generation, self.state = generation, state
        self.program.close()
        self.program = Program.open(generation / "program")

    def _clean(self, numbers: Iterable[int]) -> None:
        """Numbers that are given out begin at nothing."""
        rows = np.fromiter(numbers, np.uint32)
        self._counts.update(rows, np.zeros((len(rows), *self._counts.value_shape), self._counts.value_dtype))


def directory_of(root: Path, cookie: int) -> Path:
    """Where the state of the namespace with this cookie lies."""
    return root / f"lookup-{cookie}"
