"""A name server: authoritative for the names of one zone file, which dnslib reads.

    export DNS_ZONE=example.zone
    fastrecv run -b 0.0.0.0:53 -w 2 --user nobody --policy source+port nameserver:NameServer
    dig @127.0.0.1 www.example.com

Needs dnslib, and what `fastrecv run` needs (fastrecv[cli]). Over UDP only: what is too long for it is cut off, and says
so. Names below a delegation are not served. A changed file is read by new workers: `fastrecv workers restart`.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

from dnslib import CLASS, EDNS0, OPCODE, QTYPE, RCODE, RR, DNSLabel, DNSRecord

from fastrecv import Batch, Receiver

__all__ = ["NameServer", "Zone"]

LONGEST = 1232  # bytes of an answer over IPv6 that is not fragmented (DNS flag day 2020)
SHORT = 512  # without EDNS (RFC 1035, 2.3.4)
HEADER = 12
ANY_CLASS = 255  # RFC 1035, 3.2.5
BAD_VERSION = 16  # BADVERS (RFC 6891, 9), of which 4 bits are in the header and the rest in OPT
KNOWN = 10_000  # questions whose answers are kept

Records = list[RR]


class Zone:
    """The records of a zone file by name and type. ValueError where it cannot be served."""

    def __init__(self, text: str) -> None:
        try:
            records: Records = list(RR.fromZone(text))
        except Exception as error:  # whatever dnslib finds
            raise ValueError(f"it is no zone file: {error}") from error
        starts = [record for record in records if record.rtype == QTYPE.SOA]
        if len(starts) != 1:
            raise ValueError(f"it has {len(starts)} SOA records: give one")
        self.start = starts[0]
        self.apex: DNSLabel = self.start.rname
        self._names: dict[DNSLabel, dict[int, Records]] = {}
        for record in records:
            if not record.rname.matchSuffix(self.apex):
                raise ValueError(f"{record.rname} is not below {self.apex}")
            if record.rtype == QTYPE.NS and record.rname != self.apex:
                raise ValueError(f"{record.rname} is delegated, which is not served: leave its NS out")
            self._names.setdefault(record.rname, {}).setdefault(record.rtype, []).append(record)
            for name in _above(record.rname, self.apex):
                self._names.setdefault(name, {})  # it exists, too (RFC 4592, 2.2.2)
        for name, found in self._names.items():
            if QTYPE.CNAME in found and (len(found) > 1 or len(found[QTYPE.CNAME]) > 1):
                raise ValueError(f"{name} is a CNAME and something else: give it one or the other")

    def find(self, name: DNSLabel) -> dict[int, Records] | None:
        """What there is of a name, by type; of its wildcard where it does not exist (RFC 4592); None: nothing."""
        if name in self._names:
            return self._names[name]
        closest = next(above for above in _above(name, self.apex) if above in self._names)
        found = self._names.get(DNSLabel((b"*", *closest.label)))
        if found is None:
            return None
        return {
            kind: [RR(name, record.rtype, record.rclass, record.ttl, record.rdata) for record in records]
            for kind, records in found.items()
        }

    def answer(self, query: DNSRecord) -> DNSRecord:
        """What is said to a query with one question."""
        reply: DNSRecord = query.reply(ra=0)
        reply.header.ad = 0  # nothing here is signed
        name, kind = query.q.qname, query.q.qtype
        if query.q.qclass not in (CLASS.IN, ANY_CLASS) or not name.matchSuffix(self.apex):
            reply.header.aa, reply.header.rcode = 0, RCODE.REFUSED
            return reply
        while True:
            found = self.find(name)
            if found is None:
                reply.header.rcode = RCODE.NXDOMAIN
                break
            if kind == QTYPE.ANY and found:
                kind = min(found)  # one of them is enough (RFC 8482, 4.1)
            if kind in found:
                reply.add_answer(*found[kind])
                return reply
            if QTYPE.CNAME not in found:
                break
            (alias,) = found[QTYPE.CNAME]
            if alias in reply.rr:
                break
            reply.add_answer(alias)
            name = alias.rdata.label
            if not name.matchSuffix(self.apex):
                return reply
        reply.add_auth(self.start)  # how long the absence may be remembered (RFC 2308)
        return reply


def _above(name: DNSLabel, apex: DNSLabel) -> list[DNSLabel]:
    """The names above a name of the zone, up to its apex."""
    return [DNSLabel(name.label[place:]) for place in range(1, len(name.label) - len(apex.label) + 1)]


class NameServer:
    """A worker of `fastrecv run`. counts : answered, malformed (told so), dropped (no query at all)."""

    def __init__(self) -> None:
        path = os.environ.get("DNS_ZONE", "")
        try:
            self._zone = Zone(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"DNS_ZONE is {path!r}: set it to a zone file ({error})") from None
        self.counts: Counter[str] = Counter()
        self._known = functools.lru_cache(KNOWN)(self._asked)

    def serve(self, sockets: list[socket.socket]) -> None:
        """Answer batch by batch, until told to stop; then what is left in the queue, for a second at most."""
        until: float | None = None

        def stop(*_: object) -> None:
            nonlocal until
            until = until or time.monotonic() + 1

        signal.signal(signal.SIGTERM, stop)
        with Receiver(sockets[0], destinations=True) as receiver:
            while until is None or time.monotonic() < until:
                batch = receiver.recv(0.2 if until is None else 0)
                if len(batch):
                    receiver.reply(batch, self.answers(batch))
                elif until is not None:
                    return

    def stop(self) -> None:
        sys.stderr.write(f"nameserver {os.getpid()}: {dict(self.counts)}\n")

    def answers(self, batch: Batch) -> list[bytes | None]:
        """One for each datagram; None where there is none."""
        return [self.answer(query) for query, _ in batch.datagrams()]

    def answer(self, query: bytes) -> bytes | None:
        """What is said to a datagram; nothing where it is none that could be answered, or an answer itself."""
        if len(query) < HEADER or query[2] & 0x80:
            self.counts["dropped"] += 1
            return None
        what, reply = self._known(query[2:])
        self.counts[what] += 1
        return query[:2] + reply

    def _asked(self, query: bytes) -> tuple[str, bytes]:
        """What is counted and said, without its number, to a query without its number: many ask the same."""
        try:
            parsed = DNSRecord.parse(bytes(2) + query)
            if parsed.header.get_opcode() == OPCODE.QUERY and len(parsed.questions) != 1:
                raise ValueError("one question is asked at a time")
            extensions = [record for record in parsed.ar if record.rtype == QTYPE.OPT]
            if len(extensions) > 1:
                raise ValueError("one OPT is all that there may be (RFC 6891, 6.1.1)")
        except Exception:  # whatever dnslib makes of nonsense
            return "malformed", _said(query, RCODE.FORMERR)
        if parsed.header.get_opcode() != OPCODE.QUERY:
            return "answered", _said(query, RCODE.NOTIMP)
        if extensions and extensions[0].edns_ver:  # RFC 6891, 6.1.3: what it wants is not looked at
            reply = parsed.reply(ra=0, aa=0)
            reply.header.ad, reply.header.rcode = 0, BAD_VERSION & 0xF
            reply.add_ar(EDNS0(udp_len=LONGEST, ext_rcode=BAD_VERSION >> 4))
            return "answered", bytes(reply.pack()[2:])
        reply, room = self._zone.answer(parsed), SHORT
        if extensions:
            room = min(max(extensions[0].edns_len, SHORT), LONGEST)
            reply.add_ar(EDNS0(udp_len=LONGEST))
        packed = reply.pack()
        if len(packed) > room:
            reply.header.tc, reply.rr, reply.auth = 1, [], []
            packed = reply.pack()
        return "answered", bytes(packed[2:])


def _said(query: bytes, code: int) -> bytes:
    """A header and nothing else, that says why: all that is understood of the query."""
    kept = int.from_bytes(query[:2]) & 0x7900  # opcode, and whether recursion is desired (RFC 1035, 4.1.1)
    return (0x8000 | kept | code).to_bytes(2) + bytes(8)
