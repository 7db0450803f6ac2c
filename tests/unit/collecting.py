"""What the tests of the collector share: a datagram, exporters and their buckets, and rows that were written."""

from __future__ import annotations

import json
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from fastrecv.collector.settings import SHARDING
from fastrecv.policies import Sender
from tests.unit.flow_datagrams import NETFLOW9, OCTETS, a_set, sent, template, templates

__all__ = ["DATAGRAM", "SOURCES", "bucket_of", "lines"]

DATAGRAM = sent(NETFLOW9, 1, templates(NETFLOW9, template(256, [(OCTETS, 4)])), a_set(256, (1500).to_bytes(4)))
SOURCES = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "198.51.100.7"]


def bucket_of(source: str) -> int:
    found = SHARDING.bucket(Sender(ip_address(source), 1, ip_address("192.0.2.9"), 2))
    assert found is not None
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
