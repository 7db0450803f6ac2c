"""What a collector is told: by the command line, which leaves it in the environment for the workers."""

from __future__ import annotations

import os

import msgspec

from fastrecv.policies import Policy
from fastrecv.sinks import JetStream, Shards, parsed
from fastrecv.sinks.urls import shown

__all__ = ["SHARDING", "VARIABLE", "CollectorSettings"]

SHARDING = Policy("source", seed=1)
"""What decides about a row's shard: the exporter's address. The seed is fixed, so that all hosts agree unasked."""
_LONGEST = 86400  # seconds
VARIABLE = "FASTRECV_COLLECTOR"
"""Of the environment: the settings as JSON."""


class CollectorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """sink, exporters : where flows, and counts of each exporter, go: URLs of fastrecv.sinks; exporters None: nowhere.

    aggregate : keys, in one row for each of which flows are summed up; none: every flow is a row. window : seconds of
    aggregated rows and of exporters' counts. flush : seconds that a flow waits at most until it is given to the sink;
    0: it is before its batch counts as handled. shards : subjects among which rows are dealt, by exporter
    (fastrecv.sinks.Shards, SHARDING).
    """

    sink: str
    exporters: str | None = None
    aggregate: tuple[str, ...] = ()
    window: float = 60.0
    flush: float = 1.0
    shards: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.window <= _LONGEST:
            raise ValueError(f"window is {self.window}: give seconds, more than 0, at most {_LONGEST}")
        if not 0 <= self.flush <= _LONGEST:
            raise ValueError(f"flush is {self.flush}: give seconds, 0 to {_LONGEST}")
        Shards(SHARDING, self.shards)
        if self.shards > 1 and not isinstance(parsed(self.sink), JetStream):
            raise ValueError(f"{self.shards} shards are for sinks with subjects, nats: or tls:, not {shown(self.sink)}")

    @classmethod
    def given(cls) -> CollectorSettings:
        """Those of the environment. ValueError where there are none, or none that make sense."""
        text = os.environ.get(VARIABLE)
        if text is None:
            raise ValueError(f"{VARIABLE} is not set: start the collector with `fastrecv collect`")
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{VARIABLE}: {error}") from None

    def give(self) -> None:
        """Leave them in the environment, for the processes that are started."""
        os.environ[VARIABLE] = msgspec.json.encode(self).decode()
