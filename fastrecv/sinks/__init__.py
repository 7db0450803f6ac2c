"""fastrecv.sinks: where what a handler makes of its batches leaves the service.

A Sink takes batches, Arrow record batches or rows, never blocks past its patience, and says what became of them.
`parsed` makes one of text. Needs the extra: pip install 'fastrecv[sinks]'; JsonLines of rows needs nothing.
"""

from fastrecv.errors import SinkFull
from fastrecv.sinks.arrow_files import ArrowFiles
from fastrecv.sinks.base import BaseSink
from fastrecv.sinks.engine import Access
from fastrecv.sinks.interface import Data, Rows, Sink, SinkStatistics
from fastrecv.sinks.jetstream import JetStream
from fastrecv.sinks.json_lines import JsonLines
from fastrecv.sinks.parquet import Parquet
from fastrecv.sinks.records import record_batch
from fastrecv.sinks.shards import Shards
from fastrecv.sinks.urls import parsed

__all__ = [
    "Access",
    "ArrowFiles",
    "BaseSink",
    "Data",
    "JetStream",
    "JsonLines",
    "Parquet",
    "Rows",
    "Shards",
    "Sink",
    "SinkFull",
    "SinkStatistics",
    "parsed",
    "record_batch",
]
