"""Parquet files: what every tool reads, smallest on disk."""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING, Any

from fastrecv.sinks.files import Files, Writer

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Parquet"]


class Parquet(Files):
    """NAME.parquet, zstd; options: fastrecv.sinks.files.Files."""

    def __init__(
        self, folder: str | os.PathLike[str], *, rotate: float = 60.0, size: int = 64 << 20, patience: float = 5.0
    ) -> None:
        super().__init__(_Format(), folder, rotate, size, patience)


class _Format:
    suffix = ".parquet"
    group = 16 << 20  # readers take row groups one by one

    def writer(self, out: IO[bytes], schema: pa.Schema) -> Writer:
        from pyarrow import parquet  # noqa: PLC0415 - optional

        made: Any = parquet.ParquetWriter(out, schema, compression="zstd")
        return made  # type: ignore[no-any-return] # pyarrow ships no types

    def check(self, file: IO[bytes]) -> None:
        from pyarrow import parquet  # noqa: PLC0415 - optional

        parquet.read_metadata(file)
