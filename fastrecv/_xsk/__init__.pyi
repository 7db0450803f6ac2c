from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import NamedTuple, Self

from fastrecv._recv import Batch
from fastrecv.replies import Buffer

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
]

MAX_BATCH: int
MAX_QUEUES: int
PARTIAL: int
TRUST: int
VERIFY: int

class KernelStatistics(NamedTuple):
    dropped: int
    invalid_descriptors: int
    invalid_sent: int
    ring_full: int
    fill_ring_empty: int
    sent_ring_empty: int

class Umem:
    def __new__(
        cls,
        interface: str,
        queues: list[int],
        *,
        frame_size: int,
        frames: int,
        ring_size: int,
        need_wakeup: bool,
        columns: int,
        rows: int,
    ) -> Self: ...
    def open(self, *, zero_copy: bool) -> None: ...
    @property
    def interface(self) -> str: ...
    @property
    def numbers(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def idle_frames(self) -> int: ...
    @property
    def with_kernel(self) -> int: ...
    @property
    def held(self) -> int: ...
    @property
    def zero_copy(self) -> bool: ...
    @property
    def descriptors(self) -> list[int]: ...
    def statistics(self) -> KernelStatistics: ...
    def close(self) -> None: ...

class Reader:
    def __new__(cls, umem: Umem, *, checksums: int, busy: bool) -> Self: ...
    @property
    def closed(self) -> bool: ...
    @property
    def batches(self) -> int: ...
    @property
    def datagrams(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def bad_checksum(self) -> int: ...
    @property
    def martian(self) -> int: ...
    @property
    def unreadable(self) -> int: ...
    def place(self, interfaces: dict[int, int], martians: Iterable[IPv4Address]) -> None: ...
    def fileno(self) -> int: ...
    def enter(self) -> tuple[int, int]: ...
    def leave(self) -> int: ...
    def recv(self, timeout: float | None) -> Batch: ...
    def close(self) -> None: ...

def answer(
    umem: Umem, batch: Batch, payloads: Batch | tuple[Buffer | None, ...], mtu: int
) -> tuple[int, list[int]]: ...
