"""Opening sockets, their options, and multicast groups over loopback."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastrecv import ENDPOINT, Receiver, sockets

GROUP, OTHER = "239.192.7.1", "239.192.7.2"


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket(type=socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.1", 0))
        yield made


def test_a_receive_buffer_grows_and_never_shrinks(sock: socket.socket) -> None:
    before = sockets.receive_buffer(sock)
    grown = sockets.grow_receive_buffer(sock, before)
    assert grown == sockets.receive_buffer(sock)
    assert grown >= before
    assert sockets.grow_receive_buffer(sock, 10) == grown


def test_without_the_privilege_the_kernels_limit_is_what_is_read_back(
    sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "_SO_RCVBUFFORCE", socket.SO_RCVBUF)  # what is left without CAP_NET_ADMIN
    limit = int(Path("/proc/sys/net/core/rmem_max").read_text())
    assert sockets.grow_receive_buffer(sock, 1 << 30) == 2 * min(limit, 1 << 30)


def test_sockets_may_share_a_port_when_all_of_them_say_so() -> None:
    with Receiver.bind(("127.0.0.1", 0), reuse_port=True) as first:
        with Receiver.bind(first.address, reuse_port=True) as second:
            assert second.address == first.address
        with pytest.raises(OSError, match=r"cannot bind to 127.0.0.1 port \d+: Address already in use"):
            Receiver.bind(first.address)


def test_an_empty_host_is_every_ipv4_address() -> None:
    with sockets.open_datagram(("", 0)) as made:
        assert made.getsockname()[0] == "0.0.0.0"  # noqa: S104 - as documented


@pytest.mark.parametrize("address", [("localhost", 1), ("1.2.3", 1), ("::g", 1)])
def test_a_host_is_an_address(address: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match="is no numeric IPv4 or IPv6 address"):
        sockets.open_datagram(address)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (9000, "the address is 9000: give"),
        (None, "the address is None: give"),
        (("127.0.0.1",), "the address is .*: give"),
        (("127.0.0.1", "53"), "the port is '53': give a number"),
        (("127.0.0.1", 70000), "the port is 70000: give a number"),
        ("", "the address is empty"),
        ("0.0.0.0", "would be the path of an AF_UNIX socket: for UDP give"),  # noqa: S104 - it is refused
        ("127.0.0.1:9000", "would be the path of an AF_UNIX socket: for UDP give"),
        ("::1", "would be the path of an AF_UNIX socket: for UDP give"),
        ("[::1]:53", "would be the path of an AF_UNIX socket: for UDP give"),
        ("x" * 108, "is too long for the path of a socket: 107 bytes at most"),
    ],
)
def test_an_address_that_cannot_be_one_is_refused(address: object, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        sockets.open_datagram(address)  # type: ignore[arg-type] # that is the test


def test_addresses_become_endpoints() -> None:
    made = sockets.endpoints([("192.0.2.1", 53), ("2001:db8::1", 54), ("fe80::1", 55, 0, 7)])
    assert made.dtype == ENDPOINT
    assert made["port"].tolist() == [53, 54, 55]
    assert made["family"].tolist() == [socket.AF_INET, socket.AF_INET6, socket.AF_INET6]
    assert made["scope"].tolist() == [0, 0, 7]
    assert bytes(made["address"][0]) == bytes(10) + b"\xff\xff\xc0\x00\x02\x01"
    assert made["address"][:, 12:].view(">u4")[0, 0] == 0xC0000201
    assert len(sockets.endpoints([])) == 0


def test_a_filter_that_drops_everything_is_counted_and_keeps_the_queue(sock: socket.socket) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as peer:
        peer.sendto(b"kept", sock.getsockname())
        sockets.drop_everything(sock)
        peer.sendto(b"dropped", sock.getsockname())
        assert sock.recv(10, socket.MSG_DONTWAIT) == b"kept"
        with pytest.raises(BlockingIOError):
            sock.recv(10, socket.MSG_DONTWAIT)
        assert sockets.drops(sock) == 1


def test_the_options_of_busy_polling_and_cpus_are_set() -> None:
    where = ("127.0.0.1", 0)
    cpu = min(os.sched_getaffinity(0))
    try:
        made = Receiver.bind(where, busy_poll=50, prefer_busy_poll=True, busy_poll_budget=16, incoming_cpu=cpu)
    except PermissionError:
        pytest.skip("raising busy polling takes CAP_NET_ADMIN")
    with made:
        # SO_BUSY_POLL, SO_PREFER_BUSY_POLL, SO_INCOMING_CPU; the budget cannot be read back
        options = [made.socket.getsockopt(socket.SOL_SOCKET, number) for number in (46, 69, 49)]
    assert options == [50, 1, cpu]


def send_to(group: str, port: int, source: str) -> None:
    """One datagram to a group by way of loopback; it says where it is from."""
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.bind((source, 0))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(source))
        sock.sendto(source.encode(), (group, port))


def test_a_group_from_any_source() -> None:
    with Receiver.bind(("", 0), destinations=True) as joined, Receiver.bind(("", 0)) as other:
        joined.join(GROUP, interface="lo")
        other.join(OTHER, interface=socket.if_nametoindex("lo"))
        for receiver in (joined, other):
            send_to(GROUP, receiver.address[1], "127.0.0.1")
        batch = joined.recv(5)
        assert [bytes(view) for view, _ in batch] == [b"127.0.0.1"]
        assert batch.destination(0) == (GROUP, 0)
        assert not other.recv(0.05)  # the group that another socket of this host has joined
        assert joined.reply(batch, [b"answer"]) == 1  # from an address of its own: a group cannot send
        joined.leave(GROUP, interface="lo")
        send_to(GROUP, joined.address[1], "127.0.0.1")
        assert not joined.recv(0.05)


def test_a_dual_stack_socket_answers_a_group_and_a_broadcast_from_an_address_of_its_own() -> None:
    with Receiver.bind(("::", 0), destinations=True) as receiver, socket.socket(type=socket.SOCK_DGRAM) as client:
        receiver.join(GROUP, interface="lo")
        client.bind(("127.0.0.1", 0))
        client.settimeout(5)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        client.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        for asked in (GROUP, "127.255.255.255"):
            client.sendto(b"?", (asked, receiver.address[1]))
            batch = receiver.recv(5)
            assert batch.destination(0) == (f"::ffff:{asked}", 0, 0, socket.if_nametoindex("lo"))
            assert receiver.reply(batch, [b"!"]) == 1
            assert client.recvfrom(9) == (b"!", ("127.0.0.1", receiver.address[1]))


def test_a_group_from_one_source_only() -> None:
    with Receiver.bind(("", 0)) as receiver:
        receiver.join(GROUP, interface="lo", source="127.0.0.2")
        for source in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
            send_to(GROUP, receiver.address[1], source)
        assert [bytes(view) for view, _ in receiver.recv(5)] == [b"127.0.0.2"]
        receiver.leave(GROUP, interface="lo", source="127.0.0.2")
        with pytest.raises(OSError, match=r"cannot leave 239[.]192[.]7[.]1 on lo: "):
            receiver.leave(GROUP, interface="lo", source="127.0.0.2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("192.0.2.1",), "192.0.2.1 is no multicast group"),
        (("all",), "'all' is no numeric IPv4 or IPv6 address"),
        (("ff02::1",), "a socket of family AF_INET cannot join ff02::1"),
    ],
)
def test_what_cannot_be_joined_is_refused(arguments: tuple[str], words: str) -> None:
    with Receiver.bind(("", 0)) as receiver, pytest.raises(ValueError, match=words):
        receiver.join(*arguments)


def test_a_membership_names_an_interface_and_is_had_once() -> None:
    with Receiver.bind(("", 0)) as receiver:
        with pytest.raises(ValueError, match="no interface 'nope0' here"):
            receiver.join(GROUP, interface="nope0")
        receiver.join(GROUP, interface="lo")
        with pytest.raises(OSError, match="it is joined already"):
            receiver.join(GROUP, interface="lo")
        with pytest.raises(OSError, match="it is not joined so"):
            receiver.leave(OTHER, interface="lo")


def test_a_source_of_another_ip_version_is_refused() -> None:
    with Receiver.bind(("", 0)) as receiver, pytest.raises(ValueError, match="are of different IP versions"):
        receiver.join("232.1.1.1", source="::1")


def test_the_dtype_of_endpoints_is_what_is_documented() -> None:
    assert ENDPOINT.itemsize == 24
    assert ENDPOINT.names == ("address", "port", "family", "scope")
    assert ENDPOINT["address"].shape == (16,)
    assert np.dtype(ENDPOINT).isalignedstruct is False
