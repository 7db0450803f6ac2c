"""What flows may be summed up by. Nothing here needs pyarrow: commands do without."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from fastrecv.collector.elements import META_COLUMNS, named

__all__ = ["BOUNDS", "COUNT", "SUMS", "checked"]

SUMS = ("octetDeltaCount", "packetDeltaCount")
"""What is summed up, beside the flows, which are counted: deltaFlowCount."""
COUNT = "deltaFlowCount"
BOUNDS = ("flowStartMilliseconds", "flowEndMilliseconds")
"""Of the window, as RFC 7015, 5.1 has it."""
_TAKEN = {*SUMS, COUNT, *BOUNDS, "collectionTimeMilliseconds"}


def checked(keys: Sequence[str]) -> tuple[str, ...]:
    """The keys, where one may aggregate by them. ValueError."""
    known = ({*META_COLUMNS} | named().keys()) - _TAKEN
    for key in keys:
        if key not in known:
            if key in _TAKEN:
                raise ValueError(f"{key!r} is no key: it is what the rows of a window are given")
            near = difflib.get_close_matches(key, sorted(known), 1)
            raise ValueError(
                f"{key!r} is no information element{f', did you mean {near[0]!r}?' if near else ''}: give names like "
                "sourceIPv4Address,destinationTransportPort"
            )
    if len(set(keys)) < len(keys):
        raise ValueError("a key is named twice")
    return tuple(keys)
