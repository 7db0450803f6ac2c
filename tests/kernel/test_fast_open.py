"""TCP Fast Open (RFC 7413): listeners chosen by what a SYN carries, by an ordinary user's classic filter."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fastrecv.classic import Filter
from fastrecv.policies import Policy, Sender
from tests.kernel.balancing import families, senders
from tests.kernel.groups import served_by_nobody, taken
from tests.kernel.steering import TCP, Stage

SYSCTL = Path("/proc/sys/net/ipv4/tcp_fastopen")
EXAMPLE = Path(__file__).parents[2] / "examples" / "fast_open.py"
# Documentation/networking/ip-sysctl.rst: clients and servers may; 4 and 512: without a cookie.
WITH_COOKIES, WITHOUT_COOKIES = 3, 3 | 4 | 512


def group(stage: Stage, family: str, policy: Policy) -> Filter:
    made = served_by_nobody(stage, TCP, family, policy, 5)
    for server in stage.servers.values():
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
    return made


def opened(stage: Stage, sender: Sender) -> int:
    """The member that gets a connection whose SYN carries the sender's payload where it may."""
    with stage.bind(TCP, str(sender.source), sender.source_port) as client:
        ends = (str(sender.destination), sender.destination_port)
        client.settimeout(None)  # one that does not block has nothing to say before it has a cookie: EINPROGRESS
        assert client.sendto(sender.payload, socket.MSG_FASTOPEN, ends) == len(sender.payload)
        return taken(stage, TCP)


def counted(name: str) -> int:
    """Of TcpExt, by /proc/net/netstat (Documentation/networking/snmp_counter.rst)."""
    names, values = (line.split() for line in Path("/proc/thread-self/net/netstat").read_text().splitlines()[:2])
    return int(values[names.index(name)])


Payload = Callable[[int], bytes]
payloads = pytest.mark.parametrize(
    ("text", "payload"),
    [
        ("payload[0:1]", lambda number: bytes([number])),
        ("payload[3:7]", lambda number: b"GET /" + number.to_bytes(5)),
        ("payload[0:20]", lambda number: number.to_bytes(20) if number % 2 else b"short"),
    ],
)


@families
@payloads
def test_listeners_are_chosen_by_the_payload_of_the_syn(stage: Stage, family: str, text: str, payload: Payload) -> None:
    SYSCTL.write_text(f"{WITHOUT_COOKIES}\n")
    made = group(stage, family, Policy.parse(text))
    asked = senders(family, 100, payload)
    found = [opened(stage, sender) for sender in asked]
    assert found == [made.index(sender) for sender in asked]
    assert set(found) == set(range(5))
    assert counted("TCPFastOpenPassive") == 100


@families
def test_the_syn_that_asks_for_a_cookie_carries_nothing_and_goes_by_its_source(stage: Stage, family: str) -> None:
    SYSCTL.write_text(f"{WITH_COOKIES}\n")
    made = group(stage, family, Policy("payload", length=1))
    asked = senders(family, 60, lambda number: bytes([number]))
    met: set[object] = set()
    for sender in asked:
        # The kernel keeps a cookie for both addresses (tcp_metrics); every listener of the namespace takes it.
        ends = sender.source, sender.destination
        assert opened(stage, sender) == made.index(sender if ends in met else replace(sender, payload=b""))
        met.add(ends)
        again = replace(sender, source_port=sender.source_port + 1000)
        assert opened(stage, again) == made.index(again)
    assert counted("TCPFastOpenCookieReqd") == len(met)
    assert counted("TCPFastOpenPassive") == 120 - len(met)


def example() -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=False, timeout=30)


@pytest.mark.usefixtures("stage")
def test_the_example_shows_that_a_word_finds_its_listener() -> None:
    SYSCTL.write_text("3\n")
    done = example()
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"(\w+) from port \d+ to listener (\d), as named: (\d)\n", done.stdout)
    assert len(shown) == 15
    listeners = defaultdict(set)
    for word, member, named in shown:
        assert member == named
        listeners[word].add(member)
    assert all(len(members) == 1 for members in listeners.values())


@pytest.mark.usefixtures("stage")
def test_the_example_says_in_a_line_what_is_missing() -> None:
    SYSCTL.write_text("1\n")
    refused = example()
    assert refused.returncode == 1
    assert refused.stderr == "net.ipv4.tcp_fastopen is 1: as root, sysctl -w net.ipv4.tcp_fastopen=3\n"
