"""fastrecv: a Linux receive front end for Python.

Receiver, and the Batch it returns, are what to begin with. fastrecv.adapters.asyncio and .socketserver bring them to
services that exist, fastrecv.aio to coroutines; fastrecv.sockets opens and sets sockets; fastrecv.backend says what a
receiver backend is; fastrecv.bpf is the door to BPF. XdpReceiver gives the same batches past the socket layer, by
AF_XDP; it needs libxdp, and is looked for when it is first asked for. ENDPOINT is the dtype of Batch.sources and
Batch.destinations.
"""

from typing import TYPE_CHECKING

from fastrecv._recv import CONTROL_TRUNCATED, ENDPOINT, TRUNCATED, Batch
from fastrecv.errors import BpfError, NotSupported
from fastrecv.receiver import Receiver, Statistics

if TYPE_CHECKING:
    from fastrecv.xdp import XdpReceiver

__all__ = [
    "CONTROL_TRUNCATED",
    "ENDPOINT",
    "TRUNCATED",
    "Batch",
    "BpfError",
    "NotSupported",
    "Receiver",
    "Statistics",
    "XdpReceiver",
]


def __getattr__(name: str) -> object:
    if name == "XdpReceiver":
        from fastrecv.xdp import XdpReceiver  # noqa: PLC0415 - the receive core works without libxdp

        return XdpReceiver
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
