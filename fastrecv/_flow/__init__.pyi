from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from fastrecv import Batch

__all__ = [
    "DONE",
    "EXPORTER",
    "FULL",
    "KINDS",
    "MALFORMED",
    "META",
    "MOST_EXPORTERS",
    "MOST_FIELDS",
    "MOST_ROWS",
    "MOST_TEMPLATES",
    "STEP",
    "TEMPLATES",
    "Columns",
    "Exporters",
    "Walk",
    "ipv4",
    "ipv6",
    "mac",
]

DONE: int
TEMPLATES: int
FULL: int
META: int
MOST_EXPORTERS: int
MOST_FIELDS: int
MOST_ROWS: int
MOST_TEMPLATES: int
MALFORMED: tuple[str, ...]
KINDS: dict[str, int]
STEP: np.dtype[np.void]
EXPORTER: np.dtype[np.void]

_Text = tuple[NDArray[np.int32], NDArray[np.uint8]]

class Columns:
    def __new__(cls, widths: Iterable[int]) -> Columns: ...
    def __len__(self) -> int: ...
    def take(self) -> tuple[int, list[Buffer | tuple[Buffer, Buffer]]]: ...

class Exporters:
    def __new__(cls, seed: int) -> Exporters: ...
    def __len__(self) -> int: ...
    def table(self) -> NDArray[np.void]: ...
    def replace(self, exporters: NDArray[np.void]) -> None: ...
    def learn(self, exporter: int, name: int, layout: int) -> bool: ...
    def withdraw(self, exporter: int, name: int) -> None: ...
    def clear_templates(self) -> None: ...

class Walk:
    def __new__(cls, exporters: Exporters) -> Walk: ...
    @property
    def exporters(self) -> Exporters: ...
    def add_layout(self, steps: NDArray[np.void], columns: Columns | None, shortest: int, length: int) -> int: ...
    def clear_layouts(self) -> None: ...
    def begin(self, batch: Batch) -> None: ...
    def walk(self, now: int) -> int: ...
    @property
    def found(self) -> tuple[int, int, int, bytes]: ...
    def refuse(self) -> None: ...
    def taken(self) -> None: ...

def ipv4(addresses: NDArray[np.uint32]) -> _Text: ...
def ipv6(addresses: NDArray[np.uint8]) -> _Text: ...
def mac(addresses: NDArray[np.uint8]) -> _Text: ...
