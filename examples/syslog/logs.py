"""A syslog collector: messages of RFC 5424 and RFC 3164, parsed to rows, which leave through a sink of fastrecv's.

    export SYSLOG_SINK=jsonl:/var/log/messages.jsonl
    fastrecv run -b 0.0.0.0:514 -w 2 --user nobody logs:Logs
    logger -n 127.0.0.1 -d hello

jsonl:- is standard output; fastrecv.sinks.parsed says what else there is. A row has the columns of messages.Row, source
(the address that it is from) and received. Needs what `fastrecv run` needs (fastrecv[cli]).
"""

from __future__ import annotations

import os
from datetime import UTC, datetime

from messages import Row, parsed

from fastrecv import Batch, sinks

__all__ = ["Logs"]


class Logs:
    """A worker of `fastrecv run`. A batch counts as handled when the sink has taken its rows."""

    def __init__(self) -> None:
        text = os.environ.get("SYSLOG_SINK", "")
        try:
            self._sink = sinks.parsed(text)
        except ValueError as error:
            raise ValueError(f"SYSLOG_SINK: {error}") from None

    def start(self) -> None:
        self._sink.open()

    def handle(self, batch: Batch) -> None:
        self._sink.publish(self.rows(batch, datetime.now(UTC)))

    def stop(self) -> None:
        self._sink.close(10)

    @staticmethod
    def rows(batch: Batch, now: datetime) -> list[Row]:
        """One for each datagram. now : when they were received."""
        received, here = now.isoformat(timespec="milliseconds").replace("+00:00", "Z"), now.astimezone()
        return [
            parsed(datagram, here)
            | {"source": address[0] if isinstance(address, tuple) else None, "received": received}
            for datagram, address in batch.datagrams()
        ]
