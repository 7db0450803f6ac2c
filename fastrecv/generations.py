"""Generations of a dispatcher's rule set: each a pinned instance of the program, and the document it was built by."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from fastrecv import bpf, pins
from fastrecv.bpf import Object, Program
from fastrecv.rules import Binding, compile_rules
from fastrecv.state import State

__all__ = ["PATTERN", "build", "first", "following", "holds"]

_STEM = "generation-"
PATTERN = f"{_STEM}*"


def first(directory: Path) -> Path:
    return directory / f"{_STEM}1"


def following(generation: Path) -> Path:
    return generation.with_name(f"{_STEM}{int(generation.name.removeprefix(_STEM)) + 1}")


def build(generation: Path, lookup: Object, bindings: Sequence[Binding], state: State) -> None:
    """Compile and load a rule set, and pin it with its document; leaves nothing when it fails.

    lookup : the object `lookup`, opened, its maps `sockets` and `counts` sized or shared. state : says what it is built
    from, which is written into it.
    """
    compile_rules(bindings, state.numbers).load(lookup)
    program = lookup.programs["lookup"]
    state.version, state.program, state.tag = version("fastrecv"), bpf.digest("lookup"), program.info.tag
    pins.remove(generation)
    pins.make(generation)
    try:
        pins.pin(program, generation / "program")
        pins.write_document(state.encode(), generation / "document")
    except BaseException:
        pins.remove(generation)
        raise


def holds(generation: Path, program: int) -> bool:
    """Whether this is a whole generation, and its program the one with that id."""
    if not ((generation / "program").exists() and (generation / "document").exists()):
        return False
    with Program.open(generation / "program") as pinned:
        return pinned.info.id == program
