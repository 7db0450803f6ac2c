"""The syslog example: messages as rows. The examples of RFC 5424, 6.5, what logger(1) sends, and nonsense."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logs import Logs
from messages import Row, parsed

from fastrecv import Batch

NOW = datetime(2027, 1, 1, 12, tzinfo=UTC)
EMPTY = dict.fromkeys(("time", "host", "app", "process", "id", "data", "message"))


def row(form: str, facility: str | None, severity: str | None, **found: Any) -> Row:
    return {"format": form, "facility": facility, "severity": severity} | EMPTY | found


@pytest.mark.parametrize(
    ("datagram", "expected"),
    [
        (
            "<34>1 2003-10-11T22:14:15.003Z mymachine.example.com su - ID47 - \ufeff'su root' failed on /dev/pts/8",
            row("rfc5424", "auth", "crit", time="2003-10-11T22:14:15.003Z", host="mymachine.example.com", app="su",
                id="ID47", message="'su root' failed on /dev/pts/8"),
        ),
        (
            "<165>1 2003-08-24T05:14:15.000003-07:00 192.0.2.1 myproc 8710 - - %% It's time to make the do-nuts.",
            row("rfc5424", "local4", "notice", time="2003-08-24T05:14:15.000003-07:00", host="192.0.2.1",
                app="myproc", process="8710", message="%% It's time to make the do-nuts."),
        ),
        (
            '<165>1 2003-10-11T22:14:15.003Z h evntslog - ID47 [exampleSDID@32473 iut="3" eventID="1011"][x@1 a="'
            r'\]\\\"\n"]',
            row("rfc5424", "local4", "notice", time="2003-10-11T22:14:15.003Z", host="h", app="evntslog", id="ID47",
                data={"exampleSDID@32473": {"iut": "3", "eventID": "1011"}, "x@1": {"a": r']\"\n'}}),
        ),
        ("<0>1 - - - - - -", row("rfc5424", "kern", "emerg")),
        ("<13>1 - - - - - [empty@1] text\n", row("rfc5424", "user", "notice", data={"empty@1": {}}, message="text")),
        (
            "<13>Nov 22 20:33:58 vm root[26289]: hello wörld",
            row("rfc3164", "user", "notice", time="2026-11-22T20:33:58", host="vm", app="root", process="26289",
                message="hello wörld"),
        ),
        (
            "<13>Jan  2 00:00:01 vm no tag here",
            row("rfc3164", "user", "notice", time="2027-01-02T00:00:01", host="vm", message="no tag here"),
        ),
        (
            "<86>2026-12-31T23:59:59.5+01:00 vm sshd[1]: hello",
            row("rfc3164", "authpriv", "info", time="2026-12-31T23:59:59.5+01:00", host="vm", app="sshd", process="1",
                message="hello"),
        ),
        ("no priority", row("unknown", None, None, message="no priority")),
        ("<192>too much", row("unknown", None, None, message="<192>too much")),
        ("<191>2 no such version", row("unknown", "local7", "debug", message="2 no such version")),
        ("<13>Nov 31 00:00:00 vm a: b", row("unknown", "user", "notice", message="Nov 31 00:00:00 vm a: b")),
        ("<13>1 2003-13-11T22:14:15Z - - - - -",
         row("unknown", "user", "notice", message="1 2003-13-11T22:14:15Z - - - - -")),
        ('<13>1 - - - - - [a b="c"', row("unknown", "user", "notice", message='1 - - - - - [a b="c"')),
        ("", row("unknown", None, None, message="")),
    ],
)  # fmt: skip
def test_messages(datagram: str, expected: Row) -> None:
    assert parsed(datagram.encode(), NOW) == expected


@pytest.mark.parametrize(
    ("text", "now", "time"),
    [
        ("Feb 29 00:00:01", datetime(2027, 12, 1, tzinfo=UTC), "2028-02-29T00:00:01"),
        ("Dec 31 23:59:59", datetime(2027, 1, 1, tzinfo=UTC), "2026-12-31T23:59:59"),
        ("Jan  1 00:00:00", datetime(2026, 12, 31, 23, tzinfo=UTC), "2027-01-01T00:00:00"),
    ],
)
def test_a_time_without_a_year_is_in_the_nearest_and_a_local_message_has_no_host(
    text: str, now: datetime, time: str
) -> None:
    expected = row("rfc3164", "user", "notice", time=time, app="su", message="local")
    assert parsed(f"<13>{text} su: local".encode(), now) == expected


def test_bytes_that_are_no_text_are_kept_as_far_as_they_are() -> None:
    assert parsed(b"<13>1 - - - - - - \xff\xfe", NOW)["message"] == "\ufffd\ufffd"


@given(st.binary(max_size=80))
def test_every_datagram_is_a_row(data: bytes) -> None:
    for datagram in (data, b"<13>" + data, b"<13>1 - - - - - " + data, b"<13>1 - - - - - [a" + data):
        assert list(parsed(datagram, NOW)) == ["format", "facility", "severity", *EMPTY]


def test_rows_say_when_they_came() -> None:
    rows = Logs.rows(Batch.of([b"<13>1 - - - - - - a", b"b"]), NOW)
    assert [(row["message"], row["received"], row["source"]) for row in rows] == [
        ("a", "2027-01-01T12:00:00.000Z", None), ("b", "2027-01-01T12:00:00.000Z", None),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "nonsense:/file", "jsonl:"])
def test_a_sink_that_is_none_is_said(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYSLOG_SINK", text)
    with pytest.raises(ValueError, match="SYSLOG_SINK: "):
        Logs()
