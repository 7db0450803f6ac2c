"""What a service is told by a file, the environment and the command line, by the same names; and which of them said it.

The setting receive_buffer is `receive-buffer` in a TOML file, FASTRECV_RECEIVE_BUFFER in the environment and
`--receive-buffer` on the command line. The command line comes before the environment, the environment before the file;
each limit counts as a setting of its own.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

import msgspec

from fastrecv.workers.settings import SettingError, Settings

__all__ = ["FILE", "PREFIX", "Config", "ConfigError", "Given", "gathered"]

PREFIX = "FASTRECV_"
FILE = f"{PREFIX}CONFIG"
"""Of the environment: the path of the file, where the command line gives none."""
_FIELDS = {field.name: field for field in msgspec.structs.fields(Settings)}
_KEYS = {field.encode_name: name for name, field in _FIELDS.items()}
_VARIABLES = {f"{PREFIX}{name.upper()}": name for name in _FIELDS}
_LIMITS = "limits"
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text in quotes"}
_LIKE = 0.85  # of a variable, to be taken for a mistyped one: others may have names that begin like ours


class ConfigError(ValueError):
    """What a service has been told makes no sense; the message names the source and the key, in one line."""


class Given(NamedTuple):
    """A value, as it was given. source : the file, the variable or the option. label : what errors call it."""

    value: Any
    source: str
    label: str


class Config(NamedTuple):
    """Settings, and who has given those that are not the defaults: by name, limits as limits.nofile."""

    settings: Settings
    given: dict[str, Given]

    def explained(self, error: SettingError) -> str:
        """The error in terms of who has given the setting."""
        return _explained(self.given, error)

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """Each setting as a file has it: key, value, source."""
        for name, field in _FIELDS.items():
            if name != _LIMITS:
                yield field.encode_name, getattr(self.settings, name), self.source_of(name)
        for limit, value in self.settings.limits.items():
            yield f"{_LIMITS}.{limit}", value, self.source_of(f"{_LIMITS}.{limit}")

    def source_of(self, name: str) -> str:
        """The file, variable or option that gave a setting; else the word default."""
        return self.given[name].source if name in self.given else "default"


def gathered(
    options: Mapping[str, Any], file: str | None = None, environment: Mapping[str, str] = os.environ
) -> Config:
    """The settings that hold. ConfigError.

    options : of the command line, by the names of Settings; None where one was not given; limits as words like
    "nofile=1024". file : its path; None: that of FASTRECV_CONFIG, if any. An empty variable is as one that is not set.
    """
    path = file or environment.get(FILE)
    given = dict(_of_file(path)) if path else {}
    given.update(_of_environment(environment))
    given.update(_of_options(options))
    if "handler" not in given:
        raise ConfigError(
            f"Missing argument PACKAGE.MODULE:NAME: give it, {PREFIX}HANDLER, or handler in the file of --config"
        )
    values: dict[str, Any] = {}
    for name, found in given.items():
        setting, dot, limit = name.partition(".")
        if dot:
            values.setdefault(setting, {})[limit] = found.value
        else:
            values[setting] = found.value
    try:
        return Config(Settings(**values), given)
    except SettingError as error:
        raise ConfigError(_explained(given, error)) from None


def _explained(given: Mapping[str, Given], error: SettingError) -> str:
    return f"{given[error.name].label if error.name in given else error.name}: {error.reason}"


def _of_file(path: str) -> Iterator[tuple[str, Given]]:
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError
        raise ConfigError(f"{path}: is not TOML: {error}") from None
    for key, value in document.items():
        name = _KEYS.get(key)
        if name is None:
            raise ConfigError(f"{path}: unknown key {key!r}{_meant(key, _KEYS)}")
        label = f"{path}: {key}"
        if name != _LIMITS:
            yield name, Given(_converted(name, value, label, strict=True), path, label)
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{label}: {value!r} is not a table of limits, like [limits] with nofile = 1024")
        for limit, most in value.items():
            within = f"{label}.{limit}"
            if type(most) not in (int, str):
                raise ConfigError(f"{within}: {most!r} is not a whole number, or text in quotes")
            yield f"{_LIMITS}.{limit}", Given(most, path, within)


def _of_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, Given]]:
    for variable, value in environment.items():
        name = _VARIABLES.get(variable)
        if name is None:
            if variable.startswith(PREFIX) and variable != FILE and (meant := _meant(variable, _VARIABLES, _LIKE)):
                raise ConfigError(f"unknown variable {variable}{meant}")
        elif name == _LIMITS:
            yield from _limits(value.split(",") if value else [], variable)
        elif value:
            yield name, Given(_converted(name, value, variable, strict=False), variable, variable)


def _of_options(options: Mapping[str, Any]) -> Iterator[tuple[str, Given]]:
    for name, value in options.items():
        if name == _LIMITS:
            yield from _limits(value, "--limit")
        elif value is not None:
            option = "PACKAGE.MODULE:NAME" if name == "handler" else f"--{_FIELDS[name].encode_name}"
            yield name, Given(value, option, option)


def _limits(words: Iterable[str], source: str) -> Iterator[tuple[str, Given]]:
    """Of words like nofile=1024."""
    for word in words:
        name, equals, value = word.strip().partition("=")
        if not equals:
            raise ConfigError(f"{source}: {word!r} is no limit: give one like nofile=1024")
        yield f"{_LIMITS}.{name}", Given(value, source, f"{source}: {name}")


def _converted(name: str, value: object, label: str, *, strict: bool) -> Any:
    kinds = [kind for kind in get_args(_FIELDS[name].type) or (_FIELDS[name].type,) if kind is not NoneType]
    if get_origin(_FIELDS[name].type) is Literal:
        if value not in kinds:
            raise ConfigError(f"{label}: {value!r} is none of {', '.join(kinds)}")
        return value
    try:
        return msgspec.convert(value, kinds[0], strict=strict)
    except msgspec.ValidationError:
        raise ConfigError(f"{label}: {value!r} is not {_KINDS[kinds[0]]}") from None


def _meant(word: str, names: Iterable[str], like: float = 0.6) -> str:
    near = difflib.get_close_matches(word, list(names), 1, like)
    return f": did you mean {near[0]!r}?" if near else ""
