"""A patched pmacct's way (peer.c, plain libbpf) and ours in one reuseport group, by four pinned maps and nothing else.

Every sender must come to the process, and there to the socket, that Modulo.index names.
"""

from __future__ import annotations

import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from fastrecv.errors import SocketRefusedError, StateError
from fastrecv.modulo import Modulo, Protocol, write_object
from fastrecv.steerable import cookie_of
from tests.kernel.senders import Address, plain, random_senders, refused, send
from tests.kernel.steering import PORT, TCP, UDP, Stage

SIZE = 4
SENDERS: dict[int, int] = {UDP: 1000, TCP: 200}
PROTOCOLS: dict[int, Protocol] = {UDP: "udp", TCP: "tcp"}
# What members are bound to, where senders are, and whom they ask.
IPV4 = ("127.0.0.1", "127.0.0.0/8", "127.0.0.1")
IPV6 = ("::", "fd00::/8", "fd00::1")
DUAL = ("::", "127.0.0.0/8", "127.0.0.1")

Peer = subprocess.Popen[str]
Peers = Callable[..., Peer]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("peer") / "peer"
    source = Path(__file__).with_name("peer.c")
    warnings = ("-Wall", "-Wextra", "-Werror")
    subprocess.run(["gcc", "-O2", *warnings, str(source), "-o", str(target), "-lbpf"], check=True)
    return target


@pytest.fixture
def root(bpffs: Path) -> Path:
    return bpffs / "pmacct"


@pytest.fixture
def peer(program: Path, root: Path, tmp_path: Path, stage: Stage) -> Iterator[Peers]:
    """Starts a peer in the stage's namespace; when this returns it is ready, or has ended as it had to."""
    write_object(tmp_path / "selector.o")
    started = []

    def start(
        kind: int, slot: int, when: str, size: int = SIZE, host: str = "127.0.0.1", fails: tuple[int, str] | None = None
    ) -> Peer:
        words = [program, tmp_path / "selector.o", root, PROTOCOLS[kind], host, PORT, slot, size, when]
        process = subprocess.Popen([*map(str, words)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != "ready\n":
            assert (process.wait(5), process.stderr.read().rstrip()) == fails
        else:
            assert fails is None
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ours(
    stage: Stage, shared: Modulo, kind: int, *slots: int, attaching: bool = True, host: str = "127.0.0.1"
) -> dict[int, socket.socket]:
    """Members of this process; `attaching` puts our program in the place of the peers'."""
    members = {slot: stage.serve(str(slot), kind, host, PORT, reuseport=True) for slot in slots}
    if attaching:
        shared.attach(members[slots[0]])
    for slot, member in members.items():
        shared.register(slot, member)
    return members


def told_by(process: Peer, seconds: float) -> Address | None:
    """The next sender that a peer names."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], seconds)[0]:
        return None
    return plain(process.stdout.readline().strip())


def assert_all_come_where_user_space_says(
    shared: Modulo, kind: int, members: dict[int, socket.socket], peers: dict[int, Peer],
    net: tuple[str, str, str] = IPV4,
) -> None:  # fmt: skip
    """Sender by sender: the one member that gets anything is the one named. In the end nobody has anything more."""
    senders = random_senders(net[1], SENDERS[kind])
    files = {process.stdout: slot for slot, process in peers.items()}
    readable: list[Any] = [*members.values(), *files]
    came = dict.fromkeys([*members, *peers], 0)
    for sender, client in zip(senders, send(kind, senders, (net[2], PORT)), strict=True):
        slot = shared.index(sender)
        ready = select.select(readable, [], [], 5)[0]
        assert ready == [members[slot] if slot in members else peers[slot].stdout], f"{sender} is of slot {slot}"
        if slot in peers:
            assert told_by(peers[slot], 0) == sender
        elif kind == TCP:
            accepted, source = members[slot].accept()
            accepted.close()
            assert plain(source[0]) == sender
        else:
            assert plain(members[slot].recvfrom(9)[1][0]) == sender
        came[slot] += 1
        assert client.fileno() >= 0
    assert sum(came.values()) == len(senders)
    assert min(came.values()) > len(senders) / len(came) / 2, "all have senders"
    assert not select.select(readable, [], [], 0.1)[0]


@pytest.mark.parametrize(("kind", "when"), [(TCP, "after-listen"), (UDP, "after-bind")], ids=["tcp", "udp"])
@pytest.mark.parametrize("net", [IPV4, IPV6, DUAL], ids=["ipv4", "ipv6", "dual"])
@pytest.mark.parametrize("order", ["peers first", "ours first", "peers attach last"])
def test_peers_and_ours_share_a_group_whoever_comes_first(
    stage: Stage, root: Path, peer: Peers, kind: int, when: str, net: tuple[str, str, str], order: str
) -> None:
    """Whoever sets nonce and size, and whoever's copy of the program is in force: the last to attach."""
    with IPRoute() as routes:
        routes.route("add", dst="fd00::/8", family=socket.AF_INET6, oif=1, type="local", table=255)
    host = net[0]
    if order == "peers first":
        peers = {slot: peer(kind, slot, when, host=host) for slot in (2, 3)}
        with Modulo(root) as shared:
            assert shared.size == SIZE, "as the peers have said"
            assert [*shared.members("tcp" if kind == TCP else "udp")] == [2, 3]
            members = ours(stage, shared, kind, 0, 1, host=host)
            assert_all_come_where_user_space_says(shared, kind, members, peers, net)
    else:
        with Modulo(root, size=SIZE) as shared:
            members = ours(stage, shared, kind, 0, 1, host=host)
            nonce = shared.nonce
            peers = {slot: peer(kind, slot, when, host=host) for slot in (2, 3)}
            assert (shared.size, shared.nonce) == (SIZE, nonce), "peers take what is there"
            if order == "ours first":
                shared.attach(members[0])
            assert_all_come_where_user_space_says(shared, kind, members, peers, net)


def test_a_peer_that_attaches_before_bind_is_the_first_member_and_no_other_can_do_so(
    stage: Stage, root: Path, peer: Peers
) -> None:
    """As the original nfacctd does, over UDP.

    Attaching to a socket that is not bound makes a group of it alone, there and then (reuseport_attach_prog in
    net/core/sock_reuseport.c). bind() lets a socket share a port only with SO_REUSEPORT on both sides *and* while it is
    in no group yet (udp_lib_lport_inuse in net/ipv4/udp.c). With nobody on the port nothing is to be shared, so the
    first such member starts; each later one fails with EADDRINUSE, whoever was first. Members that attach after bind(),
    or, like ours at the beginning, not at all, join as ever.
    """
    first = peer(UDP, 2, "before-bind", size=3)
    with Modulo(root, size=3) as shared:
        assert [*shared.members("udp")] == [2]
        members = ours(stage, shared, UDP, 0, 1, attaching=False)
        assert_all_come_where_user_space_says(shared, UDP, members, {2: first})
        peer(UDP, 1, "before-bind", size=3, fails=(3, "bind: Address already in use"))
        assert shared.members("udp")[1] == cookie_of(members[1]), "the one that failed has taken nobody's slot"
        shared.attach(members[1])
        assert_all_come_where_user_space_says(shared, UDP, members, {2: first})


@pytest.mark.parametrize(("kind", "when"), [(UDP, "before-bind"), (TCP, "before-bind"), (TCP, "after-bind")])
def test_after_ours_a_peer_that_attaches_too_early_cannot_join(
    stage: Stage, root: Path, peer: Peers, kind: int, when: str
) -> None:
    """TCP asks once more at listen() (inet_csk_listen_start): between bind() and listen() is too early, too.

    The group goes on without it.
    """
    with Modulo(root, size=2) as shared:
        members = ours(stage, shared, kind, 0, 1)
        failed = "listen" if when == "after-bind" else "bind"
        peer(kind, 1, when, size=2, fails=(3, f"{failed}: Address already in use"))
        assert_all_come_where_user_space_says(shared, kind, members, {})


def test_a_size_that_disagrees_is_refused_both_ways_round(stage: Stage, root: Path, peer: Peers) -> None:
    first = peer(UDP, 0, "after-bind", size=4)
    with pytest.raises(StateError, match=r"size is 4 there, 8 here: all that share .*pmacct must agree"):
        Modulo(root, size=8)
    peer(UDP, 1, "after-bind", size=8, fails=(2, "Mismatched count: configured 8, found 4"))
    first.kill()
    first.wait()
    with Modulo(root) as shared:
        shared.destroy()
    with Modulo(root, size=8) as shared:
        peer(UDP, 0, "after-bind", size=4, fails=(2, "Mismatched count: configured 4, found 8"))
        assert shared.size == 8
        assert shared.members("udp") == {}


def test_a_peer_that_dies_leaves_its_slot_empty_and_ours_may_take_it(stage: Stage, root: Path, peer: Peers) -> None:
    with Modulo(root, size=2) as shared:
        members = ours(stage, shared, UDP, 0)
        gone = peer(UDP, 1, "after-bind", size=2)
        senders = [sender for sender in random_senders("127.0.0.0/8", 20) if shared.index(sender) == 1]
        assert [told_by(gone, 5) for _ in send(UDP, senders, ("127.0.0.1", PORT))] == senders
        spare = stage.serve("spare", UDP, "127.0.0.1", PORT, reuseport=True)
        with pytest.raises(SocketRefusedError, match="slot 1 has socket sk:"):
            shared.register(1, spare)
        gone.kill()
        gone.wait()
        assert all(refused(UDP, sender, ("127.0.0.1", PORT)) for sender in senders)
        shared.register(1, spare)
        assert_all_come_where_user_space_says(shared, UDP, members | {1: spare}, {})
