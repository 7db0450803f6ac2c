"""What a sink is: where results leave a service, behind five calls that every engine can offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self, TypeAlias, runtime_checkable

from fastrecv._recv import Batch

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Data", "Rows", "Sink", "SinkStatistics"]

Rows: TypeAlias = Sequence[Mapping[str, object]]
"""A mapping of column names to values for each row; a name that a row lacks is null there."""
Data: TypeAlias = "Batch | pa.RecordBatch | Rows"
"""What a sink takes."""


class SinkStatistics(NamedTuple):
    """What a sink has done since it was opened. All but rows, lost and spooled_bytes count messages.

    A message is what one publish() gave, or a part of it where that was too long for one message of the engine.

    rows : that publish() has taken. published : messages of those. adopted : messages taken over from the spool of a
    process that has died. acknowledged : messages that are where they are going. waiting : those that are not yet.
    dropped : messages given up because there was no room for newer ones, of which some that were on their way just then
    may have arrived; or because the sink has failed. lost : rows of the latter, which publish() had taken. At all times
    published + adopted = acknowledged + waiting + dropped.
    duplicates : acknowledged messages that the engine said it had already, and removed. torn : halves of messages that
    a killed process left, which no publish() had returned for. reconnects : connections to the engine after the first.
    spooled_bytes : on disk, in memory where there is no spool.
    """

    rows: int = 0
    published: int = 0
    adopted: int = 0
    acknowledged: int = 0
    waiting: int = 0
    dropped: int = 0
    duplicates: int = 0
    torn: int = 0
    reconnects: int = 0
    spooled_bytes: int = 0
    lost: int = 0


@runtime_checkable
class Sink(Protocol):
    """Where results leave. One thread publishes; statistics() may be called by any.

    A context manager: open() at its beginning; at its end close(), which has the sink's patience for a timeout.
    """

    def open(self) -> None:
        """Make it ready; an engine that is away is no error. OSError, ValueError: what it was made with cannot be."""

    def publish(self, data: Data, shard: int = 0) -> None:
        """Take a batch, an Arrow record batch or rows; nothing where there are none.

        shard : 0 and up; what has the same stays in its order (fastrecv.sinks.Shards).
        Returns soon, and at the latest when the sink's patience has ended: then SinkFull is raised, and nothing was
        taken. What was taken is safe from the death of this process where the sink has a spool.

        Raises
        ------
        SinkFull   : there was no room. What to do (wait, leave out, die) is the caller's choice.
        TypeError, ValueError : the data cannot be written as what this sink writes; nothing was taken.
        OSError    : the sink has failed; errno says how.

        """

    def flush(self, timeout: float | None = None) -> None:
        """Return when all that was published is where it is going. TimeoutError after so many seconds; None: never."""

    def close(self, timeout: float | None = None) -> None:
        """Flush, and let go of everything; closing twice does no harm.

        TimeoutError where something was still waiting: the sink is closed all the same, and what is in a spool stays
        there for the next process that opens it.
        """

    def statistics(self) -> SinkStatistics:
        """What it has done so far; never waits."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
