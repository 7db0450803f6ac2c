"""The flow decoder under atheris (`make fuzz`): datagrams that nobody would think of.

An input is several datagrams, each behind two bytes of its length; the seeds are what exporters with templates send.
Whatever comes: nothing is raised, Arrow finds every array whole, and every datagram is decoded or counted.
"""

from __future__ import annotations

import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fastrecv.collector", "tests.unit.flow_datagrams"]):
    from fastrecv._flow import MALFORMED
    from tests.unit.flow_datagrams import (
        IPFIX,
        NETFLOW9,
        OCTETS,
        VARIABLE,
        Taken,
        a_set,
        options,
        options_templates,
        record5,
        sent,
        sent5,
        template,
        templates,
    )

_FIELDS = [(8, 4), (27, 16), (OCTETS, 3), (22, 4), (82, VARIABLE), (154, 8), (0x8000 | 7, 2), (320, 4)]
_PLAIN = [(field, 5 if length == VARIABLE else length) for field, length in _FIELDS if not field & 0x8000]
SEEDS = [
    [sent5(0, record5(1, 2), record5(3, 4))],
    [sent(NETFLOW9, 0, templates(NETFLOW9, template(256, _PLAIN)), a_set(256, bytes(88))),
     sent(NETFLOW9, 1, a_set(256, bytes(44)))],
    [sent(IPFIX, 0, templates(IPFIX, template(256, _FIELDS)), a_set(256, bytes(27), b"\0\3abc", bytes(14)))],
    [sent(IPFIX, 0, options_templates(IPFIX, options(IPFIX, 300, [(149, 4)], [(41, 8)])), a_set(300, bytes(24))),
     sent(IPFIX, 0, templates(IPFIX, template(2, [])))],
]  # fmt: skip


def packed(datagrams: list[bytes]) -> bytes:
    return b"".join(struct.pack("!H", len(one)) + one for one in datagrams)


def unpacked(data: bytes) -> list[bytes]:
    found, at = [], 0
    while at + 2 <= len(data):
        (length,) = struct.unpack_from("!H", data, at)
        found.append(data[at + 2 : at + 2 + length])
        at += 2 + length
    return found


def one_input(data: bytes) -> None:
    datagrams = unpacked(data)
    if not datagrams:
        return
    found = Taken().take(*datagrams)
    again = Taken()
    again.decoder.restore(found.decoder.snapshot())
    again.take(*datagrams)
    for taken, times in ((found, 1), (again, 2)):
        assert taken["datagrams"] == times * len(datagrams)
        assert sum(taken[kind] for kind in MALFORMED) <= times * len(datagrams)
    assert found["flows"] == len(found.rows)
    assert again["flows"] == len(found.rows) + len(again.rows)


def main() -> None:
    """Options are libFuzzer's, -max_total_time=300 for one; a folder of a corpus may follow them."""
    with tempfile.TemporaryDirectory() as name:
        for number, datagrams in enumerate(SEEDS):
            (Path(name) / str(number)).write_bytes(packed(datagrams))
        atheris.Setup([*sys.argv, name], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
