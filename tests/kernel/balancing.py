"""Balanced groups under test: members in a stage's namespace, senders, and whom a packet of each comes to."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address

import numpy as np
import pytest

from fastrecv.balance import Balancer
from fastrecv.policies import BUCKETS, Sender
from tests.kernel.steering import IP_FREEBIND, PORT, TCP, UDP, Stage

# The address that members are bound to, and the network that clients and servers are in.
FAMILIES = {
    "ipv4": ("0.0.0.0", "198.51.100.{}"),  # noqa: S104 - a private namespace
    "ipv6": ("::", "2001:db8:7::{:x}"),
    "dual": ("::", "198.51.100.{}"),
}
families = pytest.mark.parametrize("family", FAMILIES)
AT_ONCE = 100  # datagrams that a queue takes whatever its buffer is


def group(stage: Stage, kind: int, family: str, count: int) -> list[socket.socket]:
    """Members of one group; each is the server that is called by its number."""
    found = [
        stage.serve(str(number), kind, FAMILIES[family][0], PORT, reuseport=True, only6=family == "ipv6")
        for number in range(count)
    ]
    for member in found:
        member.setblocking(kind == TCP)
    return found


def balanced(stage: Stage, balancer: Balancer, kind: int, family: str, count: int) -> list[socket.socket]:
    """Members in the slots from 0 on, with the program attached, and equal shares of the senders."""
    members = group(stage, kind, family, count)
    balancer.attach(members[0])
    for slot, member in enumerate(members):
        balancer.register(slot, member)
    balancer.weigh(dict.fromkeys(range(count), 1))
    return members


def senders(family: str, count: int, payload: Callable[[int], bytes] = lambda _: b"?") -> list[Sender]:
    rng, net = np.random.default_rng(count), FAMILIES[family][1]
    return [
        Sender(
            ip_address(net.format(1 + int(rng.integers(120)))), 10_000 + number,
            ip_address(net.format(130 + int(rng.integers(60)))), PORT, payload(number),
        )
        for number in range(count)
    ]  # fmt: skip


def taker(stage: Stage, kind: int, sender: Sender) -> int | None:
    """The member that gets a datagram or a connection of the sender; None where it is refused."""
    with stage.bind(kind, str(sender.source), sender.source_port) as client:
        try:
            client.connect((str(sender.destination), sender.destination_port))
            client.send(sender.payload)
            ready = select.select([client, *stage.servers.values()], [], [], 5)[0]
            if client in ready:
                client.recv(1)
            (server,) = ready
        except ConnectionRefusedError:
            return None
        (name,) = (name for name, known in stage.servers.items() if known is server)
        if kind == TCP:
            server.accept()[0].close()
        else:
            server.recv(99)
        return int(name)


def takers(stage: Stage, asked: Sequence[Sender]) -> list[int | None]:
    """The members that get a datagram of each sender, sent from a socket that no other uses; None: nobody did."""
    found: dict[tuple[str, int], int] = {}
    for first in range(0, len(asked), AT_ONCE):
        for sender in asked[first : first + AT_ONCE]:
            family = socket.AF_INET if sender.source.version == 4 else socket.AF_INET6
            with socket.socket(family, UDP) as client:
                client.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
                client.bind((str(sender.source), sender.source_port))
                client.sendto(sender.payload, (str(sender.destination), sender.destination_port))
        found |= dict(arrivals(stage))
    return [found.get((str(sender.source), sender.source_port)) for sender in asked]


def homes(balancer: Balancer, asked: Sequence[Sender]) -> list[int]:
    """The slots that senders have by their hash and the table in force."""
    table = balancer.maps.table()
    return [int(table[balancer.policy.hash(sender) % BUCKETS]) for sender in asked]


def arrivals(stage: Stage) -> Iterator[tuple[tuple[str, int], int]]:
    """What waits in the servers' queues: from whom, and whose it is."""
    for name, server in stage.servers.items():
        while True:
            try:
                _, peer = server.recvfrom(99)
            except BlockingIOError:
                break
            yield (peer[0].removeprefix("::ffff:"), peer[1]), int(name)


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def counted(balancer: Balancer, name: str) -> dict[int | None, int]:
    return {slot: counts[name] for slot, counts in balancer.counters().items() if counts[name]}


@contextlib.contextmanager
def again_and_again(*steps: Callable[[], object]) -> Iterator[Counter[str]]:
    """Do these in turn in a thread of its own; gives how often all were done."""
    ended, done = threading.Event(), Counter[str]()

    def work() -> None:
        while not ended.is_set():
            for step in steps:
                step()
            done["rounds"] += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield done
    finally:
        ended.set()
        thread.join()


def flood(stage: Stage, count: int) -> Counter[int]:
    """Send from connected sockets, which hear of every refusal; whose members got them."""
    clients = [stage.bind(UDP, f"198.51.100.{last}", 0) for last in range(1, 21)]
    for client in clients:
        client.connect(("198.51.100.200", PORT))
    found = Counter[int]()
    for number in range(count):
        clients[number % len(clients)].send(b"?")
        if number % 50 == 49:
            found.update(name for _, name in arrivals(stage))
    found.update(name for _, name in arrivals(stage))
    return found
