"""Opening sockets and setting what Python's socket module has no name for."""

from __future__ import annotations

import ctypes
import socket
import struct

__all__ = ["drop_everything"]

_SO_ATTACH_FILTER = 26  # include/uapi/asm-generic/socket.h
_RET_K = 0x06  # BPF_RET | BPF_K, include/uapi/linux/bpf_common.h


def drop_everything(sock: socket.socket) -> None:
    """Attach the classic BPF filter `ret #0`: the kernel drops, and counts, every later packet of this socket.

    What is queued already stays readable. Needs no privilege. socket(7), SO_ATTACH_FILTER.
    """
    program = ctypes.create_string_buffer(struct.pack("HBBI", _RET_K, 0, 0, 0))  # struct sock_filter
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))
