"""Bindings as people write them: words of a command line, entries of a JSON or TOML file; and back."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import tomllib
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network
from pathlib import Path
from typing import Literal

import msgspec

from fastrecv.rules import Binding, RuleSetError
from fastrecv.state import DROP, check_label

__all__ = [
    "STDIN",
    "Protocol",
    "binding",
    "dumped",
    "interface_index",
    "interface_name",
    "ports",
    "ports_text",
    "prefix",
    "read_file",
    "text",
]

Protocol = Literal["tcp", "udp", "any"]
Network = IPv4Network | IPv6Network
_ANY_PORT = (0, 65535)
STDIN = Path("-")
_LIKE_PORTS = re.compile(r"[0-9]{1,5}(-[0-9]{1,5})?")


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A binding in a file."""

    label: str
    protocol: str
    prefix: str
    port: int | str
    source: str | None = None
    interface: int | str | None = None
    on_miss: Literal["drop", "pass"] = "drop"


class _File(msgspec.Struct, forbid_unknown_fields=True):
    bindings: list[_Entry]


def prefix(word: str) -> IPv4Network | IPv6Network:
    """192.0.2.0/24, or one address. RuleSetError with what is meant where an address inside the prefix is given."""
    address, _, length = word.partition("/")
    if word in ("0.0.0.0", "::"):  # noqa: S104 - somebody means every address
        raise RuleSetError(f"{word!r} is one address that no packet is for: give {word}/0 for every address")
    try:  # half the time that ip_network takes
        if ":" in address:
            found: Network = IPv6Network((socket.inet_pton(socket.AF_INET6, address), _length(length)))
        else:
            found = IPv4Network((socket.inet_pton(socket.AF_INET, address), _length(length)))
    except (OSError, ValueError):
        found = _prefix(word)
    if isinstance(found, IPv6Network) and found.network_address.ipv4_mapped is not None and found.prefixlen >= 96:
        meant4 = IPv4Network((int(found.network_address) & 0xFFFFFFFF, found.prefixlen - 96))
        raise RuleSetError(f"{word!r}: packets come with IPv4 addresses, give {meant4}")
    return found


def _length(word: str) -> int:
    return int(word) if word.isdecimal() else -1  # int() takes more: "+8", "1_6"


def _prefix(word: str) -> Network:
    """What is not an address and a length in digits: the address alone, a netmask, or a mistake."""
    if "%" in word:
        raise RuleSetError(f"{word!r} has a zone: leave %... out, and give the interface by itself")
    try:
        return ip_network(word)
    except ValueError:
        try:
            meant = ip_interface(word).network
        except ValueError:
            raise RuleSetError(f"{word!r} is no prefix: give one like 192.0.2.0/24 or 2001:db8::/32") from None
        raise RuleSetError(f"{word!r} has bits below its prefix: {meant} is the prefix") from None


def ports(word: str | int) -> tuple[int, int]:
    """80, 8000-8999 or any."""
    if word == "any":
        return _ANY_PORT
    first, _, last = str(word).partition("-")
    if _LIKE_PORTS.fullmatch(str(word)):
        found = int(first), int(last or first)
        if found[0] <= found[1] <= 65535 and found != (0, 0):
            return found
    raise RuleSetError(f"{word!r} is no port: give one from 1 to 65535, a range like 8000-8999, or any")


def interface_index(word: str | int) -> int:
    """The index of an interface of the calling thread's namespace, by its name or itself."""
    with contextlib.suppress(OSError, ValueError, OverflowError):  # more digits than int() takes, a NUL in a name
        if isinstance(word, str) and not word.isdecimal():
            return socket.if_nametoindex(word)
        socket.if_indextoname(int(word))
        return int(word)
    raise RuleSetError(f"there is no interface {word!r}: give its name or index")


def interface_name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return str(index)


def binding(
    label: str, protocol: Protocol, prefix: Network, ports: tuple[int, int], source: Network | None,
    interface: str | int | None, on_miss: Literal["drop", "pass"],
) -> Binding:  # fmt: skip
    """A binding whose label may be the verdict "drop", and whose interface is one of the calling thread's namespace."""
    return Binding(protocol, prefix, ports, None if label == DROP else label, source,
                   0 if interface is None else interface_index(interface), on_miss)  # fmt: skip


def read_file(path: Path) -> list[Binding]:
    """The bindings of a JSON or (*.toml) TOML file, or of JSON on STDIN. RuleSetError says which is wrong and how."""
    try:
        data = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        if path.suffix == ".toml":
            content = msgspec.convert(tomllib.loads(data.decode()), _File)
        else:
            content = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: what TOML and UTF-8 can be
        read_as = "" if path.suffix in (".json", ".toml") else " (read as JSON; the name of a TOML file ends in .toml)"
        raise RuleSetError(f"{path}: {error}{read_as}") from None
    found = []
    for number, entry in enumerate(content.bindings):
        try:
            if entry.label != DROP:
                check_label(entry.label)
            found.append(binding(
                entry.label, _protocol(entry.protocol), prefix(entry.prefix), ports(entry.port),
                None if entry.source is None else prefix(entry.source), entry.interface, entry.on_miss,
            ))  # fmt: skip
        except RuleSetError as error:
            raise RuleSetError(f"{path}, bindings[{number}]: {error}") from None
    return found


def _protocol(word: str) -> Protocol:
    if word not in ("tcp", "udp", "any"):
        raise RuleSetError(f"{word!r} is no protocol: give tcp, udp or any")
    return word  # type: ignore[return-value] # one of the three


def ports_text(found: tuple[int, int]) -> str:
    first, last = found
    return "any" if found == _ANY_PORT else str(first) if first == last else f"{first}-{last}"


def text(bound: Binding) -> str:
    """A binding in the words that `bind` takes."""
    words = [bound.label or DROP, bound.protocol, str(bound.prefix), ports_text(bound.ports)]
    if bound.source is not None:
        words += ["--source", str(bound.source)]
    if bound.interface:
        words += ["--interface", interface_name(bound.interface)]
    if bound.on_miss == "pass":
        words += ["--on-miss", "pass"]
    return " ".join(words)


def dumped(bindings: Iterable[Binding]) -> dict[str, object]:
    """Bindings as `read_file` reads them."""
    entries = [
        _Entry(
            bound.label or DROP, bound.protocol, str(bound.prefix),
            bound.ports[0] if bound.ports[0] == bound.ports[1] else ports_text(bound.ports),
            None if bound.source is None else str(bound.source),
            interface_name(bound.interface) if bound.interface else None, bound.on_miss,
        )
        for bound in bindings
    ]  # fmt: skip
    built = msgspec.to_builtins(_File(entries))
    assert isinstance(built, dict)
    return built
