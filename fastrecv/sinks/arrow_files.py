"""Arrow files: a fraction of the CPU time that Parquet takes, for whoever collects as fast as a core can."""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING, Any, Literal, get_args

from fastrecv.sinks.files import Files, Writer
from fastrecv.sinks.records import pyarrow

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ArrowFiles", "Compression"]

_END = b"\xff\xff\xff\xff\0\0\0\0"
Compression = Literal["lz4", "zstd", "none"]


class ArrowFiles(Files):
    """NAME.arrows, each an Arrow IPC stream, as JetStream's messages are (pyarrow.ipc, polars.read_ipc_stream).

    Feather, the format of files, allows one dictionary a column, and so would keep all rows until the end.

    compression : of the columns' buffers. Other options: fastrecv.sinks.files.Files.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, rotate: float = 60.0, size: int = 64 << 20, patience: float = 5.0,
        compression: Compression = "lz4",
    ) -> None:  # fmt: skip
        if compression not in get_args(Compression):
            raise ValueError(f"compression {compression!r}: give {', '.join(get_args(Compression))}")
        super().__init__(_Format(compression), folder, rotate, size, patience)


class _Format:
    suffix = ".arrows"
    group = 1  # what has been written needs no memory any more

    def __init__(self, compression: Compression) -> None:
        self._compression = None if compression == "none" else compression

    def writer(self, out: IO[bytes], schema: pa.Schema) -> Writer:
        ipc: Any = pyarrow().ipc
        options = ipc.IpcWriteOptions(compression=self._compression, use_threads=False)
        made: Any = ipc.new_stream(out, schema, options=options)
        return made  # type: ignore[no-any-return] # pyarrow ships no types

    def check(self, file: IO[bytes]) -> None:
        """By the end-of-stream marker: Arrow Columnar Format, "IPC Streaming Format"."""
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - len(_END), 0))
        if file.read() != _END:
            raise pyarrow().ArrowInvalid("the stream has no end")
