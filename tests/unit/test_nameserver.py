"""The name server example: what is said to which query, and what is no query at all."""

from __future__ import annotations

import re
from pathlib import Path

import nameserver
import pytest
from dnslib import EDNS0, QTYPE, RCODE, DNSHeader, DNSQuestion, DNSRecord
from hypothesis import given
from hypothesis import strategies as st
from nameserver import NameServer, Zone

EXAMPLE = Path(nameserver.__file__).parent / "example.zone"
BIG = "".join(f'big IN TXT "{"x" * 200}{number}"\n' for number in range(4))
START = "$ORIGIN example.com.\n$TTL 60\n@ IN SOA ns.example.com. admin.example.com. ( 1 2 3 4 5 )\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> NameServer:
    path = tmp_path_factory.mktemp("zone") / "zone"
    path.write_text(f"{EXAMPLE.read_text()}loop IN CNAME loop2\nloop2 IN CNAME loop\n{BIG}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DNS_ZONE", str(path))
        return NameServer()


def asked(
    server: NameServer, name: str, kind: str, room: int | None = None, *, version: int = 0, qclass: str = "IN"
) -> DNSRecord:
    query = DNSRecord.question(name, kind, qclass)
    if room is not None:
        query.add_ar(EDNS0(udp_len=room, version=version))
    answer = server.answer(bytes(query.pack()))
    assert answer is not None
    parsed = DNSRecord.parse(answer)
    assert parsed.header.id == query.header.id
    assert parsed.header.qr == 1
    assert parsed.header.ra == 0
    assert str(parsed.q.qname) == str(query.q.qname)
    return parsed


@pytest.mark.parametrize(
    ("name", "kind", "code", "answers", "absent"),
    [
        ("www.example.com", "A", "NOERROR", ["192.0.2.1"], False),
        ("wWw.EXAMPLE.com", "AAAA", "NOERROR", ["2001:db8::1"], False),
        ("www.example.com", "MX", "NOERROR", [], True),
        ("x.wild.example.com", "A", "NOERROR", ["192.0.2.7"], False),
        ("x.y.wild.example.com", "A", "NOERROR", ["192.0.2.7"], False),
        ("x.wild.example.com", "AAAA", "NOERROR", [], True),
        ("b.c.example.com", "A", "NOERROR", [], True),
        ("alias.example.com", "A", "NOERROR", ["www.example.com.", "192.0.2.1"], False),
        ("alias.example.com", "CNAME", "NOERROR", ["www.example.com."], False),
        ("out.example.com", "A", "NOERROR", ["www.example.net."], False),
        ("loop.example.com", "A", "NOERROR", ["loop2.example.com.", "loop.example.com."], True),
        ("example.com", "ANY", "NOERROR", ["ns.example.com."], False),
        ("nothing.example.com", "A", "NXDOMAIN", [], True),
        ("example.net", "A", "REFUSED", [], False),
        ("notexample.com", "A", "REFUSED", [], False),
    ],
)
def test_answers(server: NameServer, name: str, kind: str, code: str, answers: list[str], absent: bool) -> None:
    reply = asked(server, name, kind)
    assert RCODE[reply.header.rcode] == code
    assert [str(record.rdata) for record in reply.rr] == answers
    assert [QTYPE[record.rtype] for record in reply.auth] == (["SOA"] if absent else [])
    assert reply.header.aa == (code != "REFUSED")


@pytest.mark.parametrize(("room", "whole"), [(None, False), (512, False), (1000, True), (4096, True)])
def test_what_is_too_long_is_cut_off_and_says_so(server: NameServer, room: int | None, whole: bool) -> None:
    reply = asked(server, "big.example.com", "TXT", room)
    assert (reply.header.tc, len(reply.rr)) == ((0, 4) if whole else (1, 0))
    assert [record.edns_len for record in reply.ar] == ([] if room is None else [1232])


@pytest.mark.parametrize(("kind", "code"), [("IN", "NOERROR"), ("*", "NOERROR"), ("CH", "REFUSED"), ("CS", "REFUSED")])
def test_another_class_than_that_of_the_zone_is_refused(server: NameServer, kind: str, code: str) -> None:
    reply = asked(server, "www.example.com", "A", qclass=kind)
    assert (RCODE[reply.header.rcode], len(reply.rr)) == (code, int(code == "NOERROR"))
    assert reply.header.aa == (code == "NOERROR")


def test_another_version_of_edns_is_told_which_one_there_is(server: NameServer) -> None:
    for name in ("www.example.com", "example.net"):
        reply = asked(server, name, "A", 4096, version=1)
        (extension,) = reply.ar
        assert (extension.edns_rcode << 4 | reply.header.rcode, extension.edns_ver, extension.edns_len) == (16, 0, 1232)
        assert (reply.rr, reply.auth, reply.header.aa) == ([], [], 0)


def test_two_opts_are_malformed(server: NameServer) -> None:
    query = DNSRecord.question("www.example.com")
    query.add_ar(EDNS0(), EDNS0())
    answer = server.answer(bytes(query.pack()))
    assert answer is not None
    assert DNSRecord.parse(answer).header.rcode == RCODE.FORMERR


def test_what_cannot_be_answered(server: NameServer) -> None:
    server.counts.clear()
    query = bytes(DNSRecord(DNSHeader(id=7, rd=1), q=DNSQuestion("www.example.com")).pack())
    assert server.answer(query[:-1]) == b"\0\7\x81\1" + bytes(8)  # FORMERR
    assert server.answer(query[:5] + b"\2" + query[6:]) == b"\0\7\x81\1" + bytes(8)  # two questions
    assert server.answer(query[:2] + b"\x21" + query[3:]) == b"\0\7\xa1\4" + bytes(8)  # NOTIMP: NOTIFY
    assert server.answer(query[:2] + b"\x81" + query[3:]) is None  # an answer
    assert server.answer(query[:11]) is None
    assert server.answer(b"") is None
    assert server.counts == {"malformed": 2, "answered": 1, "dropped": 3}


@given(st.binary(max_size=80))
def test_nothing_that_comes_is_too_much(server: NameServer, data: bytes) -> None:
    query = bytes(DNSRecord.question("www.example.com").pack())
    for datagram in (data, query[:12] + data, query[:13] + data + query[13:]):
        reply = server.answer(datagram)
        assert reply is None or (reply[:2] == datagram[:2] and reply[2] & 0x80)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense (", "it is no zone file: "),
        ("", "it has 0 SOA records: give one"),
        (f"{START}example.net. IN A 192.0.2.1\n", "example.net. is not below example.com."),
        (f"{START}sub IN NS ns.sub\n", "sub.example.com. is delegated, which is not served"),
        (f"{START}www IN A 192.0.2.1\nwww IN CNAME ns\n", "www.example.com. is a CNAME and something else"),
    ],
)
def test_zones_that_cannot_be_served(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        Zone(text)
    assert "\n" not in str(caught.value)


def test_a_zone_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNS_ZONE", "/nowhere/zone")
    with pytest.raises(ValueError, match="DNS_ZONE is '/nowhere/zone': set it to a zone file"):
        NameServer()
