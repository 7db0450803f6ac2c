"""Real services, unmodified, on the adapters: what they answer to real clients."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import dnslib
import dnslib.server
import pytest
import uvloop
from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ProtocolNegotiated, QuicEvent
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fastrecv.adapters.asyncio import create_datagram_endpoint
from fastrecv.adapters.socketserver import ThreadingUDPServer, UDPServer
from tests.programs import program

LOOPS: Any = {"asyncio": asyncio.run, "uvloop": uvloop.run}


class Resolver(dnslib.server.BaseResolver):  # type: ignore[misc]
    """host<n>.example. is 192.0.2.<n>."""

    def resolve(self, request: Any, _: Any) -> Any:
        reply = request.reply()
        number = str(request.q.qname).removeprefix("host").partition(".")[0]
        reply.add_answer(dnslib.RR(request.q.qname, rdata=dnslib.A(f"192.0.2.{number}"), ttl=60))
        return reply


@contextmanager
def dns(kind: type) -> Iterator[int]:
    """A DNS server of dnslib on `kind`; its port."""
    quiet = dnslib.server.DNSLogger("-request,-reply,-truncated,-error")
    service = dnslib.server.DNSServer(Resolver(), address="127.0.0.1", port=0, server=kind, logger=quiet)
    service.start_thread()
    try:
        yield service.server.server_address[1]
    finally:
        service.stop()
        service.thread.join(10)
        service.server.server_close()


@pytest.mark.parametrize("kind", [UDPServer, ThreadingUDPServer])
def test_dnslib_answers_dig(kind: type, tmp_path: Path) -> None:
    dig = program("dig", "bind9-dnsutils")
    names = tmp_path / "names"
    names.write_text("".join(f"host{number}.example. A\n" for number in range(200)))
    with dns(kind) as port:
        done = subprocess.run(
            [dig, "@127.0.0.1", "-p", str(port), "+short", "+tries=1", "+time=5", "-f", names],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    assert done.stdout.split() == [f"192.0.2.{number}" for number in range(200)]


def test_dnslib_answers_a_burst_of_queries() -> None:
    with dns(UDPServer) as port, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", port))
        sock.settimeout(5)
        for number in range(200):
            sock.send(
                dnslib.DNSRecord(dnslib.DNSHeader(id=number), q=dnslib.DNSQuestion(f"host{number}.example")).pack()
            )
        for number in range(200):
            reply = dnslib.DNSRecord.parse(sock.recv(512))
            assert (reply.header.id, str(reply.short())) == (number, f"192.0.2.{number}")


class WebService(QuicConnectionProtocol):
    """Says to each request what was asked for, and so many bytes more."""

    http: H3Connection | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ProtocolNegotiated):
            self.http = H3Connection(self._quic)
        if self.http is None:  # the handshake goes on
            return
        for part in self.http.handle_event(event):
            if isinstance(part, HeadersReceived):
                body = page(dict(part.headers)[b":path"])
                self.http.send_headers(part.stream_id, [(b":status", b"200"), (b"content-length", b"%d" % len(body))])
                self.http.send_data(part.stream_id, body, end_stream=True)
                self.transmit()


class WebClient(QuicConnectionProtocol):
    """Asks for one path at a time."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.http = H3Connection(self._quic)

    async def get(self, path: bytes) -> bytes:
        self.body, self.whole = b"", asyncio.get_running_loop().create_future()
        headers = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"localhost"), (b":path", path)]
        self.http.send_headers(self._quic.get_next_available_stream_id(), headers, end_stream=True)
        self.transmit()
        await self.whole
        return self.body

    def quic_event_received(self, event: QuicEvent) -> None:
        for part in self.http.handle_event(event):
            if isinstance(part, DataReceived):
                self.body += part.data
                if part.stream_ended:
                    self.whole.set_result(None)


def page(path: bytes) -> bytes:
    return path + bytes(range(256)) * 1000


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of a self-signed certificate for localhost, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("certificate")
    (folder / "certificate.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "certificate.pem", folder / "key.pem"


@asynccontextmanager
async def web(certificate: tuple[Path, Path]) -> AsyncIterator[int]:
    """aioquic's own server on our endpoint; its port."""
    configuration = QuicConfiguration(alpn_protocols=H3_ALPN, is_client=False)
    configuration.load_cert_chain(*certificate)
    transport, server = await create_datagram_endpoint(
        lambda: QuicServer(configuration=configuration, create_protocol=WebService), local_addr=("127.0.0.1", 0)
    )
    try:
        yield transport.get_extra_info("sockname")[1]
    finally:
        server.close()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("loop", LOOPS)
def test_aioquic_answers_its_own_http3_client(loop: str, certificate: tuple[Path, Path]) -> None:
    async def check() -> None:
        configuration = QuicConfiguration(alpn_protocols=H3_ALPN, cafile=str(certificate[0]), server_name="localhost")
        async with (
            web(certificate) as port,
            connect("127.0.0.1", port, configuration=configuration, create_protocol=WebClient) as client,
        ):
            assert isinstance(client, WebClient)
            for path in (b"/one", b"/two"):
                assert await client.get(path) == page(path)

    LOOPS[loop](asyncio.wait_for(check(), 20))


@pytest.mark.parametrize("loop", LOOPS)
def test_aioquic_answers_the_http3_client_of_ngtcp2(loop: str, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    gtlsclient = program("gtlsclient", "ngtcp2-client")

    async def check() -> None:
        async with web(certificate) as port:
            asked = [f"https://localhost:{port}/{name}" for name in ("one", "two", "three")]
            process = await asyncio.create_subprocess_exec(
                gtlsclient, "--quiet", "--exit-on-all-streams-close", f"--download={tmp_path}", "--timeout=5s",
                "127.0.0.1", str(port), *asked,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            assert await process.wait() == 0
        for name in (b"one", b"two", b"three"):
            assert (tmp_path / name.decode()).read_bytes() == page(b"/" + name)

    LOOPS[loop](asyncio.wait_for(check(), 20))


class Echo(asyncio.DatagramProtocol):
    transport: Any

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data[::-1], addr)


def ask(port: int, client: int, wrong: list[Any], bursts: int, burst: int) -> None:
    """Bursts of different datagrams, each sent when the one before is answered; what was answered wrongly."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", port))
        sock.settimeout(5)
        for number in range(bursts):
            sent = [b"%d/%d/%d" % (client, number, place) for place in range(burst)]
            for payload in sent:
                sock.send(payload)
            got = [sock.recv(99) for _ in sent]
            if got != [payload[::-1] for payload in sent]:
                wrong.append((sent, got))
    wrong.append(None)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_echo_under_load_answers_everyone_rightly(loop: str) -> None:
    wrong: list[Any] = []

    async def check() -> None:
        transport, _ = await create_datagram_endpoint(Echo, local_addr=("127.0.0.1", 0))
        port = transport.get_extra_info("sockname")[1]
        clients = [threading.Thread(target=ask, args=(port, client, wrong, 50, 20)) for client in range(5)]
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            await asyncio.sleep(0.01)
        assert transport.get_extra_info("receiver").statistics().datagrams == 5000
        transport.close()
        await asyncio.sleep(0)

    LOOPS[loop](asyncio.wait_for(check(), 20))
    assert wrong == [None] * 5  # everyone came to the end
