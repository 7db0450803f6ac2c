"""Handlers: the code of a service, found by "package.module:name" and given batches, or sockets.

- a function handle(batch), plain or async;
- a class, made once a worker, with handle(batch) and, where it has them, start() and stop(); async or not, each;
- a function called serve, or a class with serve(sockets): a loop of its own, for what receives no batches, TCP say. It
  is told to stop by SIGTERM, and returns when it receives, or accepts, nothing more: from then on its successor does.

What is accepted is the worker's own: a serve() that is to finish it does so before it returns, and meanwhile
connections wait in the listener's queue; a class may do it in stop(), while the successor accepts already. Either has
the graceful timeout. The sockets may be closed, but not shut down: the supervisor and the successor have the same.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
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

    @property
    def asynchronous(self) -> bool:
        """Whether it needs an event loop."""
        return any(map(inspect.iscoroutinefunction, (self.handle, self.serve, self.start, self.stop)))


async def called(function: Callable[..., Any] | None, *arguments: object) -> None:
    """Call what may be async, or not be there."""
    if function is not None:
        result = function(*arguments)
        if isinstance(result, Awaitable):
            await result


def load(name: str) -> Handler:
    """Import a handler and, where it is a class, make it. HandlerError."""
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        raise HandlerError(f"{name!r} names no handler: give package.module:name")
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
    except Exception as error:  # whatever the code of others raises
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
    except Exception as error:  # whatever the code of others raises
        raise HandlerError(f"{name!r} cannot be made: {in_one_line(error)}") from error
    handle, serve = getattr(made, "handle", None), getattr(made, "serve", None)
    if callable(handle) == callable(serve):
        raise HandlerError(f"{name!r} has {'both' if callable(handle) else 'neither'} handle and serve: give it one")
    start, stop = getattr(made, "start", None), getattr(made, "stop", None)
    if serve is not None:
        return Handler(serve=_taking(name, serve, "sockets"), start=start, stop=stop)
    assert handle is not None
    return Handler(handle=_taking(name, handle, "batch"), start=start, stop=stop)


def _taking(name: str, function: Callable[..., Any], argument: str) -> Callable[..., Any]:
    """The function, which takes one argument. HandlerError."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise HandlerError(f"{name!r} must take one argument, the {argument}") from None
    except ValueError:  # a function of C that does not say
        pass
    return function
