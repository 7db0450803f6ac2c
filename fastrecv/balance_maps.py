"""The kernel's part of a balancer: the program bpf/balance.bpf.c, its maps and two bucket tables, made or opened."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from fastrecv import bpf, buckets, pins
from fastrecv.bpf import Map, Program
from fastrecv.buckets import Table
from fastrecv.closing import Closing
from fastrecv.errors import StateError
from fastrecv.policies import BUCKETS, Policy

__all__ = ["SLOTS", "Maps"]

SLOTS = 128  # of bpf/balance_maps.h
_NAMES = ("tables", "slots", "counts", "control", "weights", "places", "senders", "sampling", "choices")
_TABLES = ("table-0", "table-1")
_INDICES = np.arange(BUCKETS, dtype=np.uint32)
_EMPTY = {"drop": 0, "kernel": 1, "next": 2}


class Maps(Closing):
    """A context manager that holds them; what is attached or pinned goes on without it.

    Attributes: program. By their names in it: slots, counts, control, weights, places, senders,
    sampling, choices.
    """

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self._maps: dict[str, Map] = {}
        self.program: Program

    @classmethod
    def make(cls, policy: Policy, empty: str, senders: int, counting: bool = True) -> Self:
        """Load a program for a policy. CAP_BPF.

        senders : so many at most are known while slots are drained sender by sender; 0: slots are drained by table.
        """
        made = cls()
        try:
            loaded = made._held.enter_context(bpf.packaged("balance"))
            loaded.maps["senders"].max_entries = max(2 * senders, 1)  # LRU lists keep a part of their entries free
            loaded.set(empty=_EMPTY[empty], tracking=senders > 0, counting=counting, **policy.settings())
            loaded.load()
            made._maps = {name: loaded.maps[name] for name in _NAMES}
            for name in _TABLES:
                made._maps[name] = made._held.enter_context(Map.array("table", np.uint32, BUCKETS))
            made.program = loaded.programs["balance"]
            made.turn_to(np.full(BUCKETS, buckets.EMPTY, np.uint16))
        except BaseException:
            made.close()
            raise
        return made

    @classmethod
    def open(cls, directory: Path, *, read_only: bool) -> Self:
        """Open what `pin` has pinned. Read permission on the pins is enough to read."""
        opened = cls()
        try:
            for name, dtypes in _dtypes().items():
                found = Map.open(directory / name, *dtypes, read_only=read_only)
                opened._maps[name] = opened._held.enter_context(found)
            opened.program = opened._held.enter_context(Program.open(directory / "program", read_only=read_only))
        except ValueError as error:
            opened.close()
            raise StateError(f"{directory} has maps of another layout ({error}): destroy it, create it anew") from None
        except BaseException:
            opened.close()
            raise
        return opened

    @classmethod
    def inherit(cls, descriptors: Mapping[str, int]) -> Self:
        """Those of `descriptors`, which are its own from now on."""
        found = cls()
        try:
            for name, dtypes in _dtypes().items():
                found._maps[name] = found._held.enter_context(Map.inherited(descriptors[name], *dtypes))
            found.program = found._held.enter_context(Program.inherited(descriptors["program"]))
        except BaseException:
            found.close()
            raise
        return found

    def descriptors(self) -> dict[str, int]:
        """Of all of it, by name; they stay its own."""
        return {name: found.fileno() for name, found in self._maps.items()} | {"program": self.program.fileno()}

    def pin(self, directory: Path) -> None:
        """Pin all of it. CAP_BPF."""
        for name, found in self._maps.items():
            pins.pin(found, directory / name)
        pins.pin(self.program, directory / "program")

    def __getitem__(self, name: str) -> Map:
        return self._maps[name]

    def close(self) -> None:
        self._held.close()

    def table(self) -> Table:
        """The slot of every bucket, as is in force."""
        return self._in_force().lookup(_INDICES).astype(np.uint16)

    def turn_to(self, table: Table) -> None:
        """Put a table in force for every packet at once; nobody uses the old one any more when this returns."""
        following = self._maps[_TABLES[0]]
        with contextlib.suppress(KeyError):  # the first time, none is in force
            if self._in_force() is following:
                following = self._maps[_TABLES[1]]
        following.update(_INDICES, table.astype(np.uint32))
        outer = self._maps["tables"]
        # Atomic, and it returns after a grace period of RCU: who still ran with the other table has ended.
        outer.update([0], np.array([following.fileno()], np.uint32).view(outer.value_dtype))

    def _in_force(self) -> Map:
        outer = self._maps["tables"]
        number = int(np.atleast_1d(outer[0]).view(np.uint32)[0])
        (found,) = (self._maps[name] for name in _TABLES if self._maps[name].id == number)
        return found


def _dtypes() -> dict[str, tuple[np.dtype[Any], np.dtype[Any]]]:
    """Of keys and values of all maps."""
    with bpf.packaged("balance") as layout:
        found = {name: (layout.maps[name].key_dtype, layout.maps[name].value_dtype) for name in _NAMES}
    numbers = np.dtype(np.uint32), np.dtype(np.uint32)
    return found | dict.fromkeys(("tables", *_TABLES), numbers)
