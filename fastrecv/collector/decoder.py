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
from fastrecv.sinks import Shards
from fastrecv.sinks.shards import parted

__all__ = ["MOST_LAYOUTS", "Decoder"]

MOST_LAYOUTS = 1024
"""Different templates of all exporters together; when they are more, those that nobody has any more are forgotten."""
MOST_KNOWN = 1 << 16
"""Templates of all exporters together."""
_NETFLOW9 = 9
_FORGOTTEN = 3600_000  # ms of silence until an exporter goes
_FIRST = (FIELDS5, False, True)

_Key = tuple[tuple[Field, ...], bool, bool]
"""What makes a layout: fields; whether they are of options; whether their times count from the exporter's beginning."""


class _State(msgspec.Struct, array_like=True):
    """What outlives a decoder. exporters : EXPORTER. templates : exporter, name, and which of the layouts."""

    exporters: bytes
    layouts: list[tuple[list[tuple[int, int, int]], bool, bool]]
    templates: list[tuple[int, int, int]]


class Decoder:
    """NetFlow v5, v9 (RFC 3954) and IPFIX (RFC 7011), over UDP.

    shards : what split() goes by; None: all rows are of shard 0. exporters : who they are, with what is counted of
    each. known : templates of all of them.
    """

    def __init__(self, shards: Shards | None = None) -> None:
        self.exporters = Exporters(secrets.randbits(64))
        self._shards = shards
        self._walk = Walk(self.exporters)
        self._schemas: dict[tuple[Shape, ...], Schema] = {}
        self._layouts: dict[_Key, int] = {}
        self._encoded: dict[_Key, msgspec.Raw] = {}  # for the state
        self._templates: dict[int, dict[int, _Key]] = {}  # by exporter and name
        self.known = 0
        self._addressed(self.exporters.table())
        self._layout(_FIRST)

    @property
    def pending(self) -> int:
        """Rows that are gathered, and not yet given away."""
        return self._walk.gathered

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
        self._look()
        return finished(raw, self._texts)

    def by_address(self, raw: pa.RecordBatch) -> pa.RecordBatch:
        """Rows with the same number for all exporters of an address, whatever their domains and versions: for sums."""
        self._look()
        return raw.set_column(0, raw.schema.field(0), self._first.take(raw.column(0)))

    def split(self, raw: pa.RecordBatch) -> list[tuple[int, pa.RecordBatch]]:
        """Raw rows by the shards of their exporters; what names no exporter is of shard 0."""
        place = raw.schema.get_field_index("exporterAddress")
        if self._shards is None or place < 0:
            return [(0, raw)]
        self._look()
        return parted(raw, self._shard[raw.column(place).to_numpy()])

    def _look(self) -> None:
        if len(self._texts) != len(self.exporters):
            self._addressed(self.exporters.table())

    def _addressed(self, table: NDArray[np.void]) -> None:
        """Of all exporters the text of the address, the first who has the same one, and the shard."""
        addresses = np.ascontiguousarray(table["address"])
        _, first, places = np.unique(addresses.view("V16").ravel(), return_index=True, return_inverse=True)
        self._texts: pa.Array = texts(addresses)
        self._first: pa.Array = pa.array(first[places].astype(np.int32))
        if self._shards is not None:
            packed = pa.Array.from_buffers(pa.binary(16), len(table), [None, pa.py_buffer(addresses)])
            self._shard = self._shards.of(pa.record_batch([packed], ["source_address"]))

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
        own = self._templates.setdefault(exporter, {})
        if own.get(template.name) == key:
            return
        if key not in self._layouts and len(self._layouts) >= MOST_LAYOUTS:
            yield from self._clear()
            own = self._templates.setdefault(exporter, {})
        if template.name not in own and self.known >= MOST_KNOWN:
            raise MalformedError("exporters have more templates than anybody needs")
        if not self.exporters.learn(exporter, template.name, self._layout(key)):
            raise MalformedError("an exporter has more templates than anybody needs")
        self.known += template.name not in own
        own[template.name] = key

    def _withdrawn(self, exporter: int, withdrawal: Withdrawal) -> None:
        own = self._templates.get(exporter, {})
        for name in list(own) if withdrawal.name is None else [withdrawal.name]:
            if name in own and own[name][1] == withdrawal.options:
                del own[name]
                self.known -= 1
                self.exporters.withdraw(exporter, name)

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
        """Give all rows away, and forget each layout that no template has; if that is not enough, some exporters'.

        Who came first keeps his: those who come with more than anybody needs are not to cost the others theirs.
        """
        yield from self.flush()
        kept: set[_Key] = set()
        for exporter, own in list(self._templates.items()):
            more = set(own.values()) - kept
            if len(kept) + len(more) < MOST_LAYOUTS // 2:
                kept |= more
            else:
                del self._templates[exporter]
        self._rebuild()

    def _rebuild(self) -> None:
        """Make layouts and schemas of the templates that there are, and no other."""
        self._walk.clear_layouts()
        self._layouts.clear()
        self._encoded.clear()
        self._schemas.clear()
        self._layout(_FIRST)
        self.known = 0
        for exporter, own in self._templates.items():
            for name, key in own.items():
                self.known += self.exporters.learn(exporter, name, self._layout(key))

    # State

    def silent(self, now: float | None = None) -> bool:
        """Whether forget() has anybody to forget: then exporters get new numbers, and raw rows of before are void."""
        return not bool(_heard(self.exporters.table(), now).all())

    def forget(self, now: float | None = None) -> Iterator[pa.RecordBatch]:
        """Forget exporters that have been silent for an hour; rows are given away first, as by `flush`."""
        table = self.exporters.table()
        heard = _heard(table, now)
        if heard.all():
            return
        yield from self.flush()
        numbers = (np.cumsum(heard) - 1).tolist()
        stay = {numbers[exporter]: own for exporter, own in self._templates.items() if heard[exporter]}
        self._replace(table[heard], stay)

    def _replace(self, table: NDArray[np.void], templates: dict[int, dict[int, _Key]]) -> None:
        self.exporters.replace(table)
        self._templates = templates
        self._addressed(table)
        self._rebuild()

    def snapshot(self) -> bytes:
        """Exporters, their counts and templates; not the rows."""
        places = {key: place for place, key in enumerate(self._layouts)}
        for key in self._layouts:
            if key not in self._encoded:
                self._encoded[key] = msgspec.Raw(msgspec.msgpack.encode(key))
        return msgspec.msgpack.encode((
            self.exporters.table().tobytes(),
            [self._encoded[key] for key in self._layouts],
            [(exporter, name, places[key]) for exporter, own in self._templates.items() for name, key in own.items()],
        ))  # fmt: skip

    def restore(self, data: bytes, exact: bool = True) -> None:
        """Go on from a snapshot, before the first batch. msgspec.DecodeError, ValueError: it is none.

        exact : it is the state after the last batch; where it is older, what is missing since is not taken for lost.
        """
        state = msgspec.msgpack.decode(data, type=_State)
        table = np.frombuffer(state.exporters, EXPORTER).copy()
        if not exact:
            table["followed"] = 0
        layouts = [(tuple(Field(*field) for field in fields), of, relative) for fields, of, relative in state.layouts]
        templates: dict[int, dict[int, _Key]] = {}
        for exporter, name, place in state.templates:
            templates.setdefault(exporter, {})[name] = layouts[place]
        self._replace(table, templates)


def _heard(table: NDArray[np.void], now: float | None) -> NDArray[np.bool_]:
    """Of whom something has come in the last hour."""
    since = int(1000 * (time.time() if now is None else now)) - _FORGOTTEN
    return np.asarray(table["heard"] >= since)
