"""Who receives in the AF_XDP bench: through the socket layer and past it, by Python and by C, on the same traffic.

Each has room for ROOM datagrams that nobody has read yet. A socket has more, since part of what was read is given back
late (udp_rmem_release, net/ipv4/udp.c).
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol

from fastrecv import Batch, Receiver, sockets
from fastrecv.bench.decoders import NETFLOW
from fastrecv.bench.floods import Flood
from fastrecv.bench.lab import Lab
from fastrecv.bench.limit import CLoop
from fastrecv.bench.prefill import ROOM_EACH, pattern
from fastrecv.bench.xsk_limit import XskLoop
from fastrecv.redirect import Redirect
from fastrecv.xdp import XdpReceiver

__all__ = ["CONTENDERS", "PAYLOADS", "RECEIVERS", "ROOM", "Contender", "Opened", "Stop"]

ROOM = 4096  # datagrams; the ring_size of the XdpReceiver and of the C loop
_BATCH = 64  # the receivers' own default
_GLANCE = 0.02  # seconds; `stop` is looked at so often

Stop = ctypes.c_int
"""Not 0 when nothing more will come."""

Traffic = Literal["plain", "netflow"]
PAYLOADS: dict[Traffic, bytes] = {"plain": pattern(64), "netflow": NETFLOW.payload}


class Batches(Protocol):
    """What both receivers are."""

    def recv(self, timeout: float | None = None) -> Batch: ...


class Opened(NamedTuple):
    """One that receives. run : until `stop`, and what is queued then; how many. lost : by counters of the kernel."""

    run: Callable[[Stop], int]
    lost: Callable[[], dict[str, int]]


@dataclass(frozen=True)
class Contender:
    """One way to receive. of : whether by a socket or by AF_XDP.

    open : in the lab, what takes this traffic off host0 while the context lasts.
    """

    name: str
    title: str
    of: Literal["socket", "xdp"]
    open: Callable[[Lab, Flood], AbstractContextManager[Opened]]
    traffic: Traffic = "plain"


@contextlib.contextmanager
def _bound(lab: Lab, flood: Flood) -> Iterator[socket.socket]:
    with lab.host:
        sock = socket.socket(flood.family, socket.SOCK_DGRAM)
    with sock:
        sock.bind((flood.destination, flood.port))
        sockets.grow_receive_buffer(sock, ROOM * ROOM_EACH)
        yield sock


def _dropped(sock: socket.socket) -> dict[str, int]:
    return {"queue full": sockets.drops(sock)}


@contextlib.contextmanager
def _socket_receiver(lab: Lab, flood: Flood) -> Iterator[tuple[Batches, Callable[[], dict[str, int]]]]:
    with _bound(lab, flood) as sock, Receiver(sock, batch_size=_BATCH) as receiver:
        yield receiver, partial(_dropped, sock)


@contextlib.contextmanager
def _xdp_receiver(lab: Lab, flood: Flood) -> Iterator[tuple[Batches, Callable[[], dict[str, int]]]]:
    with lab.host:
        opened = XdpReceiver("host0", flood.port, mode="copy", batch_size=_BATCH, ring_size=ROOM, frames=2 * ROOM)
    with opened as receiver:

        def lost() -> dict[str, int]:
            found = receiver.statistics()
            return {
                "no frame": found.kernel.dropped, "ring full": found.kernel.ring_full, "checksum": found.bad_checksum,
                "martian": found.martian, "unreadable": found.unreadable, "passed": sum(found.passed.values()),
            }  # fmt: skip

        yield receiver, lost


RECEIVERS = {"socket": _socket_receiver, "xdp": _xdp_receiver}


def _count(receiver: Batches, stop: Stop) -> int:
    count = 0
    while True:
        last = stop.value  # before the look: what came until then is queued
        if found := len(receiver.recv(0 if last else _GLANCE)):
            count += found
        elif last:
            return count


def _batches(receiver: Batches, stop: Stop) -> Iterator[Batch]:
    while True:
        last = stop.value
        batch = receiver.recv(0 if last else _GLANCE)
        if len(batch):
            yield batch
        elif last:
            return


def _each(receiver: Batches, stop: Stop) -> int:
    count = 0
    for batch in _batches(receiver, stop):
        for _data, _source in batch.datagrams():
            count += 1
    return count


def _netflow(receiver: Batches, stop: Stop) -> int:
    return NETFLOW.batched(_batches(receiver, stop))


@contextlib.contextmanager
def _at(
    lab: Lab, flood: Flood, *, of: Literal["socket", "xdp"], work: Callable[[Batches, Stop], int]
) -> Iterator[Opened]:
    with RECEIVERS[of](lab, flood) as (receiver, lost):
        yield Opened(partial(work, receiver), lost)


@contextlib.contextmanager
def _socket_loop(lab: Lab, flood: Flood) -> Iterator[Opened]:
    with _bound(lab, flood) as sock, CLoop(_BATCH) as loop:
        poll = select.poll()
        poll.register(sock, select.POLLIN)

        def run(stop: Stop) -> int:
            count = 0
            while True:
                last = stop.value
                found = loop.drain(sock.fileno())
                count += found
                if last:
                    return count
                if not found:
                    poll.poll(1000 * _GLANCE)

        yield Opened(run, partial(_dropped, sock))


@contextlib.contextmanager
def _xdp_loop(lab: Lab, flood: Flood) -> Iterator[Opened]:
    with contextlib.ExitStack() as stack:
        with lab.host:
            redirect = stack.enter_context(Redirect("host0", flood.port))
            loop = stack.enter_context(XskLoop("host0", ROOM, 2 * ROOM))
            redirect.put(0, loop.fileno())
            redirect.attach("native")

        def lost() -> dict[str, int]:
            outcomes = redirect.outcomes()
            return {"no frame or ring full": loop.lost, "passed": sum(outcomes.values()) - outcomes["taken"]}

        yield Opened(partial(loop.run, _BATCH), lost)


CONTENDERS = (
    Contender("socket", "Receiver.recv", "socket", partial(_at, of="socket", work=_count)),
    Contender("xdp", "XdpReceiver.recv", "xdp", partial(_at, of="xdp", work=_count)),
    Contender("socket-c", "C loop (recvmmsg)", "socket", _socket_loop),
    Contender("xdp-c", "C loop (AF_XDP)", "xdp", _xdp_loop),
    Contender("socket-each", "Receiver, batch.datagrams()", "socket", partial(_at, of="socket", work=_each)),
    Contender("xdp-each", "XdpReceiver, batch.datagrams()", "xdp", partial(_at, of="xdp", work=_each)),
    Contender("socket-netflow", "Receiver, NetFlow v5 by batches", "socket", partial(_at, of="socket", work=_netflow),
              "netflow"),
    Contender("xdp-netflow", "XdpReceiver, NetFlow v5 by batches", "xdp", partial(_at, of="xdp", work=_netflow),
              "netflow"),
)  # fmt: skip
