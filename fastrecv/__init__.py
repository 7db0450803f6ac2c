"""fastrecv: a Linux receive front end for Python."""

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
