"""Messages of syslog as rows: RFC 5424, and RFC 3164, which says how they look at best."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from datetime import datetime

__all__ = ["Row", "parsed"]

Row = dict[str, object]
"""format ("rfc5424", "rfc3164", "unknown"), facility, severity, time, host, app, process, id, data, message.

What a message does not say is None. time is as RFC 3339 writes it; of RFC 3164 it has no zone, and the year in which it
is nearest. data : structured data, parameters by their names by its ids.
"""

FACILITIES = (
    "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp", "ntp",
    "audit", "alert", "clock", *(f"local{number}" for number in range(8)),
)  # fmt: skip
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
SEVERITIES = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")

_PRIORITY = re.compile(r"<(0|[1-9]\d{0,2})>", re.ASCII)
_NAME = r"[!-~]"  # PRINTUSASCII
_HEADER = re.compile(  # RFC 5424, 6
    rf"1 (-|\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{{1,6}})?(?:Z|[+-]\d\d:\d\d)) ({_NAME}{{1,255}}) ({_NAME}{{1,48}})"
    rf" ({_NAME}{{1,128}}) ({_NAME}{{1,32}}) ",
    re.ASCII,
)
_SD_NAME = r"[!#-<>-\\^-~]{1,32}"  # 6.3.2: no =, ], "
_PARAMETER = re.compile(rf' ({_SD_NAME})="((?:[^"\\\]]|\\.)*)"', re.DOTALL)
_ELEMENT = re.compile(rf"\[({_SD_NAME})((?:{_PARAMETER.pattern})*)\]", re.DOTALL)
_ESCAPED = re.compile(r'\\(["\\\]])')
_OLD = re.compile(  # RFC 3164, 4.1; many write the time of RFC 3339 into it
    rf"(?:({'|'.join(MONTHS)}) ([ \d]\d) (\d\d):(\d\d):(\d\d)|(\d{{4}}-\d\d-\d\dT\S{{8,24}}))"
    r" (\S{1,255}) ?(.*)",
    re.ASCII | re.DOTALL,
)
_TAG = re.compile(r"([!-9;-Z\\^-~]{1,48})(?:\[([!-Z\\^-~]{1,128})\])?: ?(.*)", re.ASCII | re.DOTALL)
_BOM = "\ufeff"


def parsed(datagram: bytes, now: datetime) -> Row:
    """The row of a message. now : for messages without a year; those that follow no rule are "unknown", not lost."""
    text = datagram.decode(errors="replace").rstrip("\r\n\0")
    match = _PRIORITY.match(text)
    if match is None or int(match[1]) > 191:
        return _row("unknown", None, message=text)
    priority, rest = int(match[1]), text[match.end() :]
    return _rfc5424(priority, rest) or _rfc3164(priority, rest, now) or _row("unknown", priority, message=rest)


def _row(form: str, priority: int | None, **found: object) -> Row:
    facility, severity = (None, None) if priority is None else (FACILITIES[priority >> 3], SEVERITIES[priority & 7])
    empty: Row = dict.fromkeys(("time", "host", "app", "process", "id", "data", "message"))
    return {"format": form, "facility": facility, "severity": severity} | empty | found


def _rfc5424(priority: int, text: str) -> Row | None:
    header = _HEADER.match(text)
    if header is None:
        return None
    time, host, app, process, name = (None if word == "-" else word for word in header.groups())
    read = _structured(text, header.end())
    if read is None or not _is_time(time):
        return None
    data, end = read
    if text[end : end + 1] not in ("", " "):
        return None
    message = text[end + 1 :].removeprefix(_BOM) or None
    return _row(
        "rfc5424", priority, time=time, host=host, app=app, process=process, id=name, data=data, message=message
    )


def _structured(text: str, start: int) -> tuple[Mapping[str, Mapping[str, str]] | None, int] | None:
    """The structured data from there on, and where it ends. Of a parameter that comes twice the last counts."""
    if text[start : start + 1] == "-":
        return None, start + 1
    found: dict[str, dict[str, str]] = {}
    while element := _ELEMENT.match(text, start):
        found[element[1]] = {name: _ESCAPED.sub(r"\1", value) for name, value in _PARAMETER.findall(element[2])}
        start = element.end()
    return (found, start) if found else None


def _is_time(text: str | None) -> bool:
    try:
        return text is None or datetime.fromisoformat(text) is not None
    except ValueError:
        return False


def _rfc3164(priority: int, text: str, now: datetime) -> Row | None:
    match = _OLD.fullmatch(text)
    if match is None:
        return None
    *moment, modern, host, rest = match.groups()
    time = _nearest(moment, now) if modern is None else modern
    if time is None or not _is_time(modern):
        return None
    if host.endswith(":"):  # a local message, which names no host
        host, rest = None, f"{host} {rest}"
    tag = _TAG.fullmatch(rest)
    app, process, message = tag.groups() if tag else (None, None, rest)
    return _row("rfc3164", priority, time=time, host=host, app=app, process=process, message=message or None)


def _nearest(moment: list[str], now: datetime) -> str | None:
    """Month, day and so on, in the year in which that is nearest; None where there is no such day.

    As RFC 3339 writes it, but for the zone, which is not told.
    """
    month, (day, hour, minute, second) = MONTHS.index(moment[0]) + 1, map(int, moment[1:])
    found = []
    for year in (now.year - 1, now.year, now.year + 1):
        with contextlib.suppress(ValueError):
            found.append(datetime(year, month, day, hour, minute, second))
    here = now.replace(tzinfo=None)
    return min(found, key=lambda one: abs(one - here)).isoformat() if found else None
