"""The QUIC example: connections outlive changes of their ports and of the server's processes, with real clients."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import load
import msgspec
import pytest
import web
from aioquic.asyncio.client import connect
from aioquic.h3.connection import H3_ALPN, ErrorCode
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, QuicEvent
from callers import Client
from load import Plain, Supervised, certified, tried
from relay import LENGTH, Handed, Relay, destination, owner

from tests.kernel.privileges import as_user
from tests.kernel.supervising import ADDRESS, PORT, Service, namespace
from tests.programs import program

EXAMPLE = Path(load.__file__).parent
ALONE = 0.8  # seconds, in place of web.ALONE
OPTIONS = argparse.Namespace(connections=12, workers=2, seconds=0.1, pause=0.05, patience=3.0, port=PORT)


@pytest.fixture(autouse=True)
def _loopback() -> Iterator[None]:
    with namespace():
        yield


def serving(folder: Path, handler: str = "web:Server", **environment: str) -> Service:
    certified(folder)
    told = {
        "PYTHONPATH": os.pathsep.join([str(EXAMPLE), str(folder)]),
        "QUIC_CERTIFICATE": str(folder / "certificate.pem"),
        "QUIC_KEY": str(folder / "key.pem"),
    }
    return Service(folder, handler, "-w", 2, "--policy", "quic[1]", environment=told | environment)


def test_connections_outlive_changes_of_port_a_rolling_restart_and_a_worker_fewer() -> None:
    result = asyncio.run(asyncio.wait_for(tried(Supervised, OPTIONS), 60))
    assert (result.broken, result.refused) == ({}, 0)
    assert result.visits > 5
    assert result.pieces >= 2 * 5 * OPTIONS.connections


def test_on_plain_so_reuseport_both_break_connections() -> None:
    options = argparse.Namespace(**vars(OPTIONS) | {"patience": 1.0})
    result = asyncio.run(asyncio.wait_for(tried(Plain, options), 60))
    assert sum(result.broken.values()) == OPTIONS.connections
    assert result.broken["when ports changed"] >= 1


def test_clients_of_ngtcp2_are_answered_at_the_address_that_they_have_changed_to(tmp_path: Path) -> None:
    gtlsclient = program("gtlsclient", "ngtcp2-client")
    with serving(tmp_path) as service:
        service.begun(2)
        words = [gtlsclient, "--exit-on-all-streams-close", "--change-local-addr=50ms", "--delay-stream=150ms"]
        clients = []
        for number in range(6):
            (tmp_path / str(number)).mkdir()
            clients.append(subprocess.Popen(
                [*words, *(["--nat-rebinding"] if number % 2 else []), f"--download={tmp_path / str(number)}",
                 ADDRESS, str(PORT), f"https://localhost:{PORT}/page"],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            ))  # fmt: skip
        answering = set()
        for number, client in enumerate(clients):
            said = client.communicate(timeout=20)[1]
            assert client.returncode == 0
            changed = re.search(rf"Local address is now \[{ADDRESS}\]:(\d+)", said)
            page = (tmp_path / str(number) / "page").read_text()
            found = re.fullmatch(rf"process (\d+) answers \('{ADDRESS}', (\d+)\)\n", page)
            assert changed is not None
            assert found is not None
            assert changed[1] == found[2]
            answering.add(int(found[1]))
        assert answering <= set(service.pids(2))
        assert service.stop() == 0


class Told(Client):
    """One that keeps how it ended."""

    code: int | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ConnectionTerminated):
            self.code = event.error_code
        super().quic_event_received(event)


@contextlib.asynccontextmanager
async def connected(folder: Path) -> AsyncIterator[Told]:
    """A client whose first piece has come back."""
    trusting = QuicConfiguration(
        alpn_protocols=H3_ALPN, cafile=str(folder / "certificate.pem"), server_name="localhost"
    )
    async with connect(ADDRESS, PORT, configuration=trusting, create_protocol=Told) as client:
        assert isinstance(client, Told)
        client.begin()
        await client.echo(b"piece", 10)
        yield client


async def restarted(service: Service, times: int = 1) -> None:
    service.send(signal.SIGHUP)
    await asyncio.to_thread(service.says, "all workers are new", times)


def test_a_connection_that_does_not_end_in_time_is_closed_and_the_client_is_told(tmp_path: Path) -> None:
    async def check(service: Service) -> None:
        async with connected(tmp_path) as client:
            await restarted(service)
            await client.wait_closed()
            assert client.code == ErrorCode.H3_NO_ERROR

    with serving(tmp_path, QUIC_DRAIN="0.1") as service:
        service.begun(2)
        asyncio.run(asyncio.wait_for(check(service), 30))
        assert service.stop() == 0


def test_a_silent_connection_outlives_two_restarts_and_is_told_when_the_service_ends(tmp_path: Path) -> None:
    async def check(service: Service) -> None:
        async with connected(tmp_path) as client:
            before = set(service.pids(2))
            await restarted(service)
            await restarted(service, 2)
            await asyncio.sleep(1.5 * ALONE)  # silence, which is no sign that nobody reads
            assert not before & set(service.pids(2))
            await client.echo(b"another", 10)
            service.send(signal.SIGTERM)
            await client.wait_closed()
            assert client.code == ErrorCode.H3_NO_ERROR

    (tmp_path / "impatient.py").write_text(f"import web\nweb.ALONE, web.PROBE = {ALONE}, 0.05\nServer = web.Server\n")
    with serving(tmp_path, "impatient:Server") as service:
        service.begun(2)
        asyncio.run(asyncio.wait_for(check(service), 30))
        assert service.process.wait(20) == 0


@pytest.mark.parametrize(
    ("told", "words"),
    [({"QUIC_KEY": "/nowhere"}, "QUIC_KEY '/nowhere': set them"), ({"QUIC_DRAIN": "nan"}, "QUIC_DRAIN is 'nan': give")],
)
def test_settings_that_make_no_sense_are_said_in_one_line(
    told: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certified(tmp_path)
    known = {"QUIC_CERTIFICATE": str(tmp_path / "certificate.pem"), "QUIC_KEY": str(tmp_path / "key.pem")}
    for name, value in (known | told).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(words)):
        web.Server()


def test_ids_are_read_from_both_kinds_of_header() -> None:
    cid = bytes(range(LENGTH))
    assert destination(b"\x40" + cid + b"rest") == cid
    assert destination(b"\xc0\0\0\0\1" + bytes([LENGTH]) + cid + b"\0rest") == cid
    assert destination(b"\xc0\0\0\0\1" + b"\x08" + bytes(8) + b"\0rest") == bytes(8)
    assert [destination(data) for data in (b"", b"\xc0", b"\xc0\0\0\0\1")] == [b"", b"", b""]
    assert owner(cid) == cid[1:5]
    assert [owner(data) for data in (b"", cid[:-1], cid + b"\0")] == [None, None, None]


class Relays:
    """Two of one user, and what they have said."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes, Any]] = []
        self.one, self.other = (
            Relay(*(self._noting(f"{name} {what}") for what in ("hears", "misses", "sends"))) for name in "ab"
        )

    def _noting(self, what: str) -> Any:
        return lambda data, address: self.seen.append((what, data, address))

    async def until(self, count: int) -> None:
        while len(self.seen) < count:
            await asyncio.sleep(0.002)

    def close(self) -> None:
        self.one.close()
        self.other.close()


def test_relays_hand_over_and_answer() -> None:
    sender, four = ("2001:db8::1", 4433, 0, 0), ("192.0.2.1", 9)

    async def check() -> None:
        with contextlib.closing(Relays()) as relays:
            one, other, seen = relays.one, relays.other, relays.seen
            assert owner(one.mint(b"s")) == one.name != other.name
            assert len({one.mint(b"s") for _ in range(100)}) == 100
            other.answer(b"to nobody", four)
            for number in range(100):
                one.hand_over(other.name, b"%d" % number, sender)
            one.hand_over(b"none", b"unknown", four)
            await relays.until(101)
            other.answer(b"answer", sender)
            await relays.until(102)
        assert sorted(seen[:101]) == sorted(
            [("a misses", b"unknown", four), *(("b hears", b"%d" % number, sender) for number in range(100))]
        )
        assert [data for what, data, _ in seen if what == "b hears"] == [b"%d" % number for number in range(100)]
        assert seen[101:] == [("a sends", b"answer", sender)]
        assert (one.dropped, other.dropped) == (0, 0)

    asyncio.run(asyncio.wait_for(check(), 10))


def test_a_relay_whose_queue_is_full_drops_and_counts() -> None:
    async def check() -> None:
        with contextlib.closing(Relays()) as relays:
            for _ in range(40):  # net.unix.max_dgram_qlen is 10, and nobody reads meanwhile
                relays.one.hand_over(relays.other.name, bytes(65_000), ("192.0.2.1", 9))
                relays.one.hand_over(relays.other.name, bytes(1_000), ("192.0.2.1", 9))
            assert relays.one.dropped > 0
            await relays.until(80 - relays.one.dropped)
            await asyncio.sleep(0)
            assert len(relays.seen) + relays.one.dropped == 80

    asyncio.run(asyncio.wait_for(check(), 10))


def test_a_relay_hears_nobody_of_another_user() -> None:
    async def check() -> None:
        with contextlib.closing(Relays()) as relays:
            message = msgspec.msgpack.encode([Handed(["192.0.2.1", 9], b"forged")])

            def forge() -> int:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                    return int(sock.sendto(message, b"\0fastrecv-quic/" + relays.other.name.hex().encode()) < 1)

            assert os.waitpid(as_user(65534, 65534, forge), 0)[1] == 0
            relays.one.hand_over(relays.other.name, b"last", ("192.0.2.1", 9))
            await relays.until(1)
            assert relays.seen == [("b hears", b"last", ("192.0.2.1", 9))]

    asyncio.run(asyncio.wait_for(check(), 10))


def test_load_says_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load.main(["--workers", "1"])
    assert "give at least one connection and two workers" in capsys.readouterr().err
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((ADDRESS, PORT))
        assert load.main(["--port", str(PORT)]) == 1
    assert "in use" in capsys.readouterr().err
