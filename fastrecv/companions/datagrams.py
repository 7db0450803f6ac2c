"""A reuseport group of UDP sockets that answer every datagram with the slot it came to."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from functools import partial

from fastrecv.companions.answers import LONGEST, Server, endpoint
from fastrecv.companions.binding import Address, allow_descriptors, bind, opened
from fastrecv.companions.listening import Datagram, Event, Slot
from fastrecv.receiver import Receiver
from fastrecv.steerable import cookie_of

__all__ = ["Datagrams"]

_DESCRIPTORS = 4  # of a Receiver and its socket


class Datagrams:
    """`number` UDP sockets on one address and port; an IPv6 one takes IPv4 as well. A Group."""

    def __init__(self, address: Address, port: int, number: int) -> None:
        allow_descriptors(number * _DESCRIPTORS)
        self._open = contextlib.ExitStack()
        self._receivers: list[Receiver] = []
        self.slots: list[Slot] = []
        with contextlib.ExitStack() as failed:
            failed.callback(self._open.close)
            for slot in range(number):
                sock = self._open.enter_context(opened(socket.SOCK_DGRAM, address.version))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if address.version == 6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                # The port, too: steered here, packets may have been sent to any, and are answered from that one.
                receiver = Receiver(sock, arenas=1, timestamps=True, destination_ports=True)
                self._receivers.append(self._open.enter_context(receiver))
                bind(sock, address, port)  # when all is set: from now on it may be asked
                self.slots.append(Slot(slot, sock.fileno(), cookie_of(sock), endpoint(sock.getsockname())))
            failed.pop_all()

    def watch(self, selector: selectors.BaseSelector) -> None:
        for slot, receiver in enumerate(self._receivers):
            answer = Server(slot, os.getpid()).answer()
            selector.register(receiver, selectors.EVENT_READ, partial(_serve, slot, receiver, answer))

    def tick(self) -> list[Event]:
        return []

    def finish(self) -> list[Event]:
        return []

    def lost(self, slot: int) -> int:
        return self._receivers[slot].drops

    def close(self) -> None:
        self._open.close()


def _serve(slot: int, receiver: Receiver, answer: bytes) -> list[Event]:
    """One batch, answered first and told of then."""
    with receiver.recv_nowait() as batch:
        now = time.time_ns()
        # Answers are not answered: two listeners that were set upon each other would never stop.
        answers = [None if Server.read(bytes(view[:LONGEST])) else answer for view, _ in batch]
        receiver.reply(batch, answers, timeout=0)
        assert batch.timestamps is not None
        return [
            Datagram(
                int(taken) / 1e9, slot, endpoint(batch.source(row)), endpoint(batch.destination(row)), int(length),
                max(0, now - int(taken)) / 1e6,  # the clock may have been set back
            )
            for row, (taken, length) in enumerate(zip(batch.timestamps, batch.lengths, strict=True))
        ]  # fmt: skip
