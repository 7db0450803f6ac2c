"""Where everything is in the test bed, and what it is called in the engine: for those who need no more than that."""

from __future__ import annotations

__all__ = ["COLLECTOR", "ENGINE", "EXPORTERS", "NODES", "PORT", "PREFIX", "SERVERS", "SHARDS", "STREAM", "durable"]

# From the ranges for documentation and, where there are many, for benchmarking (RFC 5737, RFC 2544).
COLLECTOR, ENGINE = "198.51.100.1", "203.0.113.1"
EXPORTERS = "198.18.0.0"
"""The first of them; the last 16 bits vary."""
PORT = 2055
NODES = 3
SERVERS = [f"{ENGINE}:{4222 + node}" for node in range(NODES)]
STREAM = PREFIX = "flows"
SHARDS = 8


def durable(shard: int) -> str:
    """The name of a shard's consumer."""
    return f"shard-{shard}"
