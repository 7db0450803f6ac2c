"""fastrecv: a Linux receive front end for Python.

Receiver, and the Batch it returns, are what to begin with. fastrecv.adapters.asyncio and .socketserver bring them to
services that exist, fastrecv.aio to coroutines; fastrecv.sockets opens and sets sockets; fastrecv.backend says what a
receiver backend is; fastrecv.bpf is the door to BPF. ENDPOINT is the dtype of Batch.sources and Batch.destinations.
"""

from fastrecv._recv import CONTROL_TRUNCATED, ENDPOINT, TRUNCATED, Batch
from fastrecv.errors import BpfError, NotSupported
from fastrecv.receiver import Receiver, Statistics

__all__ = [
    "CONTROL_TRUNCATED",
    "ENDPOINT",
    "TRUNCATED",
    "Batch",
    "BpfError",
    "NotSupported",
    "Receiver",
    "Statistics",
]
