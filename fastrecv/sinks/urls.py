"""Sinks from text, for command lines and configuration files."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any
from urllib.parse import unquote

from fastrecv.sinks.arrow_files import ArrowFiles
from fastrecv.sinks.engine import Access
from fastrecv.sinks.interface import Sink
from fastrecv.sinks.jetstream import JetStream
from fastrecv.sinks.json_lines import JsonLines
from fastrecv.sinks.parquet import Parquet

__all__ = ["hidden", "parsed", "shown"]

_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([a-zA-Z]*)")

Option = tuple[str, Callable[[str], Any]]
"""The name of a constructor's argument, and what makes it of text; ValueError says what to give."""


def parsed(url: str) -> Sink:
    """The sink that a text names; not opened yet.

    jsonl:-, jsonl:/file, parquet:/folder?rotate=60s&size=64M, arrow:/folder?rotate=60s&size=64M&compression=lz4,
    nats://user:password@host:4222,host2:4222/prefix?spool=/folder&stream=NAME, or tls:// in place of nats:// to insist
    on TLS, and token@ in place of user:password@. The last has also spool-size=1G, full=block|drop-oldest, window=256,
    and the files nkey, ca, certificate, key. All have patience=5s.
    Options follow as ?name=value&name=value; %XX stands for a byte (RFC 3986).

    ValueError, in one line, for what is no sink, for unknown options and for values that make no sense.
    """
    scheme, colon, rest = url.partition(":")
    make = _SINKS.get(scheme)
    if not colon or make is None:
        raise ValueError(
            f"{shown(url)} is no sink{_meant(scheme, _SINKS)}: give {', '.join(f'{name}:...' for name in _SINKS)}"
        )
    try:
        return make(rest)
    except ValueError as error:
        raise ValueError(f"sink {shown(url)}: {error}") from None


def hidden(url: str) -> str:
    """Without credentials, which are nobody's who reads a log."""
    return re.sub("//.*@", "//...@", url)


def shown(url: str) -> str:
    """The same in quotes."""
    return repr(hidden(url))


def seconds(text: str) -> float:
    """Of 60, 60s, 500ms, 5m, 1h. ValueError."""
    return _measured(text, _SECONDS, "seconds like 60s, 5m, 1h")


def size(text: str) -> int:
    """Bytes of 65536, 64K, 64M, 1G, each 1,024 of the one before. ValueError."""
    return math.floor(_measured(text, _BYTES, "bytes like 64M, 1G"))


def whole(text: str) -> int:
    """A number. ValueError."""
    if not text.isdecimal():
        raise ValueError(f"{text!r}: give a whole number")
    return int(text)


def _measured(text: str, units: Mapping[str, float], examples: str) -> float:
    match = _NUMBER.fullmatch(text)
    if match is None or match[2] not in units:
        raise ValueError(f"{text!r}: give {examples}")
    return float(match[1]) * units[match[2]]


def options(query: str, known: Mapping[str, Option]) -> dict[str, Any]:
    """The arguments that the text behind the question mark stands for. ValueError."""
    found: dict[str, Any] = {}
    for word in filter(None, query.split("&")):
        name, equals, value = word.partition("=")
        if name not in known:
            raise ValueError(f"no option {name!r}{_meant(name, known)}: there are {', '.join(known)}")
        argument, convert = known[name]
        if not equals or argument in found:
            raise ValueError(
                f"option {name!r} {'is given twice' if equals else 'has no value'}: give {name}=VALUE once"
            )
        try:
            found[argument] = convert(unquote(value))
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    return found


def _meant(word: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(names), 1)
    return f", did you mean {near[0]!r}?" if near and near[0] != word else ""


_PATIENCE: dict[str, Option] = {"patience": ("patience", seconds)}
_ENGINE: dict[str, Option] = {
    "spool": ("spool", str),
    "stream": ("stream", str),
    "spool-size": ("spool_size", size),
    "full": ("full", str),
    "window": ("window", whole),
    "nkey": ("nkey", str),
    "ca": ("ca", str),
    "certificate": ("certificate", str),
    "key": ("key", str),
    **_PATIENCE,
}
_FILES: dict[str, Option] = {"rotate": ("rotate", seconds), "size": ("size", size), **_PATIENCE}


def _filed(make: Callable[..., Sink], known: Mapping[str, Option], what: str, rest: str) -> Sink:
    """A sink that is a path and options."""
    path, _, query = rest.partition("?")
    if not path:
        raise ValueError(f"has no path: give {what}")
    return make(unquote(path), **options(query, known))


def _jetstream(tls: bool, rest: str) -> Sink:
    place, _, query = rest.partition("?")
    authority, slash, prefix = place.removeprefix("//").partition("/")
    if not place.startswith("//") or not slash:
        raise ValueError("give nats://host:4222/prefix?spool=/folder")
    words = options(query, _ENGINE)
    if not words.get("spool"):  # an empty path is the folder where the process happens to be
        raise ValueError("has no spool: give spool=/folder, where messages wait while the engine is away")
    who, at, servers = authority.rpartition("@")
    user, colon, password = who.partition(":")
    names: dict[str, Any] = {}
    if at:
        names = {"user": unquote(user), "password": unquote(password)} if colon else {"token": unquote(user)}
    names |= {name: words.pop(name) for name in ("nkey", "ca", "certificate", "key") if name in words}
    access = Access([server for server in servers.split(",") if server], tls=tls, **names)
    return JetStream(access, unquote(prefix), words.pop("spool"), **words)


_SINKS: Mapping[str, Callable[[str], Sink]] = {
    "arrow": partial(_filed, ArrowFiles, _FILES | {"compression": ("compression", str)}, "arrow:/folder"),
    "jsonl": partial(_filed, JsonLines, _PATIENCE, "jsonl:- or jsonl:/file"),
    "nats": partial(_jetstream, False),
    "parquet": partial(_filed, Parquet, _FILES, "parquet:/folder"),
    "tls": partial(_jetstream, True),
}
