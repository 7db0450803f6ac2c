"""What exporters have sent, and what of it was lost, unknown or malformed: a row for each and every window."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastrecv._flow import MALFORMED
from fastrecv.collector.schemas import key_field

__all__ = ["COUNTS", "rows"]

COUNTS = ("datagrams", "flows", "octets", "packets", "options", "lost", "late", "unknown")
"""See fastrecv._flow.EXPORTER. lost may be negative: what was counted in one window came late, in the next."""


def rows(now: NDArray[np.void], before: NDArray[np.void], since: float, until: float) -> pa.RecordBatch:
    """What exporters (EXPORTER) of whom something has come have sent between two looks at them: raw (Decoder.finish).

    before : the same exporters, by number, as far as they were known. since, until : seconds since the epoch.
    """
    earlier = np.zeros_like(now)
    earlier[: len(before)] = before
    heard = now["datagrams"] != earlier["datagrams"]
    now, earlier = now[heard], earlier[heard]
    columns: dict[str, pa.Array] = {
        name: pa.repeat(pa.scalar(int(1000 * moment), pa.timestamp("ms", "UTC")), len(now))
        for name, moment in (("since", since), ("until", until))
    }
    exporter = key_field("exporterAddress")
    columns[exporter.name] = pa.array(np.flatnonzero(heard).astype(np.int32))
    columns["exportProtocolVersion"] = pa.array(now["version"].astype(np.uint8))
    columns["observationDomainId"] = pa.array(now["domain"])
    for name in COUNTS:
        columns[name] = pa.array((now[name] - earlier[name]).astype(np.int64))
    for place, kind in enumerate(MALFORMED):
        columns[f"malformed_{kind}"] = pa.array(
            (now["malformed"][:, place] - earlier["malformed"][:, place]).astype(np.int64)
        )
    fields = [exporter if name == exporter.name else pa.field(name, made.type) for name, made in columns.items()]
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=pa.schema(fields))
