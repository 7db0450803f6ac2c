"""`fastrecv lookup status`, `metrics` and `explain`: what is read, as text, as JSON and over HTTP."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from pyroute2 import IPRoute

from fastrecv import bpf
from fastrecv.netns import Namespace
from fastrecv.steerable import cookie_of
from tests.kernel.commands import WEB, Command, one_line
from tests.kernel.steering import TCP, UDP, Stage


def test_status_has_a_row_for_every_destination(loaded: Command, stage: Stage) -> None:
    (line,) = loaded.done("status").splitlines()
    assert re.fullmatch(
        rf"network namespace {stage.namespace.cookie}: program \d+ \(tag \w{{16}}, fastrecv \S+\), "
        r"loaded [-0-9]{10} [:0-9]{8}, 0 bindings",
        line,
    )
    loaded.done("bind", *WEB)
    loaded.done("bind", "drop", "udp", "2001:db8:7::/64", "any")
    service = stage.serve("service", TCP, "198.51.100.2", 8008)
    loaded.done("register", "web", "--fd", service.fileno())
    assert stage.ask(TCP, "198.51.100.1", 80) == "service"
    cookie = cookie_of(service)
    first, *table = loaded.done("status").splitlines()
    assert first.endswith(", 2 bindings")
    assert table[0].split() == ["label", "family", "protocol", "bindings", "sockets", "lookups", "misses", "errors"]
    assert [line.split() for line in table[1:]] == [
        ["web", "ipv4", "tcp", "1", f"sk:{cookie:x}", "1", "0", "0"],
        ["drop", "ipv6", "udp", "1", "-", "0", "0", "0"],
    ]
    assert len(loaded.done("status", "drop").splitlines()) == 3
    assert loaded.refused("status", "nobody") == "nothing is bound to 'nobody', and no socket registered"


def test_status_as_json_has_the_same_fields_always(loaded: Command, stage: Stage) -> None:
    loaded.done("bind", *WEB)
    service = stage.serve("service", UDP, "198.51.100.2", 8008)
    loaded.done("register", "web", "--fd", service.fileno())
    found = loaded("status", "--json", "web").json
    assert list(found) == ["netns_cookie", "program", "link", "loaded", "bindings", "destinations", "remnants"]
    assert found["link"] in bpf.link_ids()
    none = {"lookups": 0, "misses": 0, "errors": {"unfit": 0, "family": 0, "taken": 0, "other": 0}}
    assert found["destinations"] == [
        {"label": "web", "family": "ipv4", "protocol": "tcp", "bindings": 1, "sockets": []} | none,
        {"label": "web", "family": "ipv4", "protocol": "udp", "bindings": 0, "sockets": [cookie_of(service)]} | none,
    ]


def parsed(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(family: Metric) -> dict[tuple[str, ...], float]:
    return {tuple(sample.labels.values()): sample.value for sample in family.samples}


def test_metrics_are_what_prometheus_reads(loaded: Command, stage: Stage) -> None:
    loaded.done("bind", *WEB)
    loaded.done("bind", "drop", "udp", "198.51.100.0/24", "53")
    service = stage.serve("service", TCP, "198.51.100.2", 8008)
    loaded.done("register", "web", "--fd", service.fileno())
    assert stage.ask(TCP, "198.51.100.1", 80) == "service"
    found = parsed(loaded.done("metrics"))
    assert values(found["fastrecv_lookup_up"]) == {(): 1}
    assert values(found["fastrecv_lookup_bindings"]) == {(): 2}
    assert values(found["fastrecv_lookup_lookups"]) == {("ipv4", "web", "tcp"): 1, ("ipv4", "drop", "udp"): 0}
    assert values(found["fastrecv_lookup_misses"]) == {("ipv4", "web", "tcp"): 0}
    assert values(found["fastrecv_lookup_sockets"]) == {("ipv4", "web", "tcp"): 1}
    assert set(values(found["fastrecv_lookup_errors"])) == {
        ("ipv4", "web", "tcp", reason) for reason in ("unfit", "family", "taken", "other")
    }


def test_any_label_is_one_that_prometheus_reads(loaded: Command) -> None:
    label = 'we"b\\{ä}'
    loaded.done("bind", label, *WEB[1:])
    assert values(parsed(loaded.done("metrics"))["fastrecv_lookup_sockets"]) == {("ipv4", label, "tcp"): 0}


def test_metrics_of_nothing_loaded_say_that_it_is_down(lookup: Command) -> None:
    found = parsed(lookup.done("metrics"))
    assert set(found) == {"fastrecv_build_info", "fastrecv_lookup_up"}
    assert values(found["fastrecv_lookup_up"]) == {(): 0}


@contextlib.contextmanager
def serving(lookup: Command, *arguments: object, **options: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`metrics --listen` as a process, and the address that it says."""
    with lookup.process("metrics", "--listen", *arguments, **options) as server:
        try:
            assert server.stdout is not None
            match = re.fullmatch(r"serving (http://\S+/metrics)\n", server.stdout.readline())
            assert match is not None, server.communicate(timeout=30)
            yield server, match[1]
        finally:
            server.kill()


def scraped(url: str) -> dict[str, Metric]:
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - what the server said
        return parsed(answer.read().decode())


@pytest.mark.parametrize(("listen", "host"), [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "[::1]")])
def test_metrics_over_http_follow_what_is_loaded_and_end_when_told(lookup: Command, listen: str, host: str) -> None:
    with serving(lookup, listen) as (server, url):
        assert url.startswith(f"http://{host}:")
        assert values(scraped(url)["fastrecv_lookup_up"]) == {(): 0}
        lookup.done("load")
        assert values(scraped(url)["fastrecv_lookup_up"]) == {(): 1}
        lookup.done("bind", *WEB)
        assert values(scraped(url)["fastrecv_lookup_bindings"]) == {(): 1}
        capabilities = Path(f"/proc/{server.pid}/status").read_text()
        assert re.search(r"^CapEff:\t0+$", capabilities, re.MULTILINE)
        server.send_signal(signal.SIGTERM)
        assert server.communicate(timeout=30) == ("stopped\n", "")
    assert server.returncode == 0


def idle(stack: contextlib.ExitStack, url: str, number: int) -> None:
    """Peers that connect and say nothing, until the stack is closed."""
    place = urlsplit(url)
    assert place.hostname is not None
    assert place.port is not None
    for _ in range(number):
        stack.enter_context(socket.create_connection((place.hostname, place.port), 10))


def test_no_thread_that_serves_metrics_has_a_capability(lookup: Command) -> None:
    many = os.environ | {"OPENBLAS_NUM_THREADS": "4"}  # numpy's, which are started before anything is given up
    with serving(lookup, "127.0.0.1:0", env=many) as (server, url), contextlib.ExitStack() as stack:
        idle(stack, url, 3)
        tasks = Path(f"/proc/{server.pid}/task")
        while len(list(tasks.iterdir())) < 4:
            assert server.poll() is None
        for task in tasks.iterdir():
            status = dict(line.split(":\t") for line in (task / "status").read_text().splitlines())
            assert [int(status[f"Cap{name}"], 16) for name in ("Eff", "Prm", "Inh", "Amb")] == [0] * 4
            assert status["NoNewPrivs"] == "1"


def test_idle_peers_keep_a_scrape_waiting_no_longer_than_they_may_stay(lookup: Command) -> None:
    with serving(lookup, "127.0.0.1:0") as (server, url), contextlib.ExitStack() as stack:
        idle(stack, url, 40)
        begun = time.monotonic()
        assert values(scraped(url)["fastrecv_lookup_up"]) == {(): 0}
        assert time.monotonic() - begun < 8, "a peer has 5 s"
        server.send_signal(signal.SIGTERM)
        assert server.communicate(timeout=30) == ("stopped\n", "")


def test_metrics_of_another_namespace_are_served_here(lookup: Command) -> None:
    with contextlib.closing(Namespace()) as other:
        there = f"/proc/{os.getpid()}/fd/{other.fd}"
        lookup.done("load", "--netns", there)
        with serving(lookup, "127.0.0.1:0", "--netns", there) as (_, url):
            assert values(scraped(url)["fastrecv_lookup_up"]) == {(): 1}
        lookup.done("unload", "--netns", there)


def test_an_address_that_cannot_be_listened_on_is_named(lookup: Command, stage: Stage) -> None:
    stage.serve("taken", TCP, "127.0.0.1", 9009)
    with lookup.process("metrics", "--listen", "127.0.0.1:9009") as server:
        out, err = server.communicate(timeout=30)
    assert (server.returncode, out) == (1, "")
    assert one_line(err) == "cannot listen on 127.0.0.1 port 9009: Address already in use"
    assert "'localhost:80' is no IP address" in lookup.misused("metrics", "--listen", "localhost:80")


# Explain


@pytest.fixture
def explained(loaded: Command, stage: Stage) -> Command:
    for words in (
        ("web", "tcp", "198.51.100.0/24", "80"),
        ("drop", "tcp", "198.51.100.9", "80"),
        ("idle", "udp", "198.51.100.0/24", "53"),
        ("idle", "udp", "198.51.100.0/24", "54", "--on-miss", "pass"),
        ("near", "any", "198.51.100.0/24", "80-90", "--interface", "lo", "--on-miss", "pass"),
        ("some", "any", "198.51.100.9", "81", "--source", "203.0.113.0/25"),
        ("six", "any", "2001:db8:7::/64", "any"),
    ):
        loaded.done("bind", *words)
    loaded.done("register", "web", "--fd", stage.serve("service", TCP, "198.51.100.2", 8008).fileno())
    return loaded


def untouched(command: Command) -> tuple[object, ...]:
    """What a packet would change: the counters of the dispatcher and those of the namespace's interfaces."""
    destinations = command("status", "--json").json["destinations"]
    return command("metrics").out, destinations, Path("/proc/thread-self/net/dev").read_text()


@pytest.mark.parametrize(
    ("words", "verdict", "binding", "reason"),
    [
        (("tcp", "198.51.100.1:80"), "socket", "web tcp 198.51.100.0/24 80", "web has socket sk:{socket:x}"),
        (("tcp", "198.51.100.9:80"), "drop", "drop tcp 198.51.100.9/32 80", "the binding drops it"),
        (("udp", "198.51.100.1:53"), "drop", "idle udp 198.51.100.0/24 53", "idle has no socket: register one"),
        (
            ("udp", "198.51.100.1:54"), "pass", "idle udp 198.51.100.0/24 54 --on-miss pass",
            "idle has no socket, and its misses pass to the kernel's ordinary lookup",
        ),
        (("tcp", "198.51.100.1:9"), "pass", None, "no binding applies: the kernel's ordinary lookup decides"),
        (("tcp", "192.0.2.1:80"), "pass", None, "no binding applies: the kernel's ordinary lookup decides"),
        (("tcp", "198.51.100.1:85"), "pass", None, "no binding applies: the kernel's ordinary lookup decides"),
        (
            ("tcp", "198.51.100.1:85", "--interface", "lo"), "pass",
            "near any 198.51.100.0/24 80-90 --interface lo --on-miss pass",
            "near has no socket, and its misses pass to the kernel's ordinary lookup",
        ),
        (
            ("tcp", "198.51.100.9:81"), "drop", "some any 198.51.100.9/32 81 --source 203.0.113.0/25",
            "some has no socket: register one",
        ),
        (("udp", "[2001:db8:7::1]:9"), "drop", "six any 2001:db8:7::/64 any", "six has no socket: register one"),
    ],
)  # fmt: skip
def test_explain_says_what_becomes_of_a_packet_and_sends_and_counts_nothing(
    explained: Command, stage: Stage, words: tuple[str, ...], verdict: str, binding: str | None, reason: str
) -> None:
    source = "[2001:db8:9::1]:4242" if "[" in words[1] else "203.0.113.1"
    arguments = (words[0], source, *words[1:])
    before = untouched(explained)
    found = explained("explain", *arguments, "--json").json
    text = explained.done("explain", *arguments)
    assert untouched(explained) == before
    assert list(found) == ["verdict", "binding", "socket", "reason", "others"]
    cookie = cookie_of(stage.servers["service"]) if verdict == "socket" else None
    assert (found["verdict"], found["binding"], found["socket"]) == (verdict, binding, cookie)
    assert found["reason"] == reason.format(socket=cookie)
    first, _, *rest = text.splitlines()
    assert first == f"{verdict}: {found['reason']}"
    expected = [] if binding is None else [["by", binding]]
    expected += [["not by", other["binding"], other["reason"]] for other in found["others"]]
    assert [re.split("  +", line) for line in rest] == expected


def test_explain_says_what_the_traffic_then_meets(explained: Command, stage: Stage) -> None:
    assert explained("explain", "tcp", "198.51.100.77", "198.51.100.1:80", "--json").json["verdict"] == "socket"
    assert stage.ask(TCP, "198.51.100.1", 80) == "service"
    assert explained("explain", "tcp", "198.51.100.77", "198.51.100.9:80", "--json").json["verdict"] == "drop"
    assert stage.ask(TCP, "198.51.100.9", 80) == "refused"


@pytest.mark.parametrize(
    ("winner", "loser", "reason"),
    [
        (("tcp", "198.51.100.9/32", "any"), ("tcp", "198.51.100.0/24", "80"), "shorter prefix"),
        (("tcp", "198.51.100.9/32", "80"), ("tcp", "198.51.100.9/32", "80-81"), "wider range of ports"),
        (("tcp", "198.51.100.9/32", "80"), ("any", "198.51.100.9/32", "80"), "names no protocol"),
        (("tcp", "198.51.100.9/32", "79-80"), ("tcp", "198.51.100.9/32", "80-81"), "begins at a higher port"),
        (
            ("any", "198.51.100.9/32", "80", "--source", "203.0.113.0/24"),
            ("tcp", "198.51.100.9/32", "80", "--source", "203.0.0.0/16"),
            "shorter source prefix",
        ),
        (
            ("any", "198.51.100.9/32", "80", "--interface", "lo"),
            ("tcp", "198.51.100.9/32", "80"),
            "names no interface",
        ),
        (("tcp", "198.51.100.0/24", "80"), ("udp", "198.51.100.9/32", "80"), "another protocol"),
        (("tcp", "198.51.100.0/24", "80"), ("tcp", "198.51.100.9/32", "81"), "another port"),
        (
            ("tcp", "198.51.100.0/24", "80"),
            ("tcp", "198.51.100.9/32", "80", "--source", "192.0.2.0/24"),
            "another source",
        ),
        (
            ("tcp", "198.51.100.0/24", "80"),
            ("tcp", "198.51.100.9/32", "80", "--interface", "other"),
            "another interface",
        ),
    ],
)
def test_explain_says_of_every_other_binding_why_it_is_not_the_one(
    loaded: Command, winner: tuple[str, ...], loser: tuple[str, ...], reason: str
) -> None:
    with IPRoute() as net:
        net.link("add", ifname="other", kind="veth", peer={"ifname": "peer"})
    loaded.done("bind", "loser", *loser)
    loaded.done("bind", "winner", *winner)
    found = loaded("explain", "tcp", "203.0.113.1", "198.51.100.9:80", "--interface", "lo", "--json").json
    assert found["binding"] == " ".join(["winner", *winner])
    assert found["others"] == [{"binding": " ".join(["loser", *loser]), "reason": reason}]


def test_explain_without_an_interface_says_that_none_was_given(loaded: Command) -> None:
    loaded.done("bind", *WEB, "--interface", "lo")
    found = loaded("explain", "tcp", "203.0.113.1", "198.51.100.9:80", "--json").json
    assert (found["verdict"], found["others"][0]["reason"]) == ("pass", "an interface, and none was given")


def test_explain_tells_of_a_group_and_of_sockets_that_the_kernel_refuses(loaded: Command, stage: Stage) -> None:
    group = [stage.serve(name, UDP, "198.51.100.2", 8008, reuseport=True) for name in "ab"]
    loaded.done("bind", "web", "udp", "198.51.100.0/24", "80", "--on-miss", "pass")
    loaded.done("register", "web", "--fd", group[0].fileno(), "--fd", group[1].fileno())
    words = ("udp", "203.0.113.1", "198.51.100.9:80")
    first = loaded.done("explain", *words).splitlines()[0]
    assert first == (f"socket: web has socket sk:{cookie_of(group[0]):x}, the first of 2 that are registered")
    for member in group:
        member.connect(("198.51.100.3", 9))
    before = untouched(loaded)
    assert loaded.done("explain", *words).splitlines()[0] == (
        "drop: web is bound, but the kernel refuses its sockets: they are connected, or of another family"
    )
    assert untouched(loaded) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tcp", "203.0.113.1", "198.51.100.1"), "the destination has no port: give ADDRESS:PORT, or [ADDRESS]:PORT"),
        (("tcp", "203.0.113.1", "[2001:db8::1]:80"), "source and destination are of different IP versions"),
        (("tcp", "203.0.113.1", "2001:db8::1:80"), "the destination has no port"),
        (("tcp", "2001:db8::2", "2001:db8::1:80"), "the destination has no port"),
        (("tcp", "2001:db8::2", "[::ffff:192.0.2.1]:80"), "packets come with IPv4 addresses, give 192.0.2.1"),
        (("tcp", "::ffff:192.0.2.1", "198.51.100.1:80"), "packets come with IPv4 addresses, give 192.0.2.1"),
        (("tcp", "203.0.113.1", "198.51.100.1:65536"), "'198.51.100.1:65536' has no port from 1 to 65535"),
        (("tcp", "203.0.113.1", "web.example:80"), "'web.example:80' is no IP address"),
        (("icmp", "203.0.113.1", "198.51.100.1:80"), "'icmp' is not one of 'tcp', 'udp'"),
    ],
)
def test_explain_refuses_what_no_packet_has(loaded: Command, arguments: tuple[str, ...], said: str) -> None:
    assert said in loaded.misused("explain", *arguments)
