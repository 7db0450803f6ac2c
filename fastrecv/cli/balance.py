"""`fastrecv balance`: the verbs, which change a balancer or the group it balances. The nouns are in balance_reads."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import click

from fastrecv import balance_life, groups, listeners, reuseport, steerable
from fastrecv.balance import EMPTY_POLICIES, MAX_WEIGHT, SLOTS, Balancer, Empty
from fastrecv.cli import balance_modulo, balance_reads
from fastrecv.cli.arguments import (
    ADDRESS,
    BPFFS_OPTION,
    GROUP_OPTION,
    NAME,
    POLICY,
    PREFIX,
    PROCESS,
    one_socket,
    seconds,
)
from fastrecv.errors import StateError
from fastrecv.policies import BUCKETS, Mapped, Policy
from fastrecv.rules import PROTOCOLS

__all__ = ["balance"]

_POLL = 0.1  # seconds between two looks at a queue

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
SLOT = click.IntRange(0, SLOTS - 1)


@click.group()
def balance() -> None:
    """Steer by sender: every sender of a reuseport group keeps one member of it, while others come and go.

    Nouns read: status, metrics, explain. Verbs change. A balancer needs no process: it is kept, until it is destroyed,
    in a BPF file system. It has 128 slots for the sockets of one group (one address, port and protocol).

    \b
    fastrecv balance create flows --policy source --size 3
    fastrecv balance register-pid flows 0 "$PID" udp 0.0.0.0 2055
    fastrecv balance attach flows "$PID" udp 0.0.0.0 2055
    fastrecv balance status flows
    """  # noqa: D301 - click wants the character


for _command in (*balance_reads.COMMANDS, *balance_modulo.COMMANDS):
    balance.add_command(_command)


@balance.command()
@click.argument("name", type=NAME)
@click.option("--policy", type=POLICY, default="source", show_default=True,
              help="source[/BITS4[/BITS6]], source+port, flow, destination, payload[OFFSET:LENGTH], quic[LENGTH], cpu, "
              "random.")  # fmt: skip
@click.option("--size", type=click.IntRange(1, SLOTS), help="Slots 0 to SIZE - 1 share the senders.")
@click.option("--map", "mapped", type=click.Choice(["source", "destination"]),
              help="Prefixes of this address may have slots of their own (`place`).")  # fmt: skip
@click.option("--empty", type=click.Choice(EMPTY_POLICIES), default="drop", show_default=True,
              help="Who has a slot without a socket: is refused, goes by the kernel's hash, or next.")  # fmt: skip
@click.option("--senders", type=click.IntRange(0, 10_000_000), default=0,
              help="Known at most while a slot is drained by sender.  [default: 0: never by sender]")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, (1 << 64) - 1), help="Of the hash.  [default: drawn]")
@GROUP_OPTION
@BPFFS_OPTION
def create(
    name: str, policy: Policy, size: int | None, mapped: Mapped | None, empty: Empty, senders: int, seed: int | None,
    group: int | None, bpffs: Path,
) -> None:  # fmt: skip
    """Make a balancer, or find that the one of that name is just that.

    Of several that begin at once the first makes it; another size, seed or policy than is there is refused.
    """
    wanted = Policy.parse(str(policy), mapped=mapped, seed=seed)
    try:
        with balance_life.create(
            name, wanted, size, empty=empty, senders=senders, bpffs=bpffs, group=group
        ) as balancer:  # fmt: skip
            click.echo(f"{name}: {balance_reads.described(balancer)}")
    except ValueError as error:
        raise click.UsageError(str(error)) from None


@balance.command()
@click.argument("name", type=NAME)
@BPFFS_OPTION
def destroy(name: str, bpffs: Path) -> None:
    """Forget a balancer. A group that has its program keeps it, as it is, until it is detached or ends."""
    with balance_life.opened(name, bpffs=bpffs, read_only=True) as balancer:
        held = balancer.sockets()
    balance_life.destroy(name, bpffs=bpffs)
    orphan = "; its program goes on in the group of its sockets: `fastrecv balance detach` ends that" if held else ""
    click.echo(f"destroyed {name}{orphan}")


@balance.command()
@click.argument("name", type=NAME)
@one_socket
@BPFFS_OPTION
def attach(name: str, opened: Callable[[], Any], bpffs: Path) -> None:
    """Attach a balancer to the group of a socket, in the place of any program that it has.

    The socket is one that the process PID has bound to ADDRESS and PORT, any member of the group, or is inherited
    (--fd). It must be bound already, and listen if it is TCP: a program that is attached before makes the next member's
    bind() fail.
    """
    with balance_life.opened(name, bpffs=bpffs) as balancer, opened() as sockets:
        sock = sockets[0]
        before = _program_of(sock)
        balancer.attach(sock)
        mine = balancer.maps.program.info.id
        name_of = "a classic BPF program" if before == groups.CLASSIC else f"program {before}"
        instead = f", in the place of {name_of}" if before not in (None, mine) else ""
        click.echo(f"attached {name} (program {mine}) to the group of {steerable.described(sock)}{instead}")
        bare = _without_socket(balancer, balancer.weights)
        if bare and balancer.empty == "drop":
            click.echo(f"{_slots(bare)} no socket yet: senders there are dropped until one is registered")


@balance.command()
@one_socket
def detach(opened: Callable[[], Any]) -> None:
    """Detach whatever program the group of a socket has: the kernel's hash decides again."""
    with opened() as sockets:
        if not reuseport.detach(sockets[0]):
            raise StateError(f"the group of {steerable.described(sockets[0])} has no program")
        click.echo(f"detached from the group of {steerable.described(sockets[0])}")


def _program_of(sock: socket.socket) -> int | None:
    """The id of the program of a socket's group; None without one, and where it cannot be looked at from here."""
    try:
        return groups.program_of(sock)
    except (PermissionError, StateError):
        return None


@balance.command()
@click.argument("name", type=NAME)
@click.argument("slot", type=SLOT)
@click.option("--fd", "descriptor", type=click.IntRange(0, (1 << 31) - 1),
              help="An inherited descriptor.  [default: what systemd has passed]")  # fmt: skip
@click.option("--take-over", is_flag=True, help="In the place of the socket that has the slot.")
@BPFFS_OPTION
def register(name: str, slot: int, descriptor: int | None, take_over: bool, bpffs: Path) -> None:
    """Give a slot to an inherited socket, a member of the group."""
    passed = [descriptor] if descriptor is not None else [fd for _, fd in listeners.from_systemd()]
    if not passed:
        raise click.UsageError("no socket: give --fd, or run as a systemd service with a .socket unit")
    with listeners.of_descriptors(passed) as sockets:
        _register(name, slot, sockets, take_over, bpffs)


@balance.command("register-pid")
@click.argument("name", type=NAME)
@click.argument("slot", type=SLOT)
@click.argument("process", type=PROCESS, metavar="PID")
@click.argument("protocol", type=click.Choice(["tcp", "udp"], case_sensitive=False), metavar="PROTOCOL")
@click.argument("address", type=ADDRESS)
@click.argument("port", type=click.IntRange(1, 65535))
@click.option("--take-over", is_flag=True, help="In the place of the socket that has the slot.")
@BPFFS_OPTION
def register_pid(
    name: str, slot: int, process: int, protocol: str, address: Address, port: int, take_over: bool, bpffs: Path
) -> None:
    """Give a slot to the socket that a running process has bound to ADDRESS and PORT; PID may be a pid file's path.

    A process that has several gets as many slots, from SLOT on. The process need know nothing of it. Its slot empties
    itself when it ends.
    """
    with listeners.of_process(process, PROTOCOLS[protocol], address, port) as sockets:
        _register(name, slot, sockets, take_over, bpffs)


def _register(name: str, slot: int, sockets: Sequence[socket.socket], take_over: bool, bpffs: Path) -> None:
    with balance_life.opened(name, bpffs=bpffs) as balancer:
        if slot + len(sockets) > SLOTS:
            raise StateError(f"{len(sockets)} sockets from slot {slot} on: there are slots 0 to {SLOTS - 1}")
        for number, sock in enumerate(sockets, slot):
            balancer.check(number, sock, take_over=take_over)  # all of them, before any has a slot
        for number, sock in enumerate(sockets, slot):
            balancer.register(number, sock, take_over=take_over)
            click.echo(f"slot {number}: {steerable.described(sock)}, sk:{steerable.cookie_of(sock):x}")
        idle = [str(number) for number in range(slot, slot + len(sockets)) if number not in balancer.weights]
        if idle:
            click.echo(f"{_slots(idle)} no senders yet: `fastrecv balance weight {name} {idle[0]} 1`, or resize")
        _hint(name, sockets[0], balancer.maps.program.info.id)


def _slots(numbers: Sequence[object]) -> str:
    return f"slot {numbers[0]} has" if len(numbers) == 1 else f"slots {', '.join(map(str, numbers))} have"


def _without_socket(balancer: Balancer, weights: Mapping[int, int]) -> list[int]:
    """Which of the slots that would have a weight have no socket."""
    return sorted(weights.keys() - balancer.sockets().keys())


def _weigh(balancer: Balancer, weights: Mapping[int, int]) -> int:
    _refuse_to_drop(balancer, weights)
    return balancer.weigh(weights)


def _refuse_to_drop(balancer: Balancer, weights: Mapping[int, int]) -> None:
    """StateError where a slot without a socket would get more senders, of a group that has any, to be dropped."""
    before = balancer.weights
    had, have = sum(before.values()), sum(weights.values())
    more = [
        slot for slot in _without_socket(balancer, weights) if weights[slot] * max(had, 1) > before.get(slot, 0) * have
    ]
    if more and balancer.empty == "drop" and balancer.sockets():
        raise StateError(
            f"{_slots(more)} no socket, so the senders that it would be given would be dropped: register there first, "
            "or drain it, too"
        )


def _hint(name: str, sock: socket.socket, program: int) -> None:
    """Say so where the group of a socket that was registered has not the balancer's program, or none."""
    with contextlib.suppress(PermissionError, StateError):  # it cannot be looked at from here
        if groups.program_of(sock) != program:
            click.echo(f"its group does not have {name}'s program: `fastrecv balance attach {name}`")


@balance.command()
@click.argument("name", type=NAME)
@click.argument("slot", type=SLOT)
@BPFFS_OPTION
def unregister(name: str, slot: int, bpffs: Path) -> None:
    """Empty a slot. What its socket has queued stays there to be read; senders that come follow --empty."""
    with balance_life.opened(name, bpffs=bpffs) as balancer:
        if slot not in balancer.sockets():
            raise StateError(f"slot {slot} has no socket")
        balancer.unregister(slot)
        balancer.leaving.end(slot)
        had = slot in balancer.weights or slot in balancer.places().values()
        click.echo(f"slot {slot} is empty" + ("; it still has senders: `drain` would give them away" if had else ""))


@balance.command()
@click.argument("name", type=NAME)
@click.argument("slot", type=SLOT)
@click.argument("weight", type=click.IntRange(0, MAX_WEIGHT))
@BPFFS_OPTION
def weight(name: str, slot: int, weight: int, bpffs: Path) -> None:
    """Give a slot so many shares of the senders; the others have theirs. 0 is to drain it, 1 to take that back."""
    with balance_life.opened(name, bpffs=bpffs) as balancer:
        balancer.leaving.end(slot)
        moved = _weigh(balancer, {**balancer.weights, slot: weight} if weight else balancer.without(slot))
        click.echo(f"slot {slot} has weight {weight}, {_moved(moved)}")


@balance.command()
@click.argument("name", type=NAME)
@click.argument("size", type=click.IntRange(1, SLOTS))
@BPFFS_OPTION
def resize(name: str, size: int, bpffs: Path) -> None:
    """Let slots 0 to SIZE - 1 share the senders. Slots above drain: their sockets stay registered, to be read empty."""
    with balance_life.opened(name, bpffs=bpffs) as balancer:
        _refuse_placed(balancer, {slot for slot in balancer.weights if slot >= size})
        _refuse_to_drop(balancer, balancer.of_size(size))
        before = balancer.size
        click.echo(f"{before} slots before, {size} now, {_moved(balancer.resize(size))}")


def _refuse_placed(balancer: Balancer, drained: set[int]) -> None:
    """StateError where prefixes have slots that are to be drained: those senders would go on coming."""
    placed = [f"{prefix} (slot {slot})" for prefix, slot in balancer.places().items() if slot in drained]
    if placed:
        raise StateError(f"prefixes are placed there: {', '.join(placed)}: `place` them elsewhere, or `unplace` them")


def _moved(buckets: int) -> str:
    return f"{buckets:,} of {BUCKETS:,} buckets moved ({100 * buckets / BUCKETS:.1f} % of the senders)"


@balance.command()
@click.argument("name", type=NAME)
@click.argument("slot", type=SLOT)
@click.option("--by-sender", is_flag=True, help="Senders it has stay with it until none has come for --quiet seconds.")
@click.option("--learn", type=seconds(0), help="With --by-sender: so long senders are recorded before.  [default: 10]")
@click.option("--quiet", type=seconds(0.1), help="With --by-sender: so long without any ends it.  [default: 60]")
@click.option("--wait", type=seconds(0),
              help="Seconds to wait until its queue has been read to the end; then the slot is emptied.")  # fmt: skip
@BPFFS_OPTION
def drain(
    name: str, slot: int, by_sender: bool, learn: float | None, quiet: float | None, wait: float | None, bpffs: Path
) -> None:
    """Give a slot's senders to the others, so that its process can end without losing anything.

    Without --wait it is done at once, and the slot's socket stays, to be read to the end: then `unregister`, then end
    the process. A slot that drains already goes on to drain; without --by-sender its known senders go, too. `weight`
    takes it back.
    """
    if not by_sender and (learn is not None or quiet is not None):
        raise click.UsageError("--learn and --quiet are for --by-sender")
    if wait is not None:
        groups.members()  # who may not look at queues hears so before anything is changed
    try:
        _drain(name, slot, by_sender, 10.0 if learn is None else learn, bpffs)
        if by_sender:
            _await_quiet(name, slot, 60.0 if quiet is None else quiet, bpffs)
        if wait is not None:
            _await_empty_queue(name, slot, wait, bpffs)
    except KeyboardInterrupt:
        click.echo(f"interrupted: `drain` goes on, `weight {name} {slot} 1` takes it back", err=True)
        raise


def _drain(name: str, slot: int, by_sender: bool, learn: float, bpffs: Path) -> None:
    with balance_life.opened(name, bpffs=bpffs) as balancer:
        _refuse_placed(balancer, {slot})
        if slot not in balancer.weights and slot in balancer.sockets():
            if not by_sender:
                balancer.leaving.end(slot)
            click.echo(f"slot {slot} has no buckets any more, and goes on to drain")
            return
        if by_sender:
            _refuse_to_drop(balancer, balancer.without(slot))  # before anything is learnt
            balancer.leaving.begin(slot)
        else:
            balancer.leaving.end(slot)
    if by_sender:
        _learn(name, slot, learn, bpffs)
    with balance_life.opened(name, bpffs=bpffs) as balancer:
        click.echo(f"slot {slot} drains, {_moved(_weigh(balancer, balancer.without(slot)))}")


def _learn(name: str, slot: int, seconds: float, bpffs: Path) -> None:
    """Wait while those who come are recorded; interrupted, it was nothing."""
    try:
        for _ in _ticks(seconds):
            pass
    except BaseException:
        with balance_life.opened(name, bpffs=bpffs) as balancer:
            balancer.leaving.end(slot)
        raise
    with balance_life.opened(name, bpffs=bpffs, read_only=True) as balancer:
        click.echo(f"{balancer.leaving.known(slot).senders:,} senders came within {seconds:g} s, and stay")


def _await_quiet(name: str, slot: int, quiet: float, bpffs: Path) -> None:
    for _ in _ticks(None, max(_POLL, quiet / 20)):
        with balance_life.opened(name, bpffs=bpffs, read_only=True) as balancer:
            known, served = balancer.leaving.known(slot), slot in balancer.sockets()
        if not served or known.quiet is None or known.quiet >= quiet:
            break
        if sys.stderr.isatty():
            click.echo(f"\r{known.senders:,} known, the last came {known.quiet:.0f} s ago ", err=True, nl=False)
    with balance_life.opened(name, bpffs=bpffs) as balancer:
        balancer.leaving.end(slot)
    if not served and known.senders:
        raise StateError(f"the socket of slot {slot} was closed: its senders go where their buckets are")
    none = (
        f"none of slot {slot}'s senders has come for {quiet:g} s"
        if known.senders
        else f"slot {slot} has no known sender"
    )
    click.echo(f"{none}: it has none any more")


def _await_empty_queue(name: str, slot: int, seconds: float, bpffs: Path) -> None:
    with balance_life.opened(name, bpffs=bpffs, read_only=True) as balancer:
        cookie = balancer.sockets().get(slot)
    left: int | None = 0
    for _ in _ticks(seconds) if cookie is not None else ():
        left = next((member.queue for member in groups.members() if member.cookie == cookie), None)
        if not left:
            break
    if left is None and cookie in _cookies(name, bpffs):
        raise StateError(
            f"the socket of slot {slot} is in another network namespace, or in no group any more: nobody here sees its "
            "queue, enter that namespace"
        )
    if left:
        raise StateError(
            f"slot {slot} still has {left:,} queued after {seconds:g} s: its process does not read. `drain` waits on"
        )
    with balance_life.opened(name, bpffs=bpffs) as balancer:
        if balancer.sockets().get(slot) == cookie:
            balancer.unregister(slot)
    click.echo(f"slot {slot} is empty, and nothing is queued: its process can end")


def _cookies(name: str, bpffs: Path) -> Collection[int]:
    with balance_life.opened(name, bpffs=bpffs, read_only=True) as balancer:
        return balancer.sockets().values()


def _ticks(seconds: float | None, pause: float = _POLL) -> Iterator[None]:
    """Again and again for a while, at least once."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        yield
        if deadline is not None and time.monotonic() >= deadline:
            return
        time.sleep(pause)


@balance.command()
@click.argument("name", type=NAME)
@click.argument("prefix", type=PREFIX)
@click.argument("slot", type=SLOT)
@BPFFS_OPTION
def place(name: str, prefix: Network, slot: int, bpffs: Path) -> None:
    """Give a prefix of the mapped address (`create --map`) a slot of its own, before any hash; the longest wins."""
    with balance_life.opened(name, bpffs=bpffs) as balancer:
        balancer.place(prefix, slot)
        bare = "" if slot in balancer.sockets() else ", which has no socket yet"
        click.echo(f"{balancer.policy.mapped} {prefix}: slot {slot}{bare}")


@balance.command()
@click.argument("name", type=NAME)
@click.argument("prefix", type=PREFIX)
@BPFFS_OPTION
def unplace(name: str, prefix: Network, bpffs: Path) -> None:
    """Let the hash decide again for a prefix."""
    with balance_life.opened(name, bpffs=bpffs) as balancer:
        balancer.unplace(prefix)
        click.echo(f"{prefix}: by {balancer.policy}")
