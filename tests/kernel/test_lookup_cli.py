"""`fastrecv lookup`: loading and binding, where it is done, and what is said to whom it is refused."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from fastrecv import bpf, lookup_life, pins
from fastrecv.lookup import Dispatcher, directory_of
from fastrecv.netns import Namespace
from tests.kernel.commands import MANY, WEB, Command, one_line, rows
from tests.kernel.privileges import only
from tests.kernel.steering import Stage


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are not waited for."""
    defaults = Dispatcher.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "timeout", 0)


# Load, unload, upgrade


def test_load_and_unload_say_what_they_did_and_refuse_to_do_it_twice(lookup: Command) -> None:
    assert lookup.done("load") == "loaded\n"
    assert lookup.refused("load") == "a dispatcher is loaded in this network namespace already"
    assert lookup.done("unload") == "unloaded\n"
    assert lookup.refused("unload") == "no dispatcher is loaded in this network namespace"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("status", ()),
        ("bindings", ()),
        ("bindings", ("--json",)),
        ("bind", WEB),
        ("unbind", WEB),
        ("explain", ("tcp", "203.0.113.1", "198.51.100.1:80")),
        ("unregister", ("web",)),
        ("upgrade", ()),
    ],
)
def test_where_nothing_is_loaded_everything_says_how_to_load(
    lookup: Command, name: str, arguments: tuple[str, ...]
) -> None:
    assert (
        lookup.refused(name, *arguments) == "no dispatcher is loaded in this network namespace: `fastrecv lookup load`"
    )


def test_upgrade_says_from_what_to_what(lookup: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as then:
        then.setattr(bpf, "digest", lambda _: "another")
        lookup.done("load")
        lookup.done("bind", *WEB)
    before = lookup("bindings", "--json").json
    assert "has another: `fastrecv lookup upgrade` replaces it" in lookup.refused("unbind", *WEB)
    said = lookup.done("upgrade")
    assert re.fullmatch(r"upgraded from \w{16} \(fastrecv \S+\) to \w{16} \(fastrecv \S+\)\n", said)
    assert re.fullmatch(
        r"loaded anew: it was this version's already \(\w{16}, fastrecv \S+\)\n", lookup.done("upgrade")
    )
    assert lookup("bindings", "--json").json == before


def test_load_lets_a_group_read_and_knows_no_other_than_there_are(lookup: Command, stage: Stage) -> None:
    for unknown in ("no-such-group", "4294967295", "9" * 5000):
        assert lookup.misused("load", "--group", unknown).endswith(f"there is no group '{unknown}'")
    lookup.done("load", "--group", "4242")
    directory = directory_of(lookup.bpffs / "fastrecv", stage.namespace.cookie)
    assert directory.stat().st_gid == 4242


def test_load_removes_what_ended_namespaces_have_left_and_status_tells_of_it(lookup: Command) -> None:
    with contextlib.closing(Namespace()) as ended:
        lookup.done("load", "--netns", f"/proc/self/fd/{ended.fd}")
        (remnant,) = (lookup.bpffs / "fastrecv").glob("lookup-*")
    deadline = time.monotonic() + 30
    while not lookup_life.remnants(lookup.bpffs):  # the kernel ends a namespace in its own time, and tells nobody
        assert time.monotonic() < deadline
    said = lookup("status")
    assert said.code == 1
    assert said.err.splitlines() == [
        f"{remnant} is of no use: its namespace has ended, or its load was killed; `load` removes it",
        "fastrecv: no dispatcher is loaded in this network namespace: `fastrecv lookup load`",
    ]
    assert lookup.done("load") == f"removed {remnant}: its namespace has ended, or its load was killed\nloaded\n"
    assert lookup("status", "--json").json["remnants"] == []


# Bindings


def test_bind_and_unbind_say_what_they_did(loaded: Command) -> None:
    assert loaded.done("bind", *WEB) == "bound web tcp 198.51.100.0/24 80\n"
    assert loaded.done("bind", *WEB) == "was bound already: web tcp 198.51.100.0/24 80\n"
    words = ("drop", "any", "2001:db8::/32", "8000-8999", "--source", "2001:db8:1::/48", "--interface", "lo")
    assert loaded.done("bind", *words) == f"bound {' '.join(words)}\n"
    assert loaded.done("unbind", *words) == f"unbound {' '.join(words)}\n"
    assert loaded.done("unbind", *WEB) == "unbound web tcp 198.51.100.0/24 80\n"
    assert loaded("bindings", "--json").json == {"bindings": []}


def test_a_binding_of_the_same_key_with_another_label_takes_the_place(loaded: Command) -> None:
    loaded.done("bind", *WEB)
    said = loaded.done("bind", "other", *WEB[1:], "--on-miss", "pass")
    assert said.splitlines() == [
        "unbound web tcp 198.51.100.0/24 80",
        "bound other tcp 198.51.100.0/24 80 --on-miss pass",
    ]
    assert rows(loaded.done("bindings")) == [["other", "tcp", "198.51.100.0/24", "80", "any", "any", "pass"]]


def test_unbind_refuses_what_is_not_there_or_leads_to_another_label(loaded: Command) -> None:
    loaded.done("bind", *WEB)
    assert loaded.refused("unbind", "web", "tcp", "198.51.100.0/24", "81").startswith(
        "not bound: web tcp 198.51.100.0/24 81"
    )
    assert loaded.refused("unbind", "other", *WEB[1:]).endswith("; that is bound to web")
    assert loaded.done("unbind", *WEB)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("web", "icmp", "198.51.100.0/24", "80"), "'icmp' is not one of 'tcp', 'udp', 'any'"),
        (("web", "tcp", "198.51.100.1/24", "80"), "has bits below its prefix: 198.51.100.0/24 is the prefix"),
        (("web", "tcp", "::ffff:198.51.100.1", "80"), "packets come with IPv4 addresses, give 198.51.100.1/32"),
        (("web", "tcp", "fe80::1%lo", "80"), "has a zone: leave %... out"),
        (("web", "tcp", "198.51.100.0/24", "0"), "'0' is no port: give one from 1 to 65535"),
        (("two words", "tcp", "198.51.100.0/24", "80"), "give 1 to 255 bytes, printable and without spaces"),
        (("\udcff", "tcp", "198.51.100.0/24", "80"), "Invalid value for 'LABEL'"),
        (("web", "tcp", "198.51.100.0/24"), "Missing argument 'PORT'."),
        ((*WEB, "--source", "nonsense"), "'nonsense' is no prefix"),
        (("web", "tcp", "::", "80"), "no packet is for: give ::/0 for every address"),
        (("DROP", "tcp", "198.51.100.0/24", "80"), "'drop' is a verdict, not a label: choose another name"),
        (("drop", *WEB[1:], "--on-miss", "pass"), "what is dropped has no misses: leave --on-miss out"),
        ((*WEB, "--netns", "/nonexistent"), "'/nonexistent': No such file or directory"),
        ((*WEB, "--netns", "/etc/passwd"), "'/etc/passwd' is no network namespace: /run/netns/NAME is one"),
        ((*WEB, "--netns", "/proc/self/ns/mnt"), "is no network namespace"),
        ((*WEB, "--netns", "/"), "'/' is no network namespace"),
    ],
)
def test_wrong_words_are_usage_errors_that_say_what_would_be_right(
    loaded: Command, arguments: tuple[str, ...], said: str
) -> None:
    assert said in loaded.misused("bind", *arguments)
    assert loaded("bindings", "--json").json == {"bindings": []}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--interface", "nope"), "there is no interface 'nope': give its name or index"),
        (("--interface", "9999"), "there is no interface '9999': give its name or index"),
        (("--source", "2001:db8::/32"), "source 2001:db8::/32 and prefix 198.51.100.0/24 are of different IP versions"),
    ],
)
def test_words_that_do_not_go_together_are_refused(loaded: Command, arguments: tuple[str, ...], said: str) -> None:
    assert loaded.refused("bind", *WEB, *arguments) == said


@pytest.mark.parametrize("name", ["bind", "load-bindings", "explain"])
def test_the_examples_in_the_help_stand_on_lines_of_their_own(lookup: Command, name: str) -> None:
    said = lookup.bare("lookup", name, "--help")
    assert said.code == 0
    assert "\\b" not in said.out
    expected = '  label = "web"        # "drop" drops' if name == "load-bindings" else f"  fastrecv lookup {name} "
    assert any(line.startswith(expected) for line in said.out.splitlines())


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ((), [2, 1, 0, 3]),
        (("--label", "web"), [1, 0]),
        (("--label", "drop"), [3]),
        (("--label", "nobody"), []),
        (("--protocol", "tcp"), [1, 0, 3]),
        (("--protocol", "udp"), [2, 1, 3]),
        (("--prefix", "198.51.100.0/25"), [2, 0]),
        (("--prefix", "0.0.0.0/0"), [2, 1, 0]),
        (("--prefix", "2001:db8:7::1"), [3]),
        (("--port", "8999"), [1, 3]),
        (("--port", "50-80"), [2, 0, 3]),
        (("--label", "web", "--port", "80", "--protocol", "tcp"), [0]),
    ],
)
def test_bindings_are_filtered_and_stand_in_order_of_precedence(
    loaded: Command, filters: tuple[str, ...], found: list[int]
) -> None:
    for words in MANY:
        loaded.done("bind", *words)
    expected = [[*MANY[number], "any", "any", "drop"] for number in found]
    expected = [[word.removesuffix("/32") + "/32" if "/32" in word else word for word in row] for row in expected]
    assert rows(loaded.done("bindings", *filters)) == expected
    entries = loaded("bindings", "--json", *filters).json["bindings"]
    assert [(entry["label"], entry["protocol"], entry["prefix"]) for entry in entries] == [
        MANY[number][:3] for number in found
    ]


def test_bindings_as_json_fed_back_change_nothing(loaded: Command, tmp_path: Path) -> None:
    for words in MANY:
        loaded.done("bind", *words)
    loaded.done("bind", "web", "udp", "198.51.100.9", "1-9", "--source", "203.0.113.0/24", "--interface", "lo")
    dumped = loaded("bindings", "--json")
    assert dumped.json["bindings"][1] == {
        "label": "web", "protocol": "udp", "prefix": "198.51.100.9/32", "port": "1-9", "source": "203.0.113.0/24",
        "interface": "lo", "on_miss": "drop",
    }  # fmt: skip
    (tmp_path / "kept.json").write_text(dumped.out)
    program = loaded("status", "--json").json["program"]
    assert loaded.done("load-bindings", tmp_path / "kept.json") == "0 added, 0 removed, 5 in the file\n"
    assert loaded("bindings", "--json") == dumped
    assert loaded("status", "--json").json["program"] == program


def test_a_dry_run_says_what_would_be_done_and_does_nothing(loaded: Command, tmp_path: Path) -> None:
    loaded.done("bind", *WEB)
    loaded.done("bind", "gone", "udp", "198.51.100.0/24", "53")
    before = loaded("bindings", "--json"), loaded("status", "--json")
    entries = "".join(
        f'[[bindings]]\nlabel = "web"\nprotocol = "tcp"\nprefix = "198.51.100.0/24"\nport = {port}\n'
        for port in range(80, 102)
    )
    (tmp_path / "new.toml").write_text(entries)
    said = loaded.done("load-bindings", tmp_path / "new.toml", "--dry-run").splitlines()
    assert said[:2] == ["- gone udp 198.51.100.0/24 53", "+ web tcp 198.51.100.0/24 81"]
    assert said[-2:] == ["+ and 1 more", "21 would be added, 1 would be removed, 22 in the file"]
    assert (loaded("bindings", "--json"), loaded("status", "--json")) == before
    done = loaded.done("load-bindings", tmp_path / "new.toml").splitlines()
    assert done == [*said[:-1], "21 added, 1 removed, 22 in the file"]
    assert len(loaded("bindings", "--json").json["bindings"]) == 22


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{"port": 80}, {"port": "http"}], "file.json, bindings[1]: 'http' is no port"),
        (
            [{"port": 80}, {"port": 80, "label": "other"}],
            "tcp 198.51.100.0/24 port 80 is bound twice, to web and to other",
        ),
        ([{"port": "80-81"}] * 2, "tcp 198.51.100.0/24 ports 80-81 is bound twice, to web and to web"),
        ([{"port": 80}, {"port": 81, "colour": "red"}], "unknown field `colour` - at `$.bindings[1]`"),
    ],
)
def test_a_file_with_one_wrong_entry_changes_nothing(
    loaded: Command, tmp_path: Path, dry: tuple[str, ...], entries: list[dict[str, object]], said: str
) -> None:
    loaded.done("bind", "kept", *WEB[1:])
    before = loaded("bindings", "--json")
    whole = {"label": "web", "protocol": "tcp", "prefix": "198.51.100.0/24"}
    (tmp_path / "file.json").write_text(json.dumps({"bindings": [whole | entry for entry in entries]}))
    assert said in loaded.refused("load-bindings", tmp_path / "file.json", *dry)
    assert loaded("bindings", "--json") == before


# Where: --netns, --bpffs, locks, privileges


def test_another_namespace_is_named_by_a_path_and_interfaces_have_their_names_there(
    lookup: Command, stage: Stage, tmp_path: Path
) -> None:
    with contextlib.closing(Namespace()) as other:
        for namespace, name in ((stage.namespace, "here"), (other, "there")):
            with namespace, IPRoute() as net:
                net.link("add", ifname=name, kind="veth", index=77, peer={"ifname": "peer"})
        there = ("--netns", f"/proc/{os.getpid()}/fd/{other.fd}")
        lookup.done("load", *there)
        words = " ".join([*WEB, "--interface", "there"])
        assert lookup.refused("bind", *WEB, *there, "--interface", "here").startswith("there is no interface 'here'")
        assert lookup.done("bind", *WEB, *there, "--interface", "there") == f"bound {words}\n"
        entries = lookup("bindings", "--json", *there).json["bindings"]
        assert [entry["interface"] for entry in entries] == ["there"]
        (tmp_path / "none.json").write_text('{"bindings": []}')
        assert lookup.done("load-bindings", tmp_path / "none.json", "--dry-run", *there).startswith(f"- {words}\n")
        found = lookup("explain", "tcp", "203.0.113.1", "198.51.100.1:80", "--interface", "there", "--json", *there)
        assert found.json["binding"] == words
        assert lookup.done("unbind", *WEB, "--interface", "there", *there) == f"unbound {words}\n"
        assert lookup("status", "--json", *there).json["netns_cookie"] == other.cookie
        assert lookup.refused("status").startswith("no dispatcher is loaded in this network namespace")
        assert lookup.done("unload", *there) == "unloaded\n"


def test_a_place_that_is_no_bpf_file_system_is_refused_with_the_command_that_makes_it_one(
    lookup: Command, tmp_path: Path
) -> None:
    said = lookup.bare("lookup", "status", "--bpffs", tmp_path)
    assert (said.code, said.out) == (1, "")
    cure = f"mount -t bpf bpf {tmp_path}, or say with --bpffs where one is"
    assert one_line(said.err) == f"{tmp_path} is no BPF file system: {cure}"
    said = lookup.bare("lookup", "load", "--bpffs", "/nonexistent")
    assert one_line(said.err) == "/nonexistent does not exist: give the mount point of a BPF file system with --bpffs"


@pytest.mark.usefixtures("impatient")
def test_who_holds_the_lock_is_named(loaded: Command, stage: Stage) -> None:
    directory = directory_of(loaded.bpffs / "fastrecv", stage.namespace.cookie)
    me = f"{directory} is locked by process {os.getpid()} ({Path('/proc/self/comm').read_text().strip()}): "
    with pins.locked(directory, exclusive=False):
        assert loaded.refused("bind", *WEB) == f"{me}wait for it to end, or end it"
        assert loaded("status").code == 0, "readers do not keep each other out"
    with pins.locked(directory, exclusive=True):
        assert loaded.refused("status") == f"{me}wait for it to end, or end it"
        assert "fastrecv_lookup_up 0.0" in loaded.done("metrics")
    assert loaded.done("bind", *WEB)


@pytest.mark.parametrize("arguments", [("load",), ("bind", *WEB)])
def test_a_missing_privilege_has_an_exit_code_of_its_own(loaded: Command, arguments: tuple[str, ...]) -> None:
    if arguments == ("load",):
        loaded.done("unload")
    with only():
        said = loaded(*arguments)
    assert (said.code, said.out) == (77, "")
    assert one_line(said.err)


def test_what_may_not_be_read_is_named_with_who_may(loaded: Command, stage: Stage) -> None:
    directory = directory_of(loaded.bpffs / "fastrecv", stage.namespace.cookie)
    directory.chmod(0)
    with only():
        said = loaded("status")
    assert (said.code, said.out) == (77, "")
    denied = "permission denied (run as root; to read, as a member of the group that was given with --group)"
    assert one_line(said.err) == f"{directory}: {denied}"
