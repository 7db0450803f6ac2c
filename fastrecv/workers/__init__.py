"""Worker processes whose sockets outlive them: a supervisor owns the sockets, workers read them, one reader each.

A worker that dies leaves its queue in the kernel, and its replacement reads it. `fastrecv run` is the command; in a
program of one's own:

    sys.exit(Supervisor(Settings(handler="mypkg.collector:handle", bind="0.0.0.0:2055", workers=4)).run())

Whoever may run code in a worker may do to its socket what its owner may: connect it, or detach the group's program.
The supervisor puts that right within a second or two (fastrecv/workers/guarding.py).
"""

from typing import TYPE_CHECKING

from fastrecv.workers.settings import Settings

if TYPE_CHECKING:
    from fastrecv.workers.supervisor import Supervisor

__all__ = ["Settings", "Supervisor"]


def __getattr__(name: str) -> object:
    if name == "Supervisor":
        from fastrecv.workers.supervisor import Supervisor  # noqa: PLC0415 - workers begin sooner without it

        return Supervisor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
