"""Files that are whole or absent: written beside under another name, and renamed when they are finished."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from fastrecv.errors import SinkFull
from fastrecv.sinks.base import BaseSink
from fastrecv.sinks.interface import Data, SinkStatistics
from fastrecv.sinks.records import pyarrow, record_batch

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Files", "Format", "Writer"]

_ROOM = 64 << 20  # bytes that may wait for the disk


class Writer(Protocol):
    """What writes one file of a format."""

    def write_table(self, table: pa.Table) -> None: ...

    def close(self) -> None: ...


class Format(Protocol):
    """A format. suffix : of files' names. group : bytes in memory that are written at once."""

    suffix: str
    group: int

    def writer(self, out: IO[bytes], schema: pa.Schema) -> Writer: ...

    def check(self, file: IO[bytes]) -> None:
        """pyarrow.ArrowException where the file has no end."""


class Files(BaseSink):
    """Files TIME-PID-RANDOM in a folder, each of one schema; TIME is UTC, of the first row's arrival.

    folder : made where it is missing; any number of processes may share it. rotate : seconds after which a file is
    finished, whether more comes or not. size : bytes at which it is, about. patience : seconds that publish() waits for
    the disk when 64 MiB wait already; a thread writes.

    A file appears by rename(2) after fsync(2), with all its rows. What is in no finished file is lost with the process:
    where that is too much, publish to JetStream, and write files from there. What a dead process leaves, .NAME.tmp, the
    next open() removes, or renames where it was only the renaming that was missing. Shards make no difference.
    flush() finishes the file. A sink that has failed has lost what is in no finished file: statistics().lost rows.
    """

    def __init__(self, form: Format, folder: str | os.PathLike[str], rotate: float, size: int, patience: float) -> None:
        super().__init__(patience)
        if not rotate > 0 or size < 1:
            raise ValueError(f"files of {rotate} s and {size} bytes: give more than 0")
        self._form, self._folder, self._rotate, self._size = form, Path(folder), rotate, size
        self._changed = threading.Condition()
        self._queue: deque[pa.RecordBatch] = deque()
        self._waiting_bytes = self._rows = self._published = self._finished = self._wanted = 0
        self._appeared = 0  # rows
        self._error: Exception | None = None
        self._file: _File | None = None  # the thread's own
        self._thread = threading.Thread(target=self._run, name="fastrecv-files", daemon=True)

    def open(self) -> None:
        self._opening()
        pyarrow()
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob(f".*{self._form.suffix}.tmp"):
            _settle(left, self._form)
        self._thread.start()

    def publish(self, data: Data, shard: int = 0) -> None:
        self._check(shard)
        record = record_batch(data)
        if not len(record):
            return
        with self._changed:
            if not self._changed.wait_for(lambda: self._error or self._waiting_bytes < _ROOM, self.patience):
                raise SinkFull(f"{self._folder}: the disk has not taken what waits for {self.patience:g} s")
            self._raise()
            self._queue.append(record)
            self._waiting_bytes += record.nbytes
            self._rows += len(record)
            self._published += 1
            self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> None:
        self._check()
        with self._changed:
            self._wanted = target = self._published
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._error or self._finished >= target, timeout)
            self._raise()
            if not done:
                raise TimeoutError(f"{self._folder}: {target - self._finished} messages are in no finished file yet")

    def close(self, timeout: float | None = None) -> None:
        if self._closed or not self._opened:
            return
        try:
            self.flush(timeout)
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            if timeout is None or self._finished >= self._published or self._error:
                self._thread.join()

    def statistics(self) -> SinkStatistics:
        with self._changed:
            left, failed = self._published - self._finished, self._error is not None
            return SinkStatistics(
                rows=self._rows, published=self._published, acknowledged=self._finished,
                waiting=0 if failed else left, dropped=left if failed else 0,
                spooled_bytes=0 if failed else self._waiting_bytes,
                lost=self._rows - self._appeared if failed else 0,
            )  # fmt: skip

    def _raise(self) -> None:
        if self._error is not None:
            words = getattr(self._error, "strerror", None) or self._error
            raise OSError(
                getattr(self._error, "errno", None) or 0,
                f"{self._folder}: {words}: {self._rows - self._appeared} rows that were taken are in no file",
            ) from self._error

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except Exception as error:  # a full disk, or whatever Arrow refuses: publish() says it
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            if self._file is not None:
                self._file.abandon()

    def _step(self) -> bool:
        """Write what waits, and finish the file where it is due; False when the sink is closed."""
        with self._changed:
            due = None if self._file is None else max(self._file.opened + self._rotate - time.monotonic(), 0)
            self._changed.wait_for(lambda: self._queue or self._closed or self._wanted > self._finished, due)
            records, wanted = list(self._queue), self._wanted
            self._queue.clear()
            if self._closed and not records:
                return False
        for record in records:
            if self._file is not None and self._file.schema != record.schema:
                self._finish()
            self._file = self._file or _File(self._form, self._folder, record.schema, self._size)
            self._file.add(record)
            with self._changed:
                self._waiting_bytes -= record.nbytes
                self._changed.notify_all()
            if self._file.full or time.monotonic() - self._file.opened >= self._rotate:
                self._finish()
        late = self._file is not None and time.monotonic() - self._file.opened >= self._rotate
        if late or wanted > self._finished:
            self._finish()
        return True

    def _finish(self) -> None:
        if self._file is not None:
            self._file.finish()
            with self._changed:
                self._finished += self._file.messages
                self._appeared += self._file.rows
                self._changed.notify_all()
            self._file = None


class _File:
    """One that is being written; locked while its process lives."""

    def __init__(self, form: Format, folder: Path, schema: pa.Schema, size: int) -> None:
        self.opened, self.messages, self.rows, self.schema = time.monotonic(), 0, 0, schema
        self._pending: list[pa.RecordBatch] = []
        self._size, self._group, self._pending_bytes = size, form.group, 0
        self._path, self._out = _begun(folder, form.suffix)
        self._writer = form.writer(self._out, schema)

    @property
    def full(self) -> bool:
        """Whether so much is written."""
        return self._out.tell() >= self._size

    def add(self, record: pa.RecordBatch) -> None:
        self.messages += 1
        self.rows += len(record)
        self._pending.append(record)
        self._pending_bytes += record.nbytes
        if self._pending_bytes >= min(self._group, self._size):
            self._write()

    def finish(self) -> None:
        """Make it appear."""
        self._write()
        self._writer.close()
        self._out.flush()
        os.fsync(self._out.fileno())
        _appear(self._path)
        self._out.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()
        for end in (self._writer.close, self._out.close):
            with contextlib.suppress(Exception):  # a disk that is full is full for the footer too
                end()

    def _write(self) -> None:
        if self._pending:
            self._writer.write_table(pyarrow().Table.from_batches(self._pending))
            self._pending, self._pending_bytes = [], 0


def _begun(folder: Path, suffix: str) -> tuple[Path, IO[bytes]]:
    """A new file under the name it has until it is finished, open and locked."""
    while True:
        now = datetime.now(UTC)
        path = folder / f".{now:%Y%m%dT%H%M%S.%fZ}-{os.getpid()}-{secrets.token_hex(4)}{suffix}.tmp"
        out = path.open("xb")
        if _locked(out.fileno(), path):
            return path, out
        out.close()  # somebody's open() was quicker and has taken it for a dead process's


def _locked(fd: int, path: Path) -> bool:
    """Whether this process is now the one that holds the file, and it is still there."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path.stat().st_ino == os.fstat(fd).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _appear(path: Path) -> None:
    path.rename(path.with_name(path.name.removeprefix(".").removesuffix(".tmp")))
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _settle(path: Path, form: Format) -> None:
    """Finish what a dead process left, or remove it; what is a live one's stays."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as left:  # settled by another process meanwhile
        if not _locked(left.fileno(), path):
            return
        try:
            form.check(left)
        except (pyarrow().ArrowException, OSError):  # no footer: no reader could make anything of it
            path.unlink()
            return
        os.fsync(left.fileno())
        _appear(path)
