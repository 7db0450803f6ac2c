"""Modulo against the kernel: every sender comes to the slot that user space names; and what its maps survive."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address, ip_address
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from pyroute2 import IPRoute

from fastrecv import modulo
from fastrecv.bpf import Map, Object, Statistics, compiled
from fastrecv.errors import SocketRefusedError, StateError
from fastrecv.listeners import cookie_of
from fastrecv.modulo import Modulo, moved, write_object
from tests.kernel.privileges import CAP_BPF, only
from tests.kernel.senders import came_to, random_senders, refused
from tests.kernel.steering import PORT, SO_ATTACH_REUSEPORT_EBPF, TCP, UDP, Stage, kinds

NAMES = ["nonce", "size", "tcp_balancing_targets", "udp_balancing_targets"]
ROOT = Path(__file__).parents[2]
IPPROTO_MPTCP = 262  # include/uapi/linux/in.h
# What members are bound to, where senders are, and whom they ask.
FAMILIES = {
    "ipv4": ("0.0.0.0", "127.0.0.0/8", "127.0.0.1"),  # noqa: S104 - a private namespace
    "ipv6": ("::", "fd00::/8", "fd00::1"),
    "dual": ("::", "127.0.0.0/8", "127.0.0.1"),
}


@pytest.fixture
def root(bpffs: Path) -> Path:
    return bpffs / "reuseport"


@pytest.fixture
def wide(stage: Stage) -> Stage:
    """Every address of fd00::/8 is local, so that each bit of a sender's but eight can differ."""
    with IPRoute() as net:
        net.route("add", dst="fd00::/8", family=socket.AF_INET6, oif=1, type="local", table=255)
    return stage


def serve(stage: Stage, kind: int, host: str, count: int, only6: bool = False) -> dict[int, socket.socket]:
    return {slot: stage.serve(str(slot), kind, host, PORT, reuseport=True, only6=only6) for slot in range(count)}


def join(shared: Modulo, members: dict[int, socket.socket]) -> None:
    shared.attach(members[0])
    for slot, member in members.items():
        shared.register(slot, member)


@pytest.mark.parametrize(("kind", "number"), [(UDP, 4000), (TCP, 400)], ids=["udp", "tcp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_sender_comes_to_the_slot_that_user_space_names(
    wide: Stage, root: Path, kind: int, number: int, family: str
) -> None:
    host, prefix, target = FAMILIES[family]
    senders = random_senders(prefix, number)
    with Modulo(root, size=5) as shared, Statistics():
        members = serve(wide, kind, host, 5, only6=family == "ipv6")
        join(shared, members)
        found = came_to(kind, members, senders, (target, PORT))
        assert found == {sender: shared.index(sender) for sender in senders}
        runs = shared._object.programs["_selector"].info.run_count
        assert runs == number, "once a datagram, and once a connection (no SYN cookies here)"
    shares = np.bincount([*found.values()], minlength=5) / number
    assert shares.min() > 0.13
    assert shares.max() < 0.27


def test_a_mapped_address_is_the_ipv4_one(root: Path) -> None:
    with Modulo(root, size=128) as shared:
        for address in random_senders("0.0.0.0/0", 300):
            assert shared.index(IPv6Address(f"::ffff:{address}")) == shared.index(address)
        neighbours = {shared.index(IPv6Address(f"2001:db8::{last:x}")) for last in range(300)}
        assert len(neighbours) > 100, "the hosts of one network are not one sender"


@kinds
def test_an_empty_slot_refuses_its_senders_and_no_others(stage: Stage, root: Path, kind: int) -> None:
    senders = random_senders("127.0.0.0/8", 60)
    with Modulo(root, size=2) as shared:
        members = serve(stage, kind, "127.0.0.1", 2)
        join(shared, members)
        shared.unregister(1, "tcp" if kind == TCP else "udp")
        shared.unregister(1, "tcp" if kind == TCP else "udp")
        mine = [sender for sender in senders if shared.index(sender) == 0]
        assert 10 < len(mine) < 50
        assert set(came_to(kind, members, mine, ("127.0.0.1", PORT)).values()) == {0}
        for sender in set(senders) - set(mine):
            assert refused(kind, sender, ("127.0.0.1", PORT))
        members[1].close()
        members[0].close()
        assert shared.members("tcp") == shared.members("udp") == {}, "a closed socket's slot empties itself"


def test_a_slot_is_taken_over_only_when_that_is_said(stage: Stage, root: Path) -> None:
    with Modulo(root, size=2) as shared, Modulo(root) as other:
        members = serve(stage, UDP, "127.0.0.1", 3)
        join(shared, {slot: members[slot] for slot in range(2)})
        cookies = {slot: cookie_of(members[slot]) for slot in range(3)}
        assert other.members("udp") == {0: cookies[0], 1: cookies[1]}
        assert other.members("tcp") == {}
        shared.register(1, members[1])
        other.register(1, members[1], take_over=True)
        assert shared.members("udp") == {0: cookies[0], 1: cookies[1]}, "the same once more changes nothing"
        with pytest.raises(StateError, match=f"udp slot 1 is taken by the socket {cookies[1]} .*or say take_over"):
            other.register(1, members[2])
        with pytest.raises(SocketRefusedError, match="port 7007: it has a slot, or is in a SOCKMAP, already"):
            other.register(1, members[0], take_over=True)
        other.register(1, members[2], take_over=True)
        assert shared.members("udp") == {0: cookies[0], 1: cookies[2]}
        senders = [sender for sender in random_senders("127.0.0.0/8", 50) if shared.index(sender) == 1]
        assert set(came_to(UDP, members, senders, ("127.0.0.1", PORT)).values()) == {2}


def test_after_a_resize_senders_come_by_the_new_size_and_as_many_move_as_was_said(stage: Stage, root: Path) -> None:
    senders = random_senders("127.0.0.0/8", 2000)
    with Modulo(root, size=4) as shared, Modulo(root, size=4) as other:
        members = serve(stage, UDP, "127.0.0.1", 5)
        join(shared, {slot: members[slot] for slot in range(4)})
        before = came_to(UDP, members, senders, ("127.0.0.1", PORT))
        with pytest.raises(ValueError, match="slot 4: size is 4, so give 0 to 3"):
            shared.register(4, members[4])
        share = shared.resize(5)
        assert share == moved(4, 5)
        shared.register(4, members[4])
        after = came_to(UDP, members, senders, ("127.0.0.1", PORT))
        assert after == {sender: shared.index(sender) for sender in senders}
        changed = sum(before[sender] != after[sender] for sender in senders) / len(senders)
        assert abs(changed - share) < 0.05
        with pytest.raises(StateError, match="size is 5 there, 4 here"):
            other.register(0, members[0])
        for size in (0, 129):
            with pytest.raises(ValueError, match=f"size {size}: give 1 to 128"):
                shared.resize(size)


@pytest.mark.parametrize(
    ("before", "after", "share"), [(4, 4, 0.0), (4, 5, 0.8), (5, 4, 0.8), (4, 8, 0.5), (1, 128, 1 - 1 / 128)]
)
def test_the_share_that_moves_is_what_counting_gives(before: int, after: int, share: float) -> None:
    hashes = np.arange(before * after * 10)
    assert moved(before, after) == pytest.approx(share)
    assert np.mean(hashes % before != hashes % after) == pytest.approx(share)


def test_the_first_packet_sets_what_user_space_has_left_zero(stage: Stage, root: Path) -> None:
    """As the original does; whoever opens the maps then finds 128 and some nonce."""
    with Object(compiled("modulo"), "modulo", pin_root=root) as alone:
        alone.load()
        members = serve(stage, UDP, "127.0.0.1", 1)
        members[0].setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, alone.programs["_selector"].fileno())
        assert refused(UDP, ip_address("127.0.0.9"), ("127.0.0.1", PORT))
        with Modulo(root) as shared:
            assert shared.size == 128
            assert shared.nonce == alone.maps["nonce"][0] != 0
            shared.register(shared.index(ip_address("127.0.0.9")), members[0])
            assert len(came_to(UDP, members, [ip_address("127.0.0.9")], ("127.0.0.1", PORT))) == 1


def test_those_that_share_a_root_agree_or_are_refused_with_both_numbers(root: Path) -> None:
    with Modulo(root, size=4, nonce=7) as first:
        for options in ({}, {"size": 4}, {"nonce": 7}):
            with Modulo(root, **options) as again:
                assert (again.size, again.nonce) == (4, 7)
        with pytest.raises(StateError, match=rf"^.*size is 4 there, 8 here: all that share {root} must agree: give 4"):
            Modulo(root, size=8)
        with pytest.raises(StateError, match="nonce is 7 there, 9 here"):
            Modulo(root, nonce=9)
        assert (first.size, first.nonce) == (4, 7)
    with Modulo(root) as later:
        assert (later.size, later.nonce) == (4, 7), "the pins outlive their makers"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"size": 0}, "size 0: give 1 to 128"),
        ({"size": 129}, "size 129: give 1 to 128"),
        ({"nonce": 0}, r"nonce 0: give 1 to 4294967295; 0 is none"),
        ({"nonce": 1 << 32}, "nonce 4294967296: give 1 to"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(root: Path, options: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Modulo(root, **options)
    assert not root.exists()


def test_sockets_that_cannot_be_members_are_refused_with_the_cure(stage: Stage, root: Path) -> None:
    with Modulo(root, size=2) as shared:
        alone = stage.bind(UDP, "127.0.0.1", 9000)
        late = stage.bind(UDP, "127.0.0.1", 9001)
        late.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for sock in (alone, late):
            with pytest.raises(SocketRefusedError, match=r"127\.0\.0\.1 port 900.* set SO_REUSEPORT before bind"):
                shared.attach(sock)
            with pytest.raises(SocketRefusedError, match=r"127\.0\.0\.1 port 900.* set SO_REUSEPORT before bind"):
                shared.register(0, sock)
        (member,) = serve(stage, UDP, "127.0.0.1", 1).values()
        for index in (-1, 2):
            with pytest.raises(ValueError, match=f"slot {index}: size is 2, so give 0 to 1"):
                shared.register(index, member)
        with pytest.raises(ValueError, match="slot 128: give 0 to 127"):
            shared.unregister(128, "udp")
        with pytest.raises(ValueError, match="protocol 'sctp': give tcp or udp"):
            shared.members("sctp")  # type: ignore[arg-type] # that is the point
        assert shared.members("udp") == {}


@kinds
def test_attaching_too_early_is_refused_with_the_reason(root: Path, stage: Stage, kind: int) -> None:
    with Modulo(root) as shared, socket.socket(socket.AF_INET, kind) as unbound:
        unbound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(SocketRefusedError, match=r"attach after bind\(\), and of TCP after listen\(\).*EADDRINUSE"):
            shared.attach(unbound)
        with pytest.raises(SocketRefusedError, match=r"register it after (bind|listen)\(\)"):
            shared.register(0, unbound)
        unbound.bind(("127.0.0.1", PORT))
        if kind == TCP:
            with pytest.raises(SocketRefusedError, match=r"attach after bind\(\), and of TCP after listen\(\)"):
                shared.attach(unbound)
            unbound.listen()
        shared.attach(unbound)
        shared.register(0, unbound)


def test_an_mptcp_listener_is_refused_by_name_with_the_cure(root: Path, stage: Stage) -> None:
    with Modulo(root) as shared, socket.socket(socket.AF_INET, TCP, IPPROTO_MPTCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", PORT))
        listener.listen()
        with pytest.raises(SocketRefusedError, match=r"is an MPTCP listener.*GODEBUG=multipathtcp=0"):
            shared.attach(listener)
        with pytest.raises(SocketRefusedError, match=r"is an MPTCP listener.*GODEBUG=multipathtcp=0"):
            shared.register(0, listener)


def test_a_root_that_is_no_place_for_maps_is_refused(bpffs: Path, root: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"is in no BPF file system: give a directory of one, as /sys/fs/bpf/pmacct"):
        Modulo(tmp_path / "pmacct")
    with pytest.raises(StateError, match=r"no/where does not exist"):
        Modulo(bpffs / "no" / "where" / "maps")
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(StateError, match="others may write there"):
        Modulo(root)
    root.chmod(0o755)
    (bpffs / "link").symlink_to(root)
    with pytest.raises(StateError, match="link is not a directory of yours to change"):
        Modulo(bpffs / "link")
    assert [*root.iterdir()] == [*tmp_path.iterdir()] == []


def test_maps_of_another_layout_are_refused_and_left(root: Path) -> None:
    root.mkdir(0o755)
    with Map.array("size", np.uint64, 2) as other:
        other.pin(root / "size")
    with pytest.raises(StateError, match=r"size has another layout: type 2, 4 and 8 bytes, 2 entries there, type 2, 4"):
        Modulo(root)
    assert [entry.name for entry in root.iterdir()] == ["size"]


def as_nobody(root: Path) -> str:
    """What opening a root comes to in a process of another user."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            Modulo(root).close()
        except OSError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


def test_it_takes_cap_bpf_and_a_root_of_ones_own(bpffs: Path, root: Path, stage: Stage) -> None:
    bpffs.chmod(0o777)
    assert "run as root, or with CAP_BPF" in as_nobody(bpffs / "mine")
    assert not (bpffs / "mine").exists(), "nothing is left where nothing was"
    members = serve(stage, UDP, "127.0.0.1", 1)
    with only(CAP_BPF), Modulo(root, size=1) as shared:
        with only():
            join(shared, members)
        shared.unregister(0, "udp")
    for mode in (0o755, 0o700):
        root.chmod(mode)
        assert "reuseport is not a directory of yours to change: " in as_nobody(root)


def test_a_root_is_destroyed_only_when_no_slot_is_taken(stage: Stage, root: Path) -> None:
    with Modulo(root) as shared:
        members = serve(stage, UDP, "127.0.0.1", 1)
        shared.register(3, members[0])
        with pytest.raises(StateError, match="is in use, slots udp 3: unregister or close their sockets"):
            shared.destroy()
        assert sorted(entry.name for entry in root.iterdir()) == NAMES
        shared.unregister(3, "udp")
        (root / "mine").mkdir()
        shared.destroy()
        assert [entry.name for entry in root.iterdir()] == ["mine"]
        (root / "mine").rmdir()
        Modulo(root).close()
        shared.destroy()
        assert not root.exists()
        with pytest.raises(StateError, match="does not exist"):
            shared.destroy()


def test_the_object_is_written_whole_and_over_nothing(tmp_path: Path, root: Path) -> None:
    target = tmp_path / "selector.o"
    write_object(target)
    with Object(target.read_bytes(), "peer", pin_root=root) as peer:
        assert sorted(peer.maps) == NAMES
        assert [*peer.programs] == ["_selector"]
    with pytest.raises(StateError, match=r"selector\.o exists already: remove it, or give another name"):
        write_object(target)
    assert target.read_bytes() == compiled("modulo")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_object(tmp_path / "nowhere" / "selector.o")


# Several at once, and those that die


def opening() -> None:
    """Open the root that each line of the standard input names, with what else it says; and tell what came of it."""
    for line in sys.stdin:
        path, *options = line.split()
        try:
            with Modulo(path, **{name: int(number) for name, number in (word.split("=") for word in options)}) as made:
                print(made.size, made.nonce, flush=True)
        except StateError as error:
            print(error, flush=True)


@contextmanager
def openers() -> Iterator[list[subprocess.Popen[str]]]:
    code = "from tests.kernel.test_modulo import opening; opening()"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.communicate()


def both(processes: list[subprocess.Popen[str]], *lines: str) -> list[str]:
    for process, line in zip(processes, lines, strict=True):
        assert process.stdin is not None
        process.stdin.write(f"{line}\n")
    return [process.stdout.readline().strip() for process in processes if process.stdout is not None]


def test_two_first_starts_at_once_agree_or_one_is_refused_with_both_numbers(bpffs: Path) -> None:
    with openers() as processes:
        both(processes, f"{bpffs}/warm", f"{bpffs}/warm")
        for number in range(20):
            said = both(processes, *[f"{bpffs}/free{number}"] * 2)
            assert said[0] == said[1]
            assert re.fullmatch(r"128 [1-9]\d*", said[0])
            said = both(processes, *[f"{bpffs}/sized{number} size={size}" for size in (4, 8)])
            (complaint,) = (each for each in said if "there" in each)
            (made,) = (each for each in said if "there" not in each)
            size = int(made.split()[0])
            assert f"size is {size} there, {12 - size} here" in complaint


def _dying(left: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that kills this process before the nth line of modulo.py, wherever that is."""

    def line(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal left
        left -= event == "line"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return line

    return lambda frame, _event, _argument: line if frame.f_code.co_filename == modulo.__file__ else None


@pytest.mark.parametrize("doing", ["open", "destroy"])
def test_whoever_is_killed_half_way_leaves_what_the_next_can_use(bpffs: Path, doing: str) -> None:
    for number in count(1):
        root = bpffs / f"{doing}{number}"
        child = os.fork()
        if child == 0:
            try:
                if doing == "open":
                    sys.settrace(_dying(number))
                    Modulo(root, size=6)
                else:
                    made = Modulo(root, size=6)
                    sys.settrace(_dying(number))
                    made.destroy()
            finally:
                os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with Modulo(root, size=6) as next_one:
            assert next_one.size == 6
            assert next_one.nonce
            assert sorted(entry.name for entry in root.iterdir()) == NAMES
            next_one.destroy()
        assert not root.exists()
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert number > 20


def test_maps_of_which_some_are_missing_are_completed(root: Path) -> None:
    with Modulo(root, size=6, nonce=5):
        (root / "udp_balancing_targets").unlink()
        (root / "nonce").unlink()
    with Modulo(root) as again:
        assert again.size == 6
        assert again.nonce not in (0, 5)
        assert sorted(entry.name for entry in root.iterdir()) == NAMES
