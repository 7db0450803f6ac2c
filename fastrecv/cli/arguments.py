"""What the commands take: words that make sense, or a usage error that says which would."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import grp
import math
import os
import re
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from fastrecv import balance_life, listeners, ruletext
from fastrecv.lookup import BPFFS, Dispatcher
from fastrecv.netns import Namespace
from fastrecv.policies import Policy
from fastrecv.rules import PROTOCOLS, RuleSetError
from fastrecv.state import DROP, check_label

__all__ = [
    "ADDRESS",
    "BPFFS_OPTION",
    "ENDPOINT",
    "GROUP_OPTION",
    "LABEL",
    "LABEL_OR_DROP",
    "NAME",
    "NETNS_OPTION",
    "POLICY",
    "PORTS",
    "PREFIX",
    "PROCESS",
    "Address",
    "entered",
    "one_socket",
    "place",
    "seconds",
    "with_port",
]

Address = IPv4Address | IPv6Address
_NS_GET_NSTYPE = 0xB703  # include/uapi/linux/nsfs.h
_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h


class _Name(click.ParamType[str]):
    """The name of a balancer."""

    name = "name"

    def convert(self, value: str, param: click.Parameter | None, context: click.Context | None) -> str:
        try:
            balance_life.check_name(value)
        except ValueError as error:
            self.fail(str(error), param, context)
        return value

    def shell_complete(self, context: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        with contextlib.suppress(OSError):
            present = balance_life.names(context.params.get("bpffs") or BPFFS)
            return [CompletionItem(name) for name in present if name.startswith(incomplete)]
        return []


class _Label(click.ParamType[str]):
    name = "label"

    def __init__(self, verdict: bool) -> None:
        self.verdict = verdict

    def convert(self, value: str, param: click.Parameter | None, context: click.Context | None) -> str:
        if not (self.verdict and value == DROP):
            try:
                check_label(value)
            except (RuleSetError, UnicodeEncodeError) as error:  # bytes of the command line that are no text
                self.fail(str(error), param, context)
        return value

    def shell_complete(self, context: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The labels of what is loaded, as far as the user may read it."""
        netns, bpffs = context.params.get("netns"), context.params.get("bpffs") or BPFFS
        labels: set[str] = set()
        with contextlib.suppress(OSError), Dispatcher(netns, bpffs=bpffs, read_only=True, timeout=0) as dispatcher:
            named = [row.label for row in dispatcher.state.rows] + [name for name, *_ in dispatcher.state.destinations]
            labels.update(label for label in named if label is not None and label.startswith(incomplete))
        return [CompletionItem(label) for label in sorted(labels)]


class _Words(click.ParamType[Any]):
    """A word that one function understands, and refuses by RuleSetError or ValueError."""

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        self.name, self._read = name, read

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._read(value)
        except (RuleSetError, ValueError) as error:
            self.fail(str(error), param, context)


def _address(word: str) -> Address:
    try:
        found = ip_address(word.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise RuleSetError(f"{word!r} is no IP address") from None
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        raise RuleSetError(f"{word!r}: packets come with IPv4 addresses, give {found.ipv4_mapped}")
    return found


_WITH_PORT = re.compile(r"\[(?P<six>[^\]]+)\](:(?P<port6>[0-9]{1,5}))?|(?P<four>[0-9.]+)(:(?P<port4>[0-9]{1,5}))?")


def _endpoint(word: str) -> tuple[Address, int]:
    """Address and port, 0 where none is given: 192.0.2.1:80, [2001:db8::1]:80, or an address alone."""
    match = _WITH_PORT.fullmatch(word)
    if match is None:
        try:
            return _address(word), 0
        except RuleSetError as error:
            raise RuleSetError(f"{error} (with a port: ADDRESS:PORT, or [ADDRESS]:PORT for IPv6)") from None
    port = int(match["port6"] or match["port4"] or 0)
    if port > 65535:
        raise RuleSetError(f"{word!r} has no port from 1 to 65535")
    return _address(match["six"] or match["four"]), port


def _process(word: str) -> int:
    """A process id, or the path of a file that holds one."""
    if not word:
        raise RuleSetError("'' is no process id: does it run?")
    try:
        text = word if word.isdecimal() else Path(word).read_text(errors="replace").strip()
    except OSError as error:
        raise RuleSetError(f"{word!r} is no process id, nor a file that holds one: {error.strerror}") from None
    if not text.isdecimal() or len(text) > 10 or not 0 < int(text) < 1 << 31:
        raise RuleSetError(f"{word!r} holds no process id")
    return int(text)


class _NamespacePath(click.Path):
    """A file that stands for a network namespace. PermissionError where it is not the user's to open."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        try:
            fd = os.open(value, os.O_RDONLY)
        except PermissionError:
            raise
        except OSError as error:
            self.fail(f"{value!r}: {error.strerror}", param, context)
        try:
            is_one = fcntl.ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET
        except OSError:
            is_one = False
        finally:
            os.close(fd)
        if not is_one:
            self.fail(
                f"{value!r} is no network namespace: /run/netns/NAME is one, /proc/PID/ns/net too", param, context
            )
        return value


LABEL = _Label(verdict=False)
LABEL_OR_DROP = _Label(verdict=True)
PREFIX: click.ParamType[IPv4Network | IPv6Network] = _Words("prefix", ruletext.prefix)
PORTS: click.ParamType[tuple[int, int]] = _Words("port", ruletext.ports)
ADDRESS: click.ParamType[Address] = _Words("address", _address)
ENDPOINT: click.ParamType[tuple[Address, int]] = _Words("address:port", _endpoint)
NAME = _Name()
POLICY: click.ParamType[Policy] = _Words("policy", Policy.parse)
PROCESS: click.ParamType[int] = _Words("process", _process)


def with_port(_context: click.Context, _parameter: click.Parameter, value: tuple[Address, int]) -> tuple[Address, int]:
    """The callback of an ENDPOINT that must have a port."""
    if not value[1]:
        raise click.BadParameter("no port: give ADDRESS:PORT, or [ADDRESS]:PORT for IPv6")
    return value


NETNS_OPTION = click.option("--netns", type=_NamespacePath(), metavar="PATH",
                            help="Namespace: /run/netns/NAME, /proc/PID/ns/net.  [default: this one]")  # fmt: skip
BPFFS_OPTION = click.option("--bpffs", type=click.Path(path_type=Path), default=BPFFS, show_default=True,
                            metavar="PATH", help="Where a BPF file system is mounted.")  # fmt: skip


class _Seconds(click.FloatRange):
    """A number of seconds: never one that is none (nan)."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        found = super().convert(value, param, context)
        if math.isnan(found):
            self.fail(f"{value!r} is no number of seconds", param, context)
        return float(found)


def seconds(least: float, most: float = math.inf) -> click.ParamType[float]:
    return _Seconds(least, most)


def place(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which dispatcher is meant."""
    return NETNS_OPTION(BPFFS_OPTION(command))


def _group(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    if value.isdecimal() and int(value[:11]) < (1 << 32) - 1:  # that one, chown(2) takes for none
        return int(value)
    try:
        return grp.getgrnam(value).gr_gid
    except KeyError:
        raise click.BadParameter(f"there is no group {value!r}") from None


GROUP_OPTION = click.option("--group", callback=_group, help="Members of this group may read the state.")


def one_socket(command: Callable[..., Any]) -> Callable[..., Any]:
    """The words that name a socket, of another process or inherited; the command gets `opened`, which opens it."""

    @click.argument("process", type=PROCESS, metavar="[PID]", required=False)
    @click.argument("protocol", type=click.Choice(["tcp", "udp"], case_sensitive=False), metavar="[PROTOCOL]",
                    required=False)  # fmt: skip
    @click.argument("address", type=ADDRESS, required=False)
    @click.argument("port", type=click.IntRange(1, 65535), required=False)
    @click.option("--fd", "descriptor", type=click.IntRange(0, (1 << 31) - 1), help="An inherited descriptor instead.")
    @functools.wraps(command)
    def with_socket(
        process: int | None, protocol: str | None, address: Address | None, port: int | None, descriptor: int | None,
        **options: Any,
    ) -> Any:  # fmt: skip
        if descriptor is not None:
            if process is not None:
                raise click.UsageError("give either PID PROTOCOL ADDRESS PORT or --fd")
            return command(opened=lambda: listeners.of_descriptors([descriptor]), **options)
        if process is None or protocol is None or address is None or port is None:
            raise click.UsageError("which socket? give PID PROTOCOL ADDRESS PORT, or --fd")
        return command(opened=lambda: listeners.of_process(process, PROTOCOLS[protocol], address, port), **options)

    return with_socket


@contextlib.contextmanager
def entered(netns: str | None) -> Any:
    """Inside the namespace that was named: interfaces have their names there."""
    if netns is None:
        yield
        return
    with contextlib.closing(Namespace.open(netns)) as namespace, namespace:
        yield
