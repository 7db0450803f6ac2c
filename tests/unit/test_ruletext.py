"""Bindings as people write them: what is understood, what is refused in which words, and that printing undoes it."""

from __future__ import annotations

import json
import socket
import tempfile
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrecv import ruletext
from fastrecv.rules import Binding, RuleSetError

FOUR, SIX = ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")
ENTRY = {"label": "web", "protocol": "tcp", "prefix": "192.0.2.0/24", "port": 80}


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("192.0.2.0/24", "192.0.2.0/24"),
        ("192.0.2.1", "192.0.2.1/32"),
        ("192.0.2.0/255.255.255.0", "192.0.2.0/24"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("2001:DB8::1", "2001:db8::1/128"),
        ("::/0", "::/0"),
        ("::fffe:0:0/95", "::fffe:0:0/95"),  # the longest that is not all IPv4-mapped
    ],
)
def test_a_prefix_or_one_address_is_understood(word: str, meant: str) -> None:
    assert str(ruletext.prefix(word)) == meant


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("192.0.2.1/24", "'192.0.2.1/24' has bits below its prefix: 192.0.2.0/24 is the prefix"),
        ("2001:db8::1/32", "'2001:db8::1/32' has bits below its prefix: 2001:db8::/32 is the prefix"),
        ("::ffff:192.0.2.0/120", "packets come with IPv4 addresses, give 192.0.2.0/24"),
        ("::ffff:192.0.2.1", "packets come with IPv4 addresses, give 192.0.2.1/32"),
        ("::ffff:0:0/96", "packets come with IPv4 addresses, give 0.0.0.0/0"),
        ("fe80::1%eth0", "'fe80::1%eth0' has a zone: leave %... out, and give the interface by itself"),
        ("fe80::%eth0/64", "has a zone"),
        ("192.0.2.0/33", "'192.0.2.0/33' is no prefix: give one like 192.0.2.0/24 or 2001:db8::/32"),
        ("0.0.0.0", "'0.0.0.0' is one address that no packet is for: give 0.0.0.0/0 for every"),  # noqa: S104
        ("::", "'::' is one address that no packet is for: give ::/0 for every address"),
        ("192.0.2", "is no prefix"),
        ("web.example", "is no prefix"),
        ("", "'' is no prefix"),
    ],
)
def test_a_word_that_is_no_prefix_is_refused_with_what_would_be_one(word: str, said: str) -> None:
    with pytest.raises(RuleSetError) as caught:
        ruletext.prefix(word)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("word", "meant", "printed"),
    [
        (80, (80, 80), "80"),
        ("80", (80, 80), "80"),
        ("8000-8999", (8000, 8999), "8000-8999"),
        ("80-80", (80, 80), "80"),
        ("1-65535", (1, 65535), "1-65535"),
        ("0-65535", (0, 65535), "any"),
        ("any", (0, 65535), "any"),
    ],
)
def test_ports_are_a_number_a_range_or_any(word: str | int, meant: tuple[int, int], printed: str) -> None:
    assert ruletext.ports(word) == meant
    assert ruletext.ports_text(meant) == printed


@pytest.mark.parametrize(
    "word", [0, -1, 65536, "0", "0-0", "-80", "80-", "80-70", "1-65536", "+8", "http", "", "9" * 5000]
)
def test_a_word_that_is_no_port_is_refused_with_what_would_be_one(word: str | int) -> None:
    with pytest.raises(RuleSetError) as caught:
        ruletext.ports(word)
    assert str(caught.value) == f"{word!r} is no port: give one from 1 to 65535, a range like 8000-8999, or any"


def test_an_interface_is_its_name_or_its_index() -> None:
    loopback = socket.if_nametoindex("lo")
    assert [ruletext.interface_index(word) for word in ("lo", loopback, str(loopback))] == [loopback] * 3
    assert ruletext.interface_name(loopback) == "lo"
    assert ruletext.interface_name(1 << 30) == str(1 << 30), "one that has gone is called by its index"


@pytest.mark.parametrize("word", ["nope", "", 0, -1, 1 << 30, "1073741824", 1 << 31, "9" * 5000, "l\0o", "x" * 99])
def test_an_interface_that_is_not_there_is_refused_by_name(word: str | int) -> None:
    with pytest.raises(RuleSetError) as caught:
        ruletext.interface_index(word)
    assert str(caught.value) == f"there is no interface {word!r}: give its name or index"


def test_the_label_drop_is_the_verdict() -> None:
    bound = ruletext.binding("drop", "udp", FOUR, (0, 65535), None, None, "drop")
    assert bound == Binding("udp", FOUR, (0, 65535), None)
    assert ruletext.text(bound) == "drop udp 192.0.2.0/24 any"


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        (Binding("tcp", FOUR, (80, 80), "web"), "web tcp 192.0.2.0/24 80"),
        (Binding("any", SIX, (1, 9), "web", on_miss="pass"), "web any 2001:db8::/32 1-9 --on-miss pass"),
        (
            Binding("udp", FOUR, (53, 53), "dns", ip_network("203.0.113.0/24"), socket.if_nametoindex("lo")),
            "dns udp 192.0.2.0/24 53 --source 203.0.113.0/24 --interface lo",
        ),
    ],
)
def test_a_binding_is_printed_in_the_words_that_bind_takes(bound: Binding, words: str) -> None:
    assert ruletext.text(bound) == words


def written(tmp_path: Path, content: str | bytes, name: str = "bindings.json") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


TOML = """
[[bindings]]
label = "web"
protocol = "tcp"
prefix = "192.0.2.0/24"
port = 80

[[bindings]]
label = "drop"
protocol = "any"
prefix = "2001:db8::/32"
port = "8000-8999"
source = "2001:db8:1::/48"
interface = "lo"
on_miss = "pass"
"""


def test_json_and_toml_say_the_same(tmp_path: Path) -> None:
    loopback = socket.if_nametoindex("lo")
    expected = [
        Binding("tcp", FOUR, (80, 80), "web"),
        Binding("any", SIX, (8000, 8999), None, ip_network("2001:db8:1::/48"), loopback, "pass"),
    ]
    assert ruletext.read_file(written(tmp_path, TOML, "bindings.toml")) == expected
    dropped = {
        "label": "drop", "protocol": "any", "prefix": "2001:db8::/32", "port": "8000-8999",
        "source": "2001:db8:1::/48", "interface": loopback, "on_miss": "pass",
    }  # fmt: skip
    content = {"bindings": [ENTRY | {"source": None, "interface": None, "on_miss": "drop"}, dropped]}
    assert ruletext.read_file(written(tmp_path, json.dumps(content))) == expected


@pytest.mark.parametrize(("name", "content"), [("b.json", '{"bindings": []}'), ("b.toml", "bindings = []")])
def test_an_empty_list_is_no_mistake(tmp_path: Path, name: str, content: str) -> None:
    assert ruletext.read_file(written(tmp_path, content, name)) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"colour": "red"}, "Object contains unknown field `colour` - at `$.bindings[1]`"),
        ({"port": 80.5}, "at `$.bindings[1].port`"),
        ({"port": True}, "at `$.bindings[1].port`"),
        ({"label": None}, "Expected `str`, got `null` - at `$.bindings[1].label`"),
        ({"protocol": "icmp"}, "bindings[1]: 'icmp' is no protocol: give tcp, udp or any"),
        ({"on_miss": "reject"}, "Invalid enum value 'reject' - at `$.bindings[1].on_miss`"),
        ({"port": 0}, "bindings[1]: 0 is no port"),
        ({"prefix": "192.0.2.1/24"}, "bindings[1]: '192.0.2.1/24' has bits below its prefix: 192.0.2.0/24 is"),
        ({"source": "nonsense"}, "bindings[1]: 'nonsense' is no prefix"),
        ({"source": "2001:db8::/32"}, "bindings[1]: source 2001:db8::/32 and prefix 192.0.2.0/24 are of different IP"),
        ({"interface": "nope"}, "bindings[1]: there is no interface 'nope'"),
        ({"label": "two words"}, "bindings[1]: label 'two words': give 1 to 255 bytes, printable and without spaces"),
        ({"label": ""}, "bindings[1]: label ''"),
        ({"label": "DROP"}, "bindings[1]: 'drop' is a verdict, not a label"),
        ({"interface": 1 << 30}, "bindings[1]: there is no interface 1073741824: give its name or index"),
        ({"prefix": "::"}, "bindings[1]: '::' is one address that no packet is for: give ::/0"),
        ({"label": "ä" * 128}, "bindings[1]: label"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named_by_file_and_number(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    path = written(tmp_path, json.dumps({"bindings": [ENTRY, ENTRY | wrong]}))
    with pytest.raises(RuleSetError) as caught:
        ruletext.read_file(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("b.json", "{", "Input data was truncated"),
        ("b.json", "[]", "Expected `object`, got `array`"),
        ("b.json", "{}", "Object missing required field `bindings`"),
        ("b.json", '{"bindings": [{"label": "web"}]}', "missing required field `protocol` - at `$.bindings[0]`"),
        ("b.json", '{"bindings": [], "version": 2}', "unknown field `version`"),
        ("b.json", b'{"bindings": [{"label": "\xff"}]}', "b.json: "),
        ("b.conf", TOML, "got `array` (read as JSON; the name of a TOML file ends in .toml)"),
        ("b.toml", "bindings = [", "b.toml: "),
        ("b.toml", b"\xff", "b.toml: 'utf-8' codec can't decode byte 0xff"),
        ("b.toml", "[bindings]", "Expected `array`, got `object` - at `$.bindings`"),
        ("b.toml", TOML.replace('"192.0.2.0/24"', "1979-05-27"), "at `$.bindings[0].prefix`"),
        ("b.toml", TOML.replace("port = 80", "port = 70000"), "b.toml, bindings[0]: 70000 is no port"),
    ],
)
def test_a_file_that_holds_no_bindings_is_refused_by_its_name(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    with pytest.raises(RuleSetError) as caught:
        ruletext.read_file(written(tmp_path, content, name))
    assert str(caught.value).startswith(str(tmp_path / name))
    assert said in str(caught.value)


def networks(version: int) -> st.SearchStrategy[IPv4Network | IPv6Network]:
    """All but the IPv4-mapped, which are not for bindings."""
    if version == 4:
        return st.builds(
            lambda address, length: IPv4Network((address, length), strict=False),
            st.integers(0, (1 << 32) - 1), st.integers(0, 32),
        )  # fmt: skip
    return st.builds(
        lambda address, length: IPv6Network((address, length), strict=False),
        st.integers(1 << 64, (1 << 128) - 1), st.integers(0, 128),
    )  # fmt: skip


PORTS = st.tuples(st.integers(0, 65535), st.integers(0, 65535)).map(lambda pair: (min(pair), max(pair)))
LABELS = st.one_of(st.none(), st.text(st.characters(blacklist_categories=["C", "Z"]), min_size=1, max_size=60))
BINDINGS = st.sampled_from([4, 6]).flatmap(
    lambda version: st.builds(
        Binding,
        protocol=st.sampled_from(["tcp", "udp", "any"]),
        prefix=networks(version),
        ports=PORTS.filter(lambda ports: ports != (0, 0)),
        label=LABELS.filter(lambda label: label is None or label.lower() != "drop"),
        source=st.none() | networks(version),
        interface=st.sampled_from([0, socket.if_nametoindex("lo")]),
        on_miss=st.sampled_from(["drop", "pass"]),
    )
)


@given(st.lists(BINDINGS, max_size=5))
def test_what_is_dumped_is_what_is_read(bindings: list[Binding]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), json.dumps(ruletext.dumped(bindings)))
        assert ruletext.read_file(path) == bindings


@given(BINDINGS)
def test_the_dump_has_every_field_whatever_the_binding(bound: Binding) -> None:
    entries = ruletext.dumped([bound])["bindings"]
    assert isinstance(entries, list)
    assert list(entries[0]) == ["label", "protocol", "prefix", "port", "source", "interface", "on_miss"]
