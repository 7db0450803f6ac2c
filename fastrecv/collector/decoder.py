"""The decoder: batches of datagrams in, Arrow record batches out, and an account of every exporter.

Nothing that is sent stops it. What it keeps is bounded, since senders are easily forged: exporters, templates of each,
layouts of all, rows.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastrecv import Batch
from fastrecv._flow import DONE, EXPORTER, FULL, Exporters, Walk
from fastrecv.collector.elements import Field, Shape
from fastrecv.collector.schemas import Schema, finished, planned, texts
from fastrecv.collector.templates import FIELDS5, MalformedError, Template, Withdrawal, read

__all__ = ["MOST_LAYOUTS", "Decoder"]

MOST_LAYOUTS = 4096
"""Different templates of all exporters together; when they are more, those that nobody has any more are forgotten."""
_NETFLOW5, _NETFLOW9 = 5, 9
_FORGOTTEN = 3600_000  # ms of silence until an exporter goes
_Key = tuple[tuple[Field, ...], bool, bool]  # fields; of options; whether its times are relative


class _State(msgspec.Struct, array_like=True):
    """What outlives a decoder. exporters : EXPORTER. templates : exporter, name, version, options, fields."""

    exporters: bytes
    templates: list[tuple[int, int, bool, bool, list[tuple[int, int, int]]]]


class Decoder:
    """NetFlow v5, v9 (RFC 3954) and IPFIX (RFC 7011), over UDP.

    pending : rows that are gathered, and not yet given away.
    """

    def __init__(self) -> None:
        self.exporters = Exporters(secrets.randbits(64))
        self._walk = Walk(self.exporters)
        self._schemas: dict[tuple[Shape, ...], Schema] = {}
        self._layouts: dict[_Key, int] = {}
        self._templates: dict[tuple[int, int], _Key] = {}  # by exporter and name
        self._encoded: bytes | None = None
        self._texts: pa.Array = texts(np.empty((0, 16), np.uint8))
        self._layout((FIELDS5, False, True))

    @property
    def pending(self) -> int:
        return sum(len(schema.columns) for schema in self._schemas.values())

    def take(self, batch: Batch, now: float | None = None) -> Iterator[pa.RecordBatch]:
        """Decode a batch with sources; what had to be given away meanwhile, raw (see `flush`).

        The iterator must be used up. now : seconds since the epoch.
        """
        received = int(1000 * (time.time() if now is None else now))
        self._walk.begin(batch)
        while (stop := self._walk.walk(received)) != DONE:
            if stop == FULL:
                yield from self.flush()
            else:
                yield from self._learn()

    def flush(self) -> Iterator[pa.RecordBatch]:
        """All rows that are gathered, a record batch for each schema that has any. Raw: see `finish`."""
        for schema in self._schemas.values():
            if len(schema.columns):
                yield schema.take()
        self._walk.taken()

    def finish(self, raw: pa.RecordBatch) -> pa.RecordBatch:
        """Rows with addresses as text, as they are to leave. What forget() comes after is too late."""
        if len(self._texts) != len(self.exporters):
            self._texts = texts(np.ascontiguousarray(self.exporters.table()["address"]))
        return finished(raw, self._texts)

    # Templates

    def _learn(self) -> Iterator[pa.RecordBatch]:
        exporter, version, number, data = self._walk.found
        try:
            for told in read(version, number, data):
                if isinstance(told, Template):
                    yield from self._known(exporter, version, told)
                else:
                    self._withdrawn(exporter, told)
        except MalformedError:
            self._walk.refuse()

    def _known(self, exporter: int, version: int, template: Template) -> Iterator[pa.RecordBatch]:
        key = (template.fields, template.options, version == _NETFLOW9)
        if self._templates.get((exporter, template.name)) == key:
            return
        if key not in self._layouts and len(self._layouts) >= MOST_LAYOUTS:
            yield from self._clear()
        if not self.exporters.learn(exporter, template.name, self._layout(key)):
            raise MalformedError("an exporter has more templates than anybody needs")
        self._templates[exporter, template.name] = key
        self._encoded = None

    def _withdrawn(self, exporter: int, withdrawal: Withdrawal) -> None:
        for held, name in list(self._templates):
            if held == exporter and withdrawal.name in (None, name):
                if self._templates[held, name][1] == withdrawal.options:
                    del self._templates[held, name]
                    self.exporters.withdraw(exporter, name)
                    self._encoded = None

    def _layout(self, key: _Key) -> int:
        """The number of the layout of these fields, which is made where there is none yet."""
        if key not in self._layouts:
            fields, options, relative = key
            shapes, layout = planned(fields, relative)
            columns = None
            if not options:
                columns = self._schemas.setdefault(shapes, Schema(shapes)).columns
            self._layouts[key] = self._walk.add_layout(layout.steps, columns, layout.shortest, layout.length)
        return self._layouts[key]

    def _clear(self) -> Iterator[pa.RecordBatch]:
        """Give all rows away, and forget every layout that no template has; half of the templates, where all have one."""
        yield from self.flush()
        while len(set(self._templates.values())) >= MOST_LAYOUTS // 2:
            for one in list(self._templates)[: len(self._templates) // 2 + 1]:
                del self._templates[one]
        self._rebuild()

    def _rebuild(self) -> None:
        """Make layouts and schemas of the templates that there are, and no other."""
        self._walk.clear_layouts()
        self._layouts.clear()
        self._schemas.clear()
        self._encoded = None
        self._layout((FIELDS5, False, True))
        for (exporter, name), key in self._templates.items():
            self.exporters.learn(exporter, name, self._layout(key))

    # State

    def forget(self, now: float | None = None) -> Iterator[pa.RecordBatch]:
        """Forget exporters that have been silent for an hour; rows are given away first, as by `flush`."""
        table = self.exporters.table()
        heard = table["heard"] >= int(1000 * (time.time() if now is None else now)) - _FORGOTTEN
        if heard.all():
            return
        yield from self.flush()
        numbers = np.cumsum(heard) - 1
        self._replace(table[heard], {
            (int(numbers[exporter]), name): key for (exporter, name), key in self._templates.items() if heard[exporter]
        })  # fmt: skip

    def _replace(self, table: NDArray[np.void], templates: dict[tuple[int, int], _Key]) -> None:
        self.exporters.replace(table)
        self._templates = templates
        self._texts = texts(np.ascontiguousarray(table["address"]))
        self._rebuild()

    def snapshot(self) -> bytes:
        """Exporters, their counts and templates; not the rows."""
        if self._encoded is None:
            self._encoded = msgspec.msgpack.encode([
                (exporter, name, options, relative, fields)
                for (exporter, name), (fields, options, relative) in self._templates.items()
            ])  # fmt: skip
        return msgspec.msgpack.encode((self.exporters.table().tobytes(), msgspec.Raw(self._encoded)))

    def restore(self, data: bytes) -> None:
        """Go on from a snapshot, before the first batch. msgspec.DecodeError, ValueError: it is none."""
        state = msgspec.msgpack.decode(data, type=_State)
        table = np.frombuffer(state.exporters, EXPORTER)
        self._replace(table, {
            (exporter, name): (tuple(Field(*field) for field in fields), options, relative)
            for exporter, name, options, relative, fields in state.templates
        })  # fmt: skip
