"""TCP Fast Open (RFC 7413): whether the sysctl allows it, and whether data went with the SYN."""

from __future__ import annotations

import socket
from errno import EOPNOTSUPP
from pathlib import Path
from typing import Literal

__all__ = ["check", "in_syn"]

_SYSCTL = Path("/proc/sys/net/ipv4/tcp_fastopen")  # of the calling thread's network namespace
_BITS = {"client": 1, "server": 2}  # Documentation/networking/ip-sysctl.rst
# include/uapi/linux/tcp.h: the sixth byte of struct tcp_info
_OPTIONS, _SYN_DATA = 5, 32


def check(side: Literal["client", "server"]) -> None:
    """OSError where net.ipv4.tcp_fastopen does not allow this side."""
    value = int(_SYSCTL.read_text())
    if not value & _BITS[side]:
        raise OSError(
            EOPNOTSUPP,
            f"net.ipv4.tcp_fastopen is {value}, which allows no {side}: sysctl -w net.ipv4.tcp_fastopen="
            f"{value | _BITS[side]} (1 for clients, 2 for servers, 3 for both; each network namespace has its own)",
        )


def in_syn(sock: socket.socket) -> bool:
    """Whether data came with the SYN and was taken (TCPI_OPT_SYN_DATA), on either side; Linux 3.13."""
    information = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _OPTIONS + 1)
    return bool(information[_OPTIONS] & _SYN_DATA)
