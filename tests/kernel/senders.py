"""Members of a group, many senders of random addresses, and to whom each of them came."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import numpy as np

from fastrecv.modulo import Modulo
from tests.kernel.steering import IP_FREEBIND, PORT, TCP, Stage

Address = IPv4Address | IPv6Address
_AT_ONCE = 100  # as many as a queue holds in any case


def serve(stage: Stage, kind: int, host: str, count: int, only6: bool = False) -> dict[int, socket.socket]:
    return {slot: stage.serve(str(slot), kind, host, PORT, reuseport=True, only6=only6) for slot in range(count)}


def join(shared: Modulo, members: dict[int, socket.socket]) -> None:
    shared.attach(members[0])
    for slot, member in members.items():
        shared.register(slot, member)


def random_senders(prefix: str, count: int) -> list[Address]:
    """Different addresses of a prefix."""
    network, rng = ip_network(prefix), np.random.default_rng(count)
    host = (1 << network.max_prefixlen - network.prefixlen) - 1
    found: dict[Address, None] = {}
    while len(found) < count:
        found[ip_address(int(network.network_address) | int.from_bytes(rng.bytes(16)) & host)] = None
    return list(found)


def send(kind: int, senders: Sequence[Address], target: tuple[str, int]) -> Iterator[socket.socket]:
    """From each sender a datagram, or a connection, which is refused or stands when it is given."""
    for sender in senders:
        family = socket.AF_INET if sender.version == 4 else socket.AF_INET6
        with socket.socket(family, kind) as client:
            client.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
            client.settimeout(5)
            client.bind((str(sender), 0))
            client.connect(target)
            client.send(b"?")
            yield client


def refused(kind: int, sender: Address, target: tuple[str, int]) -> bool:
    """Whether a datagram, or a connection, is answered with a refusal; otherwise nothing answers."""
    try:
        for client in send(kind, [sender], target):
            client.settimeout(0.2)
            client.recv(1)
    except ConnectionRefusedError:
        return True
    except TimeoutError:
        pass
    return False


def take(kind: int, members: Mapping[int, socket.socket], count: int) -> dict[Address, int]:
    """The next `count` senders that come to members of this process, and to whom."""
    found: dict[Address, int] = {}
    deadline = time.monotonic() + 5
    while len(found) < count:
        left = deadline - time.monotonic()
        ready = select.select([*members.values()], [], [], max(left, 0))[0]
        assert ready, f"{len(found)} of {count} came"
        for slot, member in members.items():
            if member not in ready:
                continue
            if kind == TCP:
                accepted, peer = member.accept()
                accepted.close()
            else:
                peer = member.recvfrom(9)[1]
            sender = plain(peer[0])
            assert sender not in found, f"{sender} came twice"
            found[sender] = slot
    return found


def plain(text: str) -> Address:
    """An address as it was on the wire: a dual-stack socket maps IPv4."""
    address = ip_address(text)
    return (address.ipv4_mapped if isinstance(address, IPv6Address) else None) or address


def came_to(
    kind: int, members: Mapping[int, socket.socket], senders: Sequence[Address], target: tuple[str, int]
) -> dict[Address, int]:
    """Which member each sender comes to; all come, and each once."""
    found: dict[Address, int] = {}
    for start in range(0, len(senders), _AT_ONCE):
        some = senders[start : start + _AT_ONCE]
        clients = send(kind, some, target)
        if kind == TCP:  # a queue is short
            for _ in clients:
                found |= take(kind, members, 1)
        else:
            for _ in clients:
                pass
            found |= take(kind, members, len(some))
    assert not select.select([*members.values()], [], [], 0)[0], "more came than were sent"
    return found
