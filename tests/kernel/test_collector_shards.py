"""`fastrecv collect --shards` on two hosts and a real nats-server: an exporter has one subject wherever it comes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import Counter
from ipaddress import IPv4Address
from pathlib import Path

from fastrecv.collector.settings import SHARDING
from fastrecv.policies import Sender
from tests.kernel.jetstream import Server
from tests.kernel.supervising import ADDRESS, PORT, Service, namespace, until
from tests.unit.flow_datagrams import record5, sent5

SHARDS = 4
SOURCES = [f"127.2.0.{number}" for number in range(1, 9)]


def subject(prefix: str, source: str) -> str:
    """By the hash of the balancer's program, as it stands in Python."""
    bucket = SHARDING.bucket(Sender(IPv4Address(source), 0, IPv4Address(ADDRESS), PORT))
    assert bucket is not None
    return f"{prefix}.{bucket % SHARDS}"


def collecting(folder: Path, host: int, engine: str, flush: float = 0.02) -> Service:
    """A host's collector, with as many workers as it has a number."""
    (folder / f"host{host}").mkdir()
    flows, counts = (
        f"nats://{engine}/{name}?stream={name.upper()}&spool={folder}/host{host}/{name}" for name in ("flows", "counts")
    )
    words = ("--shards", SHARDS, "--sink", flows, "--exporters", counts, "--flush", flush, "--window", 3600)
    return Service(folder / f"host{host}", None, "-w", host, *words, bind=f"{ADDRESS}:{PORT + host}")


def send(service: Service, port: int, sequence: int = 0) -> None:
    """A datagram of each exporter, which is handled."""
    before = int(service.rows()["handled"].sum())
    for source in SOURCES:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((source, 0))
            sock.sendto(sent5(sequence, record5(1, 10), record5(2, 20)), (ADDRESS, port))
    until(lambda: int(service.rows()["handled"].sum()) == before + len(SOURCES), lambda: service.log)


def test_an_exporter_has_one_subject_whichever_host_and_worker_it_comes_to(tmp_path: Path) -> None:
    with namespace(), Server(tmp_path) as server, contextlib.ExitStack() as stack:
        hosts = {host: stack.enter_context(collecting(tmp_path, host, server.address)) for host in (1, 2)}
        for host, service in hosts.items():
            service.begun(host)
        for number, host in enumerate((1, 2, 1)):
            send(hosts[host], PORT + host, 2 * number)
        assert [service.stop() for service in hosts.values()] == [0, 0]
        flows, counts = server.stored("FLOWS"), server.stored("COUNTS")
    found = Counter((message.subject, row["exporterAddress"]) for message in flows for row in message.rows)
    assert found == Counter({(subject("flows", source), source): 6 for source in SOURCES})
    assert len({message.subject for message in flows}) > 1
    counted: Counter[tuple[str, str]] = Counter()
    for message in counts:
        for row in message.rows:
            counted[message.subject, row["exporterAddress"]] += row["octets"]
    assert counted == Counter({(subject("counts", source), source): 90 for source in SOURCES})


def test_without_a_flush_what_killed_workers_had_handled_comes_to_the_engine_that_was_away(tmp_path: Path) -> None:
    with namespace(), Server(tmp_path) as server:
        with collecting(tmp_path, 2, server.address, flush=0) as service:
            service.begun(2)
            server.kill()
            send(service, PORT + 2)
            for pid in service.pids(2):
                os.kill(pid, signal.SIGKILL)
            service.begun(4)
            server.start()
            send(service, PORT + 2)
            assert service.stop() == 0
        stored = server.stored("FLOWS")
    found = Counter((message.subject, row["exporterAddress"]) for message in stored for row in message.rows)
    assert found == Counter({(subject("flows", source), source): 4 for source in SOURCES})
