"""The one door to AF_XDP; nothing else in fastrecv calls libxdp or works on its rings.

Privileges: CAP_NET_RAW to open an AF_XDP socket, and what fastrecv.redirect takes to bring frames there. Linux 5.11 for
busy polling, 5.9 for all else.
"""

from fastrecv._xsk.answers import answer
from fastrecv._xsk.reader import MAX_BATCH, MAX_QUEUES, PARTIAL, TRUST, VERIFY, Reader
from fastrecv._xsk.umem import KernelStatistics, Umem, grace_period

__all__ = [
    "MAX_BATCH",
    "MAX_QUEUES",
    "PARTIAL",
    "TRUST",
    "VERIFY",
    "KernelStatistics",
    "Reader",
    "Umem",
    "answer",
    "grace_period",
]
