"""A UDP service for every port of a prefix, IPv4 and IPv6: it answers each client from the address and port it asked.

As root, the addresses being local (AnyIP):

    ip route add local 192.0.2.0/24 dev lo
    ip route add local 2001:db8:1::/64 dev lo
    fastrecv lookup load
    fastrecv lookup bind everything udp 192.0.2.0/24 any
    fastrecv lookup bind everything udp 2001:db8:1::/64 any
    python examples/any_port.py everything

Then `nc -u 192.0.2.77 4242` is answered, and so is a client of any other address and port of the prefixes.
usage: any_port.py LABEL [BPFFS]
"""

from __future__ import annotations

import sys

from fastrecv import Batch, Receiver
from fastrecv.lookup import Dispatcher


def answer(batch: Batch, row: int) -> bytes:
    asked = batch.destination(row)
    assert isinstance(asked, tuple)  # UDP has addresses and ports
    host, port = asked[:2]
    return f"you asked {host.removeprefix('::ffff:')} port {port}".encode()


def main(label: str, bpffs: str = "/sys/fs/bpf") -> None:
    # One dual-stack socket serves both families. Its own address and port matter to nobody.
    with Receiver.bind(("::", 0), destinations=True, destination_ports=True) as receiver:
        with Dispatcher(bpffs=bpffs) as dispatcher:  # and lets go of it at once: others wait for the lock
            dispatcher.register(label, [receiver.socket])
        print(f"serving {label}", flush=True)
        for batch in receiver:
            receiver.reply(batch, [answer(batch, row) for row in range(len(batch))])


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"any_port.py: {error}")
