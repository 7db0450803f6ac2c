"""The same HTTP/3 server on plain SO_REUSEPORT, as it is usually run: what load.py compares with.

    export QUIC_CERTIFICATE=certificate.pem QUIC_KEY=key.pem
    python plain.py 127.0.0.1 4433

Each process has a socket of its own; the kernel's hash of addresses and ports says who gets a datagram. SIGTERM closes
its connections, and ends it.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

from aioquic.asyncio.server import QuicServer
from web import Web, configuration

from fastrecv.adapters.asyncio import create_datagram_endpoint


async def serve(host: str, port: int) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    transport, server = await create_datagram_endpoint(
        lambda: QuicServer(configuration=configuration(), create_protocol=Web),
        local_addr=(socket.gethostbyname(host), port), reuse_port=True,
    )  # fmt: skip
    sys.stderr.write(f"serves {transport.get_extra_info('sockname')}\n")
    await ended.wait()
    server.close()
    await asyncio.sleep(0)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
