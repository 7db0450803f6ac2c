"""The one door to recvmmsg(2) and sendmmsg(2); needs the C library and numpy, nothing else."""

from fastrecv._recv.arena import ENDPOINT
from fastrecv._recv.batch import Batch
from fastrecv._recv.receive import CONTROL_TRUNCATED, MAX_BATCH, MAX_SLOT, TRUNCATED, Reader
from fastrecv._recv.send import in_sequence, send

__all__ = [
    "CONTROL_TRUNCATED",
    "ENDPOINT",
    "MAX_BATCH",
    "MAX_SLOT",
    "TRUNCATED",
    "Batch",
    "Reader",
    "in_sequence",
    "send",
]
