"""`fastrecv listen` and `fastrecv connect` show what a policy does: from chosen addresses, steered and balanced."""

from __future__ import annotations

import contextlib
import json
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from fastrecv.balance import Balancer
from fastrecv.balance_explain import explain
from fastrecv.cli.main import run
from fastrecv.listeners import of_process
from fastrecv.netns import Namespace
from fastrecv.policies import Policy, Sender
from fastrecv.steerable import cookie_of
from tests.kernel.commands import Command, one_line
from tests.kernel.steering import PORT, Stage
from tests.listeners import Listening, listening

protocols = pytest.mark.parametrize("protocol", ["tcp", "udp"])
NETS = {"ipv4": "198.51.100.{}", "ipv6": "[2001:db8:7::{}]"}
families = pytest.mark.parametrize("net", NETS.values(), ids=NETS)
NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
FAST_OPEN = Path("/proc/sys/net/ipv4/tcp_fastopen")


def connected(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert run(["connect", *map(str, words), "--json"]) == code
    said = capsys.readouterr()
    assert said.err == ""
    return sorted((json.loads(line) for line in said.out.splitlines()), key=lambda found: int(found["client"]))


def prefix(net: str) -> str:
    return "2001:db8:7::40/122" if ":" in net else "198.51.100.64/26"


def sender(client: dict[str, Any], payload: bytes) -> Sender:
    return Sender(
        ip_address(client["source"]["host"]), client["source"]["port"], ip_address(client["destination"]["host"]),
        client["destination"]["port"], payload,
    )  # fmt: skip


def balanced(balancer: Balancer, listener: Listening, protocol: str, address: IPv4Address | IPv6Address) -> None:
    """Attach to the listeners, every slot of theirs in the balancer's of the same number, as their cookies say."""
    slots = {found["cookie"]: found["slot"] for found in listener.slots}
    with of_process(listener.process.pid, NUMBERS[protocol], address, PORT) as members:
        assert {cookie_of(member) for member in members} == set(slots)
        balancer.attach(members[0])
        for member in members:
            balancer.register(slots[cookie_of(member)], member)
    balancer.weigh(dict.fromkeys(slots.values(), 1))


@families
@pytest.mark.parametrize(
    ("protocol", "key"),
    [("tcp", "source"), ("tcp", "source+port"), ("udp", "source"), ("udp", "source+port"), ("udp", "payload[1:2]")],
)
def test_the_table_is_the_policys(
    stage: Stage, protocol: str, net: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"{net.format(1)}:{PORT}"
    payloads = [bytes([7, number, 3 * number]) for number in range(50)]
    words = ["--clients", 50, "--source", prefix(net), "--source-port", 20_000]
    for payload in payloads:
        words += ["--payload", f"hex:{payload.hex()}"]
    with Balancer(Policy.parse(key, seed=3)) as balancer, listening(protocol, where, listeners=4) as listener:
        balanced(balancer, listener, protocol, ip_address(net.format(1).strip("[]")))
        clients = connected(capsys, protocol, where, *words)
        listener.end()
        expected = [explain(balancer, sender(client, payloads[client["client"]])).slot for client in clients]
    assert [client["server"]["slot"] for client in clients] == expected
    assert len(set(expected)) == 4
    assert len({client["source"]["host"] for client in clients}) == 50
    assert listener.served == [expected.count(slot) for slot in range(4)]


@protocols
@families
def test_answers_come_from_any_address_and_port_that_was_asked(
    stage: Stage, loaded: Command, protocol: str, net: str, capsys: pytest.CaptureFixture[str]
) -> None:
    home = net.format(1)
    with listening(protocol, f"{home}:{PORT}") as listener:
        pid = listener.process.pid
        loaded.done("register-pid", pid, "web", protocol, home.strip("[]"), PORT)
        loaded.done("bind", "web", protocol, "2001:db8:7::/64" if ":" in net else "198.51.100.0/24", "8000-8999")
        for port in (8000, 8999):
            (client,) = connected(capsys, protocol, f"{net.format(9)}:{port}", "--source", net.format(7).strip("[]"))
            assert client["server"]["pid"] == pid
            assert client["source"]["host"] == net.format(7).strip("[]")
        listener.end()
    events = listener.events("connection" if protocol == "tcp" else "datagram")
    host = net.format(9).strip("[]")
    assert [event["destination"] for event in events] == [{"host": host, "port": port} for port in (8000, 8999)]


def test_the_first_of_a_source_asks_for_the_cookie_and_the_next_has_it(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    FAST_OPEN.write_text("3")
    where = f"198.51.100.1:{PORT}"
    words = ["fast-open", where, "--source", "198.51.100.40/30", "--clients", 2]
    with listening("tcp", where, "--fast-open") as listener:
        first, second = connected(capsys, *words), connected(capsys, *words)
        listener.end()
    assert [client["in_syn"] for client in first + second] == [False, False, True, True]
    assert all(client["sent"] == 4 and client["server"] for client in first + second)
    said = {event["source"]["port"]: event["in_syn"] for event in listener.events("connection")}
    assert said == {client["source"]["port"]: client["in_syn"] for client in first + second}


def test_a_server_without_fast_open_is_asked_all_the_same(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"198.51.100.1:{PORT}"
    with listening("tcp", where, listeners=1) as listener:
        assert run(["connect", "fast-open", where]) == 0
        listener.end()
    said = capsys.readouterr()
    assert said.out.splitlines()[-2] == "1 of 1 answered"
    assert said.out.splitlines()[-1].startswith("not in the SYN: the host had no cookie for that source and server yet")
    assert [event["in_syn"] for event in listener.events("connection")] == [False]


@pytest.mark.parametrize(
    ("value", "words", "reason"),
    [
        ("2", f"connect fast-open 198.51.100.1:{PORT}", "net.ipv4.tcp_fastopen is 2, which allows no client: sysctl"),
        ("1", f"listen tcp 198.51.100.1:{PORT} --fast-open", "net.ipv4.tcp_fastopen is 1, which allows no server:"),
    ],
)
def test_fast_open_that_the_host_does_not_allow(
    stage: Stage, value: str, words: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    FAST_OPEN.write_text(value)
    assert run(words.split()) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert one_line(said.err).startswith(reason)
    assert "sysctl -w net.ipv4.tcp_fastopen=3" in said.err


@protocols
def test_a_namespace_is_entered_where_it_is_named(
    stage: Stage, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where, namespace = f"198.51.100.1:{PORT}", f"/proc/self/fd/{stage.namespace.fd}"
    words = ["connect", protocol, where, "--source", "198.51.100.7"]
    with listening(protocol, where) as listener:
        with contextlib.closing(Namespace()) as elsewhere, elsewhere:
            assert run(words) == 1
            assert "198.51.100.7 is not an address of this host" in one_line(capsys.readouterr().err)
            (client,) = connected(capsys, *words[1:], "--netns", namespace)
        listener.end()
    assert client["server"]["pid"] == listener.process.pid


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_link_local_address_has_its_interface(
    stage: Stage, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    with stage.namespace, IPRoute() as net:
        net.addr("add", index=1, address="fe80::7", prefixlen=64)
    where = "[fe80::7%lo]:7007"
    with listening(protocol, where, listeners=2):
        clients = connected(capsys, protocol, where, "--clients", 4)
    assert len(clients) == 4
    assert run(["connect", protocol, "[fe80::7%nowhere]:7007"]) == 1
    assert "fe80::7%nowhere: there is no interface 'nowhere'" in capsys.readouterr().err
