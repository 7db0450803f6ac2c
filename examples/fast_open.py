"""Which of four listeners gets a TCP connection is decided by what its first packet says (TCP Fast Open, RFC 7413).

As any user, once root has allowed Fast Open to clients (1) and servers (2):

    sysctl -w net.ipv4.tcp_fastopen=3
    python examples/fast_open.py

Every client sends a word together with its SYN. A classic BPF filter of the listeners' reuseport group hashes the first
four bytes of it, so that who says the same comes to the same listener, from whatever address and port.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import sys
from ipaddress import ip_address
from pathlib import Path

from fastrecv.classic import Filter, disassembled
from fastrecv.policies import Policy, Sender

HOST, LISTENERS = "127.0.0.1", 4
WORDS = ["blue", "green", "red", "white", "yellow"]
SYN_DATA = 32  # TCPI_OPT_SYN_DATA, include/uapi/linux/tcp.h: what the SYN carried was taken


def listen(stack: contextlib.ExitStack) -> list[socket.socket]:
    """Four listeners on one port of the kernel's choice, in the order of their numbers."""
    members: list[socket.socket] = []
    for _ in range(LISTENERS):
        member = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        member.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        member.bind((HOST, members[0].getsockname()[1] if members else 0))
        member.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)  # so many may wait with data
        member.listen()
        members.append(member)
    return members


def ask(members: list[socket.socket], word: bytes) -> tuple[int, Sender, bool]:
    """Who got the word, from whom, and whether it came with the SYN."""
    port = members[0].getsockname()[1]
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.sendto(word, socket.MSG_FASTOPEN, (HOST, port))  # connects, and sends at once where it may
        (member,) = select.select(members, [], [], 5)[0]
        with member.accept()[0] as connection:
            assert connection.recv(100) == word
            # struct tcp_info: state, CA state, retransmits, probes, back-off, options.
            options = struct.unpack_from("6B", client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8))[5]
            host, source_port = client.getsockname()
            sender = Sender(ip_address(host), source_port, ip_address(HOST), port, word)
            return members.index(member), sender, bool(options & SYN_DATA)


def main() -> None:
    allowed = int(Path("/proc/sys/net/ipv4/tcp_fastopen").read_text())
    if allowed & 3 != 3:
        sys.exit(f"net.ipv4.tcp_fastopen is {allowed}: as root, sysctl -w net.ipv4.tcp_fastopen=3")
    with contextlib.ExitStack() as stack:
        members = listen(stack)
        made = Filter(Policy("payload", length=4), LISTENERS)
        made.attach(members[0])
        print(disassembled(made.instructions), end="\n\n")
        # The first SYN to a host asks for a cookie and carries nothing yet; the kernel keeps the cookie.
        ask(members, b"cookie")
        for word in WORDS * 3:
            member, sender, early = ask(members, word.encode())
            expected = f"as named: {made.index(sender)}" if early else "its SYN carried nothing: by source"
            print(f"{word} from port {sender.source_port} to listener {member}, {expected}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"fast_open.py: {error}")
