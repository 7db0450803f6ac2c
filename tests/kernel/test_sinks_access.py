"""Who a JetStream sink is, and whom it talks to: passwords, tokens, nkeys and TLS, against a real nats-server."""

from __future__ import annotations

import os
import ssl
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fastrecv.sinks import Access, JetStream, parsed
from tests.kernel.jetstream import Server, by_subject


@pytest.mark.parametrize(("authorization", "who"), [
    ("user: jane, password: 'p/ss'", {"user": "jane", "password": "p/ss"}),
    ("token: s3cret", {"token": "s3cret"}),
])  # fmt: skip
def test_passwords_and_tokens_are_given_and_wrong_ones_are_said(
    tmp_path: Path, authorization: str, who: dict[str, str]
) -> None:
    with Server(tmp_path, f"authorization {{ {authorization} }}", **who) as server:
        text = ":".join(who.values())
        place = f"{server.address}/flows?stream=FLOWS&spool={tmp_path}/spool&patience=300ms"
        with pytest.raises(TimeoutError, match="'Authorization Violation'"), parsed(f"nats://x:y@{place}") as sink:
            sink.publish([{"n": 0}])
        with parsed(f"nats://{text.replace('/', '%2F')}@{place}") as sink:
            sink.flush(10)
            sink.publish([{"n": 1}])
            sink.flush(10)
        assert by_subject(server.stored("FLOWS")) == {"flows.0": [0, 1]}


def test_an_nkey_is_given(tmp_path: Path) -> None:
    nkeys = pytest.importorskip("nkeys", reason="nats-py[nkeys]")
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    (tmp_path / "seed").write_bytes(seed)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    options = {"nkeys_seed": str(tmp_path / "seed")}
    with Server(tmp_path, f"authorization {{ users: [ {{ nkey: {public} }} ] }}", **options) as server:
        place = f"{server.address}/flows?stream=FLOWS&spool={tmp_path}/spool&nkey={tmp_path}/seed"
        with parsed(f"nats://{place}") as sink:
            sink.publish([{"n": 0}])
        assert by_subject(server.stored("FLOWS")) == {"flows.0": [0]}


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Of 127.0.0.1, signed by itself; its key is beside it."""
    made = tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-keyout", str(tmp_path / "key.pem"), "-out", str(made), "-subj", "/CN=test",
         "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True,
    )  # fmt: skip
    return made


def test_tls_is_made_with_servers_whose_certificate_is_known_and_with_no_others(
    tmp_path: Path, certificate: Path
) -> None:
    config = f'tls {{ cert_file: "{certificate}", key_file: "{tmp_path}/key.pem" }}'
    with Server(tmp_path, config, tls=ssl.create_default_context(cafile=certificate)) as server:
        place = f"{server.address}/flows?stream=FLOWS&spool={tmp_path}/spool&patience=300ms"
        with pytest.raises(TimeoutError, match="CERTIFICATE_VERIFY_FAILED"), parsed(f"tls://{place}") as sink:
            sink.publish([{"n": 0}])
        with parsed(f"nats://{place}&ca={certificate}") as sink:
            sink.flush(10)
            sink.publish([{"n": 1}])
            sink.flush(10)
        assert by_subject(server.stored("FLOWS")) == {"flows.0": [0, 1]}


def test_where_tls_is_asked_for_a_server_without_it_gets_no_credentials(tmp_path: Path) -> None:
    with Server(tmp_path, "authorization { user: jane, password: s3cret }\ndebug: true\ntrace: true") as server:
        place = f"jane:s3cret@{server.address}/flows?spool={tmp_path}/spool&patience=500ms"
        with pytest.raises(TimeoutError, match="offers no TLS"), parsed(f"tls://{place}") as sink:
            sink.publish([{"n": 0}])
        assert "[CONNECT" not in (tmp_path / "nats.log").read_text()


def test_a_file_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    access, missing = Access(["127.0.0.1"]), str(tmp_path / "none.pem")
    for wrong in (replace(access, ca=missing), replace(access, nkey=missing), replace(access, certificate=missing)):
        sink = JetStream(wrong, "flows", tmp_path / "spool")
        with pytest.raises((FileNotFoundError, ModuleNotFoundError), match=r"none\.pem|nkeys is not installed"):
            sink.open()
        sink.close()


def test_a_file_without_a_seed_is_said_at_once(tmp_path: Path) -> None:
    pytest.importorskip("nkeys", reason="nats-py[nkeys]")
    seed = tmp_path / "seed"
    for wrong in (b"", b"root:x:0:0\n", bytes(range(128, 200)), b"SUAM" * 14):
        seed.write_bytes(wrong)
        sink = JetStream(Access(["127.0.0.1"], nkey=str(seed)), "flows", tmp_path / "spool")
        with pytest.raises(ValueError, match=r"/seed has no seed of an nkey: give a file"):
            sink.open()
        sink.close()
