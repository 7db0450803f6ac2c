"""Handlers: the code of a service, found by "package.module:name" and given batches, or sockets.

- a function handle(batch), plain or async; async ones run on asyncio, or on uvloop where their module calls
  uvloop.install();
- a class, made once a worker, with handle(batch) and, where it has them, start() and stop(); async or not, each;
- such a class with snapshot() and restore(data), async or not, whose state outlives it: what snapshot returns after a
  batch, bytes, or None where nothing has changed since, is given to the restore of the next worker at the same socket,
  when all others have stopped for good and before its first batch. Its stop() is called before the last snapshot;
- a function called serve, or a class with serve(sockets): a loop of its own, for what receives no batches, TCP say. It
  is told to stop by SIGTERM, and returns when it receives, or accepts, nothing more: from then on its successor does.

What is accepted is the worker's own: a serve() that is to finish it does so before it returns, and meanwhile
connections wait in the listener's queue; a class may do it in stop(), while the successor accepts already. Either has
the graceful timeout. The sockets may be closed, but not shut down: the supervisor and the successor have the same.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Handler", "HandlerError", "called", "in_one_line", "load"]


class HandlerError(Exception):
    """What was named is no handler; the message says in one line why."""


@dataclass(frozen=True)
class Handler:
    """What a worker calls. Just one of handle and serve is there."""

    handle: Callable[[Any], Any] | None = None
    serve: Callable[[Any], Any] | None = None
    start: Callable[[], Any] | None = None
    stop: Callable[[], Any] | None = None
    snapshot: Callable[[], Any] | None = None
    restore: Callable[[Any], Any] | None = None

    @property
    def asynchronous(self) -> bool:
        """Whether it needs an event loop."""
        functions = (self.handle, self.serve, self.start, self.stop, self.snapshot, self.restore)
        return any(map(inspect.iscoroutinefunction, functions))

    @property
    def stateful(self) -> bool:
        """Whether its state outlives the worker."""
        return self.snapshot is not None


async def called(function: Callable[..., Any] | None, *arguments: object) -> Any:
    """What a function returns that may be async, or not be there. RuntimeError where it awaits what is cancelled."""
    result = None if function is None else function(*arguments)
    try:
        return await result if isinstance(result, Awaitable) else result
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RuntimeError("it has awaited what was cancelled") from error  # an error as others are, not our own end


def load(name: str) -> Handler:
    """Import a handler and, where it is a class, make it. HandlerError."""
    module, _, attribute = name.partition(":")
    found: Any = _imported(name, module)
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise HandlerError(f"{name!r}: {module} has no {attribute!r}") from None
    if inspect.isclass(found):
        return _of_class(name, found)
    if not callable(found):
        raise HandlerError(f"{name!r} is {type(found).__name__}, not a function or a class")
    if getattr(found, "__name__", "") == "serve":
        return Handler(serve=_taking(name, found, "sockets"))
    return Handler(handle=_taking(name, found, "batch"))


def _imported(name: str, module: str) -> object:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise HandlerError(f"{name!r}: there is no module {error.name!r} on {_path()}") from None
        raise HandlerError(f"{name!r} cannot be imported: {in_one_line(error)}") from error
    except (Exception, SystemExit) as error:  # whatever the code of others raises
        raise HandlerError(f"{name!r} cannot be imported: {in_one_line(error)}") from error


def _path() -> str:
    return f"the path of {sys.executable} (PYTHONPATH, or the folder that the command was called in)"


def in_one_line(error: BaseException) -> str:
    """An exception in one line, with where it was raised."""
    trace, where = error.__traceback__, ""
    while trace is not None:
        where = f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})"
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        where = ""  # its own words have it
    return " ".join(f"{type(error).__name__}: {error}{where}".split())


def _of_class(name: str, kind: type) -> Handler:
    try:
        made = kind()
    except (Exception, SystemExit) as error:  # whatever the code of others raises
        raise HandlerError(f"{name!r} cannot be made: {in_one_line(error)}") from error
    handle, serve = getattr(made, "handle", None), getattr(made, "serve", None)
    if callable(handle) == callable(serve):
        which = "both handle and serve" if callable(handle) else "neither handle nor serve"
        raise HandlerError(f"{name!r} has {which}: give it one")
    start, stop = getattr(made, "start", None), getattr(made, "stop", None)
    snapshot, restore = getattr(made, "snapshot", None), getattr(made, "restore", None)
    if serve is not None:
        if snapshot is not None or restore is not None:
            raise HandlerError(f"{name!r} has serve, whose state is not kept: leave snapshot and restore out")
        return Handler(serve=_taking(name, serve, "sockets"), start=start, stop=stop)
    assert handle is not None
    handler = Handler(handle=_taking(name, handle, "batch"), start=start, stop=stop)
    if snapshot is None and restore is None:
        return handler
    if snapshot is None or restore is None:
        one, other = ("snapshot", "restore") if restore is None else ("restore", "snapshot")
        raise HandlerError(f"{name!r} has {one} and no {other}: give it both, or neither")
    snapshot, restore = _taking(f"{name}.snapshot", snapshot), _taking(f"{name}.restore", restore, "data")
    return replace(handler, snapshot=snapshot, restore=restore)


def _taking(name: str, function: Callable[..., Any], argument: str | None = None) -> Callable[..., Any]:
    """The function, which takes this argument and no other. HandlerError."""
    arguments = () if argument is None else (argument,)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise HandlerError(f"{name!r} is a generator, whose code would never run: leave yield out")
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        what = "no argument" if argument is None else f"one argument, the {argument}"
        raise HandlerError(f"{name!r} must take {what}") from None
    except ValueError:  # a function of C that does not say
        pass
    return function
