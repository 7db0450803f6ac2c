"""What the listeners say and the clients read: one line that names the slot and the process."""

from __future__ import annotations

import re
from ipaddress import IPv6Address, ip_address
from typing import Any, NamedTuple

__all__ = ["LONGEST", "Endpoint", "Server", "endpoint"]

LONGEST = 64
"""Bytes of an answer, at most."""

_ANSWER = re.compile(rb"slot ([0-9]{1,5}) pid ([0-9]{1,10})\n")


class Server(NamedTuple):
    """Who has answered: slot 2 pid 4711."""

    slot: int
    pid: int

    def answer(self) -> bytes:
        return f"slot {self.slot} pid {self.pid}\n".encode()

    @classmethod
    def read(cls, answer: bytes) -> Server | None:
        """None where something else than a listener of ours has answered."""
        match = _ANSWER.fullmatch(answer)
        return None if match is None else cls(int(match[1]), int(match[2]))


class Endpoint(NamedTuple):
    """An address without the ::ffff: of IPv4 in IPv6 sockets, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def endpoint(address: Any) -> Endpoint:
    """Of a socket address as Python has it."""
    host, port = address[:2]
    found = ip_address(host)
    plain = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return Endpoint(host if plain is None else str(plain), port)
