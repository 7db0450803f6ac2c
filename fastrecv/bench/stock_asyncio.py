"""Stock asyncio in a process of its own, run as a plain script: FD, then on stdin how many datagrams to drain.

What 256 KiB a datagram cost, which asyncio asks for, is glibc's business: a process whose heap has no such room,
because it does nothing but this, gets an mmap and a munmap for each; one that once had larger things in its heap, as
the bench has, does not. So this file imports nothing that a small service would not.
"""

import asyncio
import socket
import sys


class Counting(asyncio.DatagramProtocol):
    """Counts, and stops the loop when all that are due have come. Some come before it is told how many."""

    came = due = 0

    def datagram_received(self, data, addr):  # type: ignore[no-untyped-def] # noqa: ARG002
        self.came += 1
        if self.came == self.due:
            asyncio.get_running_loop().stop()


def main() -> None:
    """Answer each line with how many datagrams have come."""
    loop = asyncio.new_event_loop()
    protocol = Counting()
    sock = socket.socket(fileno=int(sys.argv[1]))
    loop.run_until_complete(loop.create_datagram_endpoint(lambda: protocol, sock=sock))
    for line in sys.stdin:
        before = protocol.due
        protocol.due += int(line)
        if protocol.came < protocol.due:
            late = loop.call_later(20, loop.stop)
            loop.run_forever()
            late.cancel()
        print(protocol.came - before, flush=True)


main()
