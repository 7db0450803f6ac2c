"""`fastrecv lookup`: the verbs, which change what is loaded. The nouns are in lookup_reads."""

from __future__ import annotations

import contextlib
import gc
import pwd
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Literal

import click

from fastrecv import handover, listeners, lookup_life, privileges, ruletext
from fastrecv.cli import lookup_reads
from fastrecv.cli.arguments import (
    ADDRESS,
    GROUP_OPTION,
    LABEL,
    LABEL_OR_DROP,
    PORTS,
    PREFIX,
    PROCESS,
    entered,
    place,
)
from fastrecv.cli.serving import serve_until_stopped
from fastrecv.errors import StateError
from fastrecv.lookup import Dispatcher
from fastrecv.rules import FAMILIES, FAMILY_NAMES, PROTOCOL_NAMES, PROTOCOLS, Destination, RuleSetError
from fastrecv.state import DROP, Change, check_label

__all__ = ["lookup"]

_PATIENCE = 5.0  # seconds for each of two locks; who hands a socket over waits longer
_SHOWN = 20  # lines of what a file added and removed

Network = IPv4Network | IPv6Network


@click.group()
def lookup() -> None:
    """Steer by destination: protocol, prefix and port decide which service gets a packet.

    Nouns read: status, bindings, metrics, explain. Verbs change. What is loaded stays, without a process, until it is
    unloaded, in a BPF file system.

    A binding leads packets to a label, sockets are registered for a label. The binding that applies to a packet is the
    one with the longest prefix, then the narrowest range of ports, then the longest source prefix, then one that names
    the interface, then one that names the protocol.
    """


for _noun in lookup_reads.COMMANDS:
    lookup.add_command(_noun)


@lookup.command()
@GROUP_OPTION
@place
def load(group: int | None, netns: str | None, bpffs: Path) -> None:
    """Attach a dispatcher without bindings to a network namespace."""
    for gone in lookup_life.load(netns, bpffs=bpffs, group=group):
        click.echo(f"removed {gone}: its namespace has ended, or its load was killed")
    click.echo("loaded")


@lookup.command()
@place
def unload(netns: str | None, bpffs: Path) -> None:
    """Detach the dispatcher, and forget all bindings and sockets. Established connections go on."""
    lookup_life.unload(netns, bpffs=bpffs)
    click.echo("unloaded")


@lookup.command()
@place
def upgrade(netns: str | None, bpffs: Path) -> None:
    """Replace the attached program by this version's; bindings, sockets and counters stay, no packet is lost."""
    with Dispatcher(netns, bpffs=bpffs, adopt=True) as dispatcher:
        before = dispatcher.state
        dispatcher.upgrade()
        after = dispatcher.state
    if before.program == after.program:
        click.echo(f"loaded anew: it was this version's already ({after.tag}, fastrecv {after.version})")
        return
    click.echo(f"upgraded from {before.tag} (fastrecv {before.version}) to {after.tag} (fastrecv {after.version})")


def _binding_arguments(command: click.decorators.FC) -> click.decorators.FC:
    for option in (
        click.option("--interface", metavar="NAME", help="Only packets that come in by this interface."),
        click.option("--source", type=PREFIX, help="Only packets from this prefix."),
        click.argument("ports", type=PORTS, metavar="PORT"),
        click.argument("prefix", type=PREFIX),
        click.argument("protocol", type=click.Choice(["tcp", "udp", "any"], case_sensitive=False), metavar="PROTOCOL"),
        click.argument("label", type=LABEL_OR_DROP),
    ):
        command = option(command)
    return command


@lookup.command()
@_binding_arguments
@click.option("--on-miss", type=click.Choice(["drop", "pass"]), default="drop", show_default=True,
              help="While the label has no socket: drop, or pass to the ordinary lookup.")  # fmt: skip
@place
def bind(
    label: str, protocol: Literal["tcp", "udp", "any"], prefix: Network, ports: tuple[int, int], source: Network | None,
    interface: str | None, on_miss: Literal["drop", "pass"], netns: str | None, bpffs: Path,
) -> None:  # fmt: skip
    """Bind a prefix and a port (80, 8000-8999, any) to a label; the label "drop" drops.

    \b
    fastrecv lookup bind web tcp 192.0.2.0/24 80
    fastrecv lookup bind proxy any 2001:db8::1 any
    fastrecv lookup bind drop udp 192.0.2.0/24 any --source 203.0.113.0/24

    A binding of the same protocol, prefix, port, source and interface is replaced. What is dropped is answered as where
    nobody listens: TCP with a reset, UDP with port unreachable.
    """  # noqa: D301 - click wants the character
    if label == DROP and on_miss == "pass":
        raise click.UsageError("what is dropped has no misses: leave --on-miss out")
    with entered(netns):
        bound = ruletext.binding(label, protocol, prefix, ports, source, interface, on_miss)
        with Dispatcher(bpffs=bpffs) as dispatcher:
            change = dispatcher.bind(bound)
        for gone in change.removed:
            click.echo(f"unbound {ruletext.text(gone)}")
        click.echo(f"{'bound' if change.added else 'was bound already:'} {ruletext.text(bound)}")


@lookup.command()
@_binding_arguments
@place
def unbind(
    label: str, protocol: Literal["tcp", "udp", "any"], prefix: Network, ports: tuple[int, int], source: Network | None,
    interface: str | None, netns: str | None, bpffs: Path,
) -> None:  # fmt: skip
    """Remove one binding; its arguments are those it was bound with."""
    with entered(netns):
        bound = ruletext.binding(label, protocol, prefix, ports, source, interface, "drop")
        with Dispatcher(bpffs=bpffs) as dispatcher:
            dispatcher.unbind(bound)
        click.echo(f"unbound {ruletext.text(bound)}")


@lookup.command("load-bindings")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Say what would be added and removed, and change nothing.")
@place
def load_bindings(file: Path, dry_run: bool, netns: str | None, bpffs: Path) -> None:
    """Put the bindings of a JSON or TOML file in the place of all that are there, in one step; "-" is JSON on stdin.

    \b
    [[bindings]]
    label = "web"        # "drop" drops
    protocol = "tcp"     # udp, any
    prefix = "192.0.2.0/24"
    port = 80            # "8000-8999", "any"
    source, interface, on_miss: as for bind
    """  # noqa: D301 - click wants the character
    with entered(netns), _uncollected():
        bindings = ruletext.read_file(file)
        with Dispatcher(bpffs=bpffs, read_only=dry_run) as dispatcher:
            try:
                change = dispatcher.compare(bindings) if dry_run else dispatcher.replace_bindings(bindings)
            except RuleSetError as error:
                raise RuleSetError(f"{file}: {error}") from None
        _tell(change)
    would = "would be " if dry_run else ""
    click.echo(
        f"{len(change.added):,} {would}added, {len(change.removed):,} {would}removed, {len(bindings):,} in the file"
    )


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector, which would search a hundred thousand bindings that all stay, again and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _tell(change: Change) -> None:
    for sign, bindings in (("-", change.removed), ("+", change.added)):
        for bound in bindings[:_SHOWN]:
            click.echo(f"{sign} {ruletext.text(bound)}")
        if len(bindings) > _SHOWN:
            click.echo(f"{sign} and {len(bindings) - _SHOWN:,} more")


def _registered(dispatcher: Dispatcher, destinations: Iterable[Destination]) -> str:
    """What was registered, in words; with a hint where nothing leads there, which may be a slip of the pen."""
    bound = dispatcher.state.bound()
    unbound = [name for name in destinations if not bound[name]]
    hint = f"; nothing is bound yet to {_named(unbound)}" if unbound else ""
    return _named(destinations) + hint


def _named(destinations: Iterable[Destination]) -> str:
    return ", ".join(
        f"{name.label} {FAMILY_NAMES[name.family]} {PROTOCOL_NAMES[name.protocol]}" for name in destinations
    )


@lookup.command()
@click.argument("label", type=LABEL, required=False)
@click.option(
    "--fd",
    "descriptors",
    type=click.IntRange(0, (1 << 31) - 1),
    multiple=True,
    help="An inherited descriptor; again for more.",
)
@click.option("--to", "server", type=click.Path(path_type=Path), metavar="PATH",
              help="Hand the sockets to `fastrecv lookup serve PATH`, which needs no privilege.")  # fmt: skip
@click.option("--add", is_flag=True, help="Keep those that are registered; the first that lives is used.")
@place
def register(
    label: str | None, descriptors: Sequence[int], server: Path | None, add: bool, netns: str | None, bpffs: Path
) -> None:
    """Register inherited sockets for a label: those of --fd, else those that systemd has passed (LISTEN_FDS).

    Without LABEL, systemd's names of the sockets are the labels (FileDescriptorName=).
    """
    if server and (add or netns):
        raise click.UsageError(
            "with --to the server decides where, and replaces what the label had: leave out --add, --netns"
        )
    passed = [(label or "", fd) for fd in descriptors] or [(label or name, fd) for name, fd in listeners.from_systemd()]
    if not passed:
        raise click.UsageError("no socket: give --fd, or run as a systemd service with a .socket unit")
    if label is None and (descriptors or any(name == listeners.UNNAMED for name, _ in passed)):
        raise click.UsageError("the descriptors have no names: give a label")
    with contextlib.ExitStack() as stack:
        named = {
            name: stack.enter_context(listeners.of_descriptors([fd for other, fd in passed if other == name]))
            for name in dict.fromkeys(name for name, _ in passed)
        }
        if server is not None:
            for name, sockets in named.items():
                click.echo(f"registered {handover.hand_over(server, name, sockets)}")
            return
        with Dispatcher(netns, bpffs=bpffs) as dispatcher:
            for name, sockets in named.items():  # what one of them is refused for, is known before any is registered
                check_label(name)
                listeners.by_destination(name, sockets, dispatcher.cookie)
            for name, sockets in named.items():
                click.echo(f"registered {_registered(dispatcher, dispatcher.register(name, sockets, add=add))}")


@lookup.command("register-pid")
@click.argument("process", type=PROCESS, metavar="PID")
@click.argument("label", type=LABEL)
@click.argument("protocol", type=click.Choice(["tcp", "udp"], case_sensitive=False), metavar="PROTOCOL")
@click.argument("address", type=ADDRESS)
@click.argument("port", type=click.IntRange(1, 65535))
@click.option("--add", is_flag=True, help="Keep those that are registered; the first that lives is used.")
@place
def register_pid(
    process: int, label: str, protocol: str, address: IPv4Address | IPv6Address, port: int, add: bool,
    netns: str | None, bpffs: Path,
) -> None:  # fmt: skip
    """Register the sockets that a running process has bound to ADDRESS and PORT; PID may be the path of a pid file.

    All members of a reuseport group that the process holds count as one. The process need know nothing of it. Register
    again when it has opened its sockets anew.
    """
    with (
        Dispatcher(netns, bpffs=bpffs) as dispatcher,
        listeners.of_process(process, PROTOCOLS[protocol], address, port) as sockets,
    ):
        click.echo(f"registered {_registered(dispatcher, dispatcher.register(label, sockets, add=add))}")


@lookup.command()
@click.argument("label", type=LABEL)
@click.option("--family", type=click.Choice(["ipv4", "ipv6"]), help="Only those for packets of this family.")
@click.option("--protocol", type=click.Choice(["tcp", "udp"]), help="Only those of this protocol.")
@place
def unregister(label: str, family: str | None, protocol: str | None, netns: str | None, bpffs: Path) -> None:
    """Forget the sockets of a label. Its bindings stay, and miss."""
    with Dispatcher(netns, bpffs=bpffs) as dispatcher:
        gone = dispatcher.unregister(label, FAMILIES.get(family or ""), PROTOCOLS.get(protocol or ""))
        click.echo(f"unregistered {_named(gone)}")


def _owners(_context: click.Context, _parameter: click.Parameter, value: Sequence[str]) -> dict[str, set[int]]:
    owners: dict[str, set[int]] = {}
    for word in value:
        label, equals, user = word.rpartition("=")
        if not equals:
            raise click.BadParameter(f"{word!r}: give LABEL=USER")
        LABEL.convert(label, None, None)
        try:
            uid = int(user[:11]) if user.isdecimal() else pwd.getpwnam(user).pw_uid
        except KeyError:
            raise click.BadParameter(f"there is no user {user!r}") from None
        owners.setdefault(label, set()).add(uid)
    return owners


@lookup.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--owner", "owners", multiple=True, callback=_owners, metavar="LABEL=USER",
              help="Who may register for a label; again for more. Root may for all.")  # fmt: skip
@place
def serve(path: Path, owners: dict[str, set[int]], netns: str | None, bpffs: Path) -> None:
    """Take sockets from local processes without privileges, at the AF_UNIX socket PATH (`register --to PATH`).

    Who the peer is, says the kernel (SO_PEERCRED). Keeps CAP_BPF and no other capability.
    """
    privileges.refuse_threads()
    one_at_a_time = threading.Lock()

    def take(label: str, sockets: list[socket.socket]) -> str:
        if not one_at_a_time.acquire(timeout=_PATIENCE):
            raise StateError("others are being registered: try again")
        try:
            with Dispatcher(bpffs=bpffs, timeout=_PATIENCE) as dispatcher:
                return _registered(dispatcher, dispatcher.register(label, sockets))
        finally:
            one_at_a_time.release()

    with handover.Server(path, owners, take, click.echo) as server:
        if not owners:
            click.echo("no --owner was given: root alone may register")
        serve_until_stopped(server, f"serving {path}", netns, privileges.CAP_BPF)
