"""`fastrecv balance modulo`, `object`: groups shared with a patched pmacct, or with the program that it comes from."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import click

from fastrecv import modulo as shared
from fastrecv.cli import output
from fastrecv.cli.arguments import ADDRESS, one_socket
from fastrecv.errors import StateError
from fastrecv.modulo import SLOTS, Modulo
from fastrecv.steerable import cookie_of, described

__all__ = ["COMMANDS"]

ROOT = click.argument("root", type=click.Path(path_type=Path))
SLOT = click.IntRange(0, SLOTS - 1)
_PROTOCOL = click.Choice(["tcp", "udp"], case_sensitive=False)


@click.command("object")
@click.argument("file", type=click.Path(path_type=Path))
def write_object(file: Path) -> None:
    """Write the program of `modulo` as an ELF file that a patched pmacct loads (reuseport_bpf_prog).

    Section sk_reuseport/selector, function _selector, four maps pinned by name. A peer with libbpf 1.0 or newer, which
    does not know that section, must call bpf_program__set_type(program, BPF_PROG_TYPE_SK_REUSEPORT) before it loads it.
    """
    shared.write_object(file)
    click.echo(f"wrote {file}")


@click.group()
def modulo() -> None:
    """Share a group with a patched pmacct, or the original reuseport program: by source address, modulo a size.

    ROOT is where that pins its four maps: /sys/fs/bpf/pmacct, /sys/fs/bpf/reuseport. IPv4 senders come where the
    original brings them. Of IPv6 addresses the original hashes bytes 4 to 7 only; here all of it counts, while a
    program of ours is attached. A change of size moves nearly all senders: who is bound to no such peer has less to
    lose with `fastrecv balance create`.

    \b
    fastrecv balance modulo create /sys/fs/bpf/pmacct --size 4
    fastrecv balance modulo register /sys/fs/bpf/pmacct 1 "$(pidof -s nfacctd)" udp 0.0.0.0 2055
    fastrecv balance modulo attach /sys/fs/bpf/pmacct "$(pidof -s nfacctd)" udp 0.0.0.0 2055
    """  # noqa: D301 - click wants the character


@modulo.command()
@ROOT
@click.option("--size", type=click.IntRange(1, SLOTS), help="Slots that the senders are divided by.  [default: 128]")
@click.option("--nonce", type=click.IntRange(1, (1 << 32) - 1), help="Seed of the hash.  [default: drawn]")
def create(root: Path, size: int | None, nonce: int | None) -> None:
    """Make the maps, or find them with that size and nonce; another one is refused."""
    with Modulo(root, size, nonce) as found:
        click.echo(f"{root}: size {found.size}, nonce {found.nonce}")


@modulo.command()
@ROOT
def destroy(root: Path) -> None:
    """Unpin the maps; refused while a socket is in a slot."""
    with _there(root) as found:
        found.destroy()
    click.echo(f"destroyed {root}")


@modulo.command()
@ROOT
@one_socket
def attach(root: Path, opened: Callable[[], Any]) -> None:
    """Attach the program to the group of a socket, in the place of any that it has."""
    with _there(root) as found, opened() as sockets:
        found.attach(sockets[0])
        click.echo(f"attached to the group of {described(sockets[0])}")


@modulo.command()
@ROOT
@click.argument("slot", type=SLOT)
@one_socket
@click.option("--take-over", is_flag=True, help="In the place of the socket that has the slot.")
def register(root: Path, slot: int, opened: Callable[[], Any], take_over: bool) -> None:
    """Give a slot to the socket of a process, or to an inherited one."""
    with _there(root) as found, opened() as sockets:
        if slot + len(sockets) > SLOTS:
            raise StateError(f"{len(sockets)} sockets from slot {slot} on: there are slots 0 to {SLOTS - 1}")
        for number, sock in enumerate(sockets, slot):
            found.check(number, sock, take_over=take_over)  # all of them, before any has a slot
        for number, sock in enumerate(sockets, slot):
            found.register(number, sock, take_over=take_over)
            beyond = f"; it has no senders before `resize`: size is {found.size}" if number >= found.size else ""
            click.echo(f"slot {number}: {described(sock)}, sk:{cookie_of(sock):x}{beyond}")


@modulo.command()
@ROOT
@click.argument("slot", type=SLOT)
@click.argument("protocol", type=_PROTOCOL, metavar="PROTOCOL")
def unregister(root: Path, slot: int, protocol: Any) -> None:
    """Empty a slot: its senders are refused."""
    with _there(root) as found:
        if slot not in found.members(protocol):
            raise StateError(f"{protocol} slot {slot} has no socket")
        found.unregister(slot, protocol)
        click.echo(f"{protocol} slot {slot} is empty")


@modulo.command()
@ROOT
@click.argument("size", type=click.IntRange(1, SLOTS))
def resize(root: Path, size: int) -> None:
    """Divide the senders by another size. Peers that are configured with the old one refuse to start then."""
    with _there(root) as found:
        before = found.size
        share = found.resize(size)
        click.echo(f"size {before} before, {size} now, {100 * share:.1f} % of the senders moved")


@modulo.command()
@ROOT
@output.json_option
def status(root: Path, as_json: bool) -> None:
    """Size, nonce, and which slots have sockets, those of peers as well."""
    nonce, size, tcp, udp = shared.look(root)
    members = {"tcp": tcp, "udp": udp}
    if as_json:
        output.as_json({"root": str(root), "size": size, "nonce": nonce, **members})
        return
    click.echo(f"{root}: size {size}, nonce {nonce}")
    numbers = sorted({*range(size), *members["tcp"], *members["udp"]})
    words = {name: {slot: f"sk:{cookie:x}" for slot, cookie in slots.items()} for name, slots in members.items()}
    output.table(
        ("slot", "tcp", "udp"),
        [(slot, words["tcp"].get(slot, "-"), words["udp"].get(slot, "-")) for slot in numbers],
    )


@modulo.command()
@ROOT
@click.argument("source", type=ADDRESS)
@output.json_option
def explain(root: Path, source: IPv4Address | IPv6Address, as_json: bool) -> None:
    """Which slot a sender has."""
    nonce, size, tcp, udp = shared.look(root)
    if not size or not nonce:
        raise StateError(f"{root} has no {'size' if nonce else 'nonce'} yet: the first packet, or `create`, sets it")
    slot = shared.slot_of(source, size, nonce)
    sockets = {"tcp": tcp.get(slot), "udp": udp.get(slot)}
    if as_json:
        output.as_json({"slot": slot, **sockets})
        return
    words = {name: "none, refused" if cookie is None else f"sk:{cookie:x}" for name, cookie in sockets.items()}
    click.echo(f"slot {slot} of {size}: tcp {words['tcp']}; udp {words['udp']}")


def _there(root: Path) -> Modulo:
    """What has been made; StateError where nothing has."""
    shared.look(root)
    return Modulo(root)


COMMANDS: tuple[click.Command, ...] = (write_object, modulo)
