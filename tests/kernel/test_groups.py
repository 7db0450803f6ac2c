"""Reuseport groups as the kernel tells them, against what was done to real sockets."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_address

import pytest

from fastrecv import groups
from fastrecv.errors import SocketRefusedError, StateError
from fastrecv.groups import CLASSIC, STATES, Groups, Lookout, Member, Owner
from fastrecv.netns import Namespace
from fastrecv.sockets import drops
from fastrecv.steerable import cookie_of
from tests.kernel.privileges import CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE, only
from tests.kernel.steering import PORT, SO_ATTACH_REUSEPORT_EBPF, TCP, UDP, Stage, kinds, nets

HOST = "198.51.100.1"
SO_ATTACH_REUSEPORT_CBPF, SO_DETACH_REUSEPORT_BPF, SO_INCOMING_CPU, SO_MEMINFO = 51, 68, 49, 55
NOBODY = 65534


@pytest.fixture
def reader(stage: Stage) -> Iterator[Groups]:
    with Groups() as opened:
        yield opened


def of(sock: socket.socket, seen: list[Member]) -> Member:
    (found,) = (one for one in seen if one.cookie == cookie_of(sock))
    return found


def opened(stage: Stage, kind: int, count: int, host: str = HOST, port: int = PORT) -> list[socket.socket]:
    found = [stage.bind(kind, host, port, reuseport=True) for _ in range(count)]
    for sock in found:
        if kind == TCP:
            sock.listen()
    return found


def attach_classic(member: socket.socket) -> None:
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K, index 0
    classic = struct.pack("HP", 1, ctypes.addressof(instruction))
    member.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, classic)


@kinds
@nets
def test_every_member_is_told_with_its_place(stage: Stage, reader: Groups, kind: int, net: str) -> None:
    sockets = opened(stage, kind, 3, net.format(1))
    seen = reader.members()
    assert [one.cookie for one in seen] == [cookie_of(sock) for sock in sockets]
    for index, (one, sock) in enumerate(zip(seen, sockets, strict=True)):
        assert (one.index, one.size, one.room, one.group) == (index, 3, 128, cookie_of(sockets[0]))
        assert (one.family, one.protocol) == (sock.family, 6 if kind == TCP else 17)
        assert (one.address, one.port, one.peer) == (ip_address(net.format(1)), PORT, None)
        assert STATES[one.state] == ("LISTEN" if kind == TCP else "CLOSE")
        assert (one.inode, one.uid) == (os.fstat(sock.fileno()).st_ino, 0)
        assert (one.queue, one.drops, one.program, one.reuse_port) == (0, 0, None, True)
        assert one.limit == (128 if kind == TCP else sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))


def test_groups_of_other_addresses_protocols_and_families_are_other_groups(stage: Stage, reader: Groups) -> None:
    made = [
        opened(stage, UDP, 2), opened(stage, UDP, 2, "198.51.100.2"), opened(stage, TCP, 2),
        opened(stage, UDP, 2, "2001:db8:7::1"), opened(stage, UDP, 2, port=PORT + 1),
    ]  # fmt: skip
    seen = reader.members()
    assert len(seen) == 10
    for sockets in made:
        assert [of(sock, seen).group for sock in sockets] == [cookie_of(sockets[0])] * 2
    assert len({one.number for one in seen}) == len(made)


def test_sockets_of_no_group_are_told_without_one(stage: Stage, reader: Groups) -> None:
    plain = [stage.serve("udp", UDP, HOST, 53), stage.serve("tcp", TCP, HOST, 80)]
    assert reader.members() == []
    for one in (of(sock, reader.sockets()) for sock in plain):
        assert (one.group, one.number, one.index, one.size, one.program) == (None, None, None, 0, None)
        assert not one.reuse_port


def test_the_queue_fills_overflows_and_is_emptied(stage: Stage, reader: Groups) -> None:
    first, second = opened(stage, UDP, 2)
    for sock in (first, second):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    second.setblocking(False)
    client = stage.bind(UDP, HOST, 0)
    sent = 0
    while drops(second) < 5:
        client.sendto(bytes(500), (HOST, PORT))
        client = stage.bind(UDP, HOST, 0)  # the kernel's hash chooses anew
        sent += 1
        assert sent < 1000
    full = of(second, reader.members())
    allocated = struct.unpack("=I", second.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 4))[0]
    assert full.queue == allocated > 4096
    assert full.limit == second.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    assert full.drops == drops(second) == 5
    for _ in range(100):
        try:
            second.recv(600)
        except BlockingIOError:
            break
    emptied = of(second, reader.members())
    assert (emptied.queue, emptied.drops) == (0, 5)


def test_connections_wait_in_the_accept_queue(stage: Stage, reader: Groups) -> None:
    listener = stage.bind(TCP, HOST, PORT, reuseport=True)
    listener.listen(7)
    clients = [stage.bind(TCP, HOST, 0) for _ in range(3)]
    for client in clients:
        client.connect((HOST, PORT))
    waiting = of(listener, reader.members())
    assert (waiting.queue, waiting.limit) == (3, 7)
    with listener.accept()[0]:
        assert of(listener, reader.members()).queue == 2


@kinds
def test_the_attached_program_is_named_and_a_classic_one_told_apart(stage: Stage, reader: Groups, kind: int) -> None:
    sockets = opened(stage, kind, 2)
    others = opened(stage, kind, 1, port=PORT + 1)
    assert groups.program_of(sockets[1]) is None
    with stage.opened(sockets) as scripted:
        program = scripted.programs["chooses"]
        sockets[0].setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, program.fileno())
        seen = reader.members()
        assert [of(sock, seen).program for sock in sockets] == [program.info.id] * 2
        assert of(others[0], seen).program is None
        assert groups.program_of(sockets[1]) == program.info.id
    attach_classic(sockets[1])
    assert [one.program for one in reader.members()] == [CLASSIC, CLASSIC, None]
    assert groups.program_of(sockets[0]) == CLASSIC
    sockets[0].setsockopt(socket.SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, 0)
    assert groups.program_of(sockets[0]) is None


@kinds
def test_when_a_member_closes_the_last_takes_its_place(stage: Stage, reader: Groups, kind: int) -> None:
    first, second, third, last = opened(stage, kind, 4)
    second.close()
    seen = reader.members()
    assert [(one.cookie, one.index) for one in seen] == [
        (cookie_of(first), 0), (cookie_of(last), 1), (cookie_of(third), 2),
    ]  # fmt: skip
    first.close()
    seen = reader.members()
    assert [one.cookie for one in seen] == [cookie_of(third), cookie_of(last)]
    assert {(one.group, one.size) for one in seen} == {(cookie_of(third), 2)}


def test_a_group_may_be_larger_than_the_kernel_first_made_room_for(stage: Stage, reader: Groups) -> None:
    opened(stage, UDP, 130)
    seen = reader.members()
    assert [one.index for one in seen] == list(range(130))
    assert {(one.size, one.room) for one in seen} == {(130, 256)}


def test_a_connected_socket_has_left_its_group(stage: Stage, reader: Groups) -> None:
    stays, goes = opened(stage, UDP, 2)
    goes.connect(("198.51.100.9", 4242))
    assert [one.cookie for one in reader.members()] == [cookie_of(stays)]
    gone = of(goes, reader.sockets())
    assert (gone.group, gone.peer, STATES[gone.state]) == (None, (ip_address("198.51.100.9"), 4242), "ESTABLISHED")
    assert groups.program_of(goes) is None


def test_dual_stack_sockets_are_told_from_those_for_ipv6_alone(stage: Stage, reader: Groups) -> None:
    both = stage.bind(UDP, "::", PORT, reuseport=True)
    alone = stage.bind(UDP, "::", PORT + 1, reuseport=True, only6=True)
    mapped = stage.bind(UDP, f"::ffff:{HOST}", PORT + 2, reuseport=True)
    seen = reader.members()
    assert (of(both, seen).address, of(both, seen).ipv6_only) == (ip_address("::"), False)
    assert (of(alone, seen).address, of(alone, seen).ipv6_only) == (ip_address("::"), True)
    assert of(mapped, seen).address == ip_address(f"::ffff:{HOST}")
    assert {one.family for one in seen} == {socket.AF_INET6}


def test_the_user_and_the_cpu_of_a_socket(stage: Stage, reader: Groups) -> None:
    os.seteuid(NOBODY)
    try:
        sock = stage.bind(UDP, HOST, PORT, reuseport=True)
    finally:
        os.seteuid(0)
    assert (of(sock, reader.members()).uid, of(sock, reader.members()).cpu) == (NOBODY, -1)
    sock.setsockopt(socket.SOL_SOCKET, SO_INCOMING_CPU, 1)
    assert of(sock, reader.members()).cpu == 1


def test_sockets_of_other_namespaces_are_seen_only_from_there(stage: Stage, reader: Groups) -> None:
    (here,) = opened(stage, UDP, 1)
    with closing(Namespace()) as other:
        with other:
            (there,) = opened(stage, UDP, 1)
            assert [one.cookie for one in reader.members()] == [cookie_of(there)]
            assert groups.program_of(there) is None
        assert [one.cookie for one in reader.members()] == [cookie_of(here)]
        assert [one.cookie for one in groups.members(f"/proc/self/fd/{other.fd}")] == [cookie_of(there)]
        with pytest.raises(StateError, match=f"udp {HOST} port {PORT} lives in another network namespace"):
            groups.program_of(there)


def test_a_socket_that_is_not_looked_up_has_no_group(stage: Stage) -> None:
    with pytest.raises(SocketRefusedError, match="is in no group: UDP is from bind"):
        groups.program_of(stage.bind(TCP, HOST, PORT, reuseport=True))


def test_reading_takes_cap_bpf_and_cap_perfmon_and_no_more(stage: Stage) -> None:
    (sock,) = opened(stage, UDP, 1)
    with only(CAP_BPF, CAP_PERFMON):
        assert [one.cookie for one in groups.members()] == [cookie_of(sock)]
        assert groups.program_of(sock) is None
    for held in (CAP_BPF, CAP_PERFMON):
        with only(held), pytest.raises(PermissionError, match="needs CAP_BPF and CAP_PERFMON: run as root"):
            groups.members()


@kinds
def test_a_lookout_needs_no_privilege_once_it_is_opened_and_sees_one_port(stage: Stage, kind: int) -> None:
    protocol = socket.IPPROTO_TCP if kind == TCP else socket.IPPROTO_UDP
    sockets = opened(stage, kind, 2)
    opened(stage, kind, 2, port=PORT + 1)
    opened(stage, UDP if kind == TCP else TCP, 1)
    with only(CAP_BPF), pytest.raises(PermissionError, match="reading reuseport groups needs CAP_BPF and CAP_PERFMON"):
        Lookout(protocol, PORT)
    with only(CAP_BPF, CAP_PERFMON):
        lookout = Lookout(protocol, PORT)
    with lookout, only():
        assert lookout.look().keys() == {cookie_of(sock) for sock in sockets}
        attach_classic(sockets[0])
        assert {one.program for one in lookout.look().values()} == {CLASSIC}
        sockets[0].setsockopt(socket.SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, 0)
        assert {one.program for one in lookout.look().values()} == {None}
        with Lookout.of(os.dup(lookout.fileno())) as again:
            lookout.close()
            assert again.look().keys() == {cookie_of(sock) for sock in sockets}
        with pytest.raises(ValueError, match="Link is closed"):
            again.look()
    with open(os.devnull) as other, pytest.raises(OSError, match="reading about a link"):  # noqa: PTH123 - a descriptor
        Lookout.of(other.fileno())


def test_a_closed_reader_reads_no_more(stage: Stage, reader: Groups) -> None:
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="BPF object groups is closed"):
        reader.members()


def test_owners_are_all_processes_that_hold_a_socket(stage: Stage) -> None:
    shared, own = opened(stage, UDP, 2)
    inodes = [os.fstat(sock.fileno()).st_ino for sock in (shared, own)]
    command = [sys.executable, "-c", "open('/proc/self/comm', 'w').write('a) worker'); print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[shared.fileno()]) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = groups.owners([*inodes, 1])
        me = found[inodes[1]][0]
        assert me.pid == os.getpid()
        assert found == {inodes[0]: sorted([me, Owner(child.pid, "a) worker")]), inodes[1]: [me]}
        with only():
            assert groups.owners(inodes) == {inode: [me] for inode in inodes}
        with only(CAP_SYS_PTRACE):
            assert groups.owners([*inodes, 1]) == found
        child.kill()
