"""A UDP service for every port of a prefix, IPv4 and IPv6: it answers each client from the address and port it asked.

As root, the addresses being local (AnyIP):

    ip route add local 192.0.2.0/24 dev lo
    fastrecv lookup load
    fastrecv lookup bind everything udp 192.0.2.0/24 any
    python examples/any_port.py everything

Then `dig @192.0.2.77 -p 4242 example.com` is heard, and a connected client on any other port, too.
"""

from __future__ import annotations

import sys

from fastrecv import Batch, Receiver
from fastrecv.lookup import Dispatcher


def answer(batch: Batch, row: int) -> bytes:
    asked = batch.destination(row)
    assert isinstance(asked, tuple)  # an address family with paths has other destinations
    return f"you asked {asked[0]} port {asked[1]}".encode()


def main(label: str, bpffs: str = "/sys/fs/bpf") -> None:
    # One dual-stack socket serves both families. Its own address and port matter to nobody.
    with Receiver.bind(("::", 0), destinations=True, destination_ports=True) as receiver:
        with Dispatcher(bpffs=bpffs) as dispatcher:
            dispatcher.register(label, [receiver.socket])
        print(f"serving {label}", flush=True)
        for batch in receiver:
            receiver.reply(batch, [answer(batch, row) for row in range(len(batch))])


if __name__ == "__main__":
    main(*sys.argv[1:])
