"""The name server example under `fastrecv run`, asked by dnsperf and dig."""

from __future__ import annotations

import ast
import re
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nameserver
import pytest

from fastrecv.bench.numbered import udp_counters
from fastrecv.netns import Namespace
from tests.kernel.supervising import ADDRESS, PORT, Service, namespace, until
from tests.programs import program

EXAMPLE = Path(nameserver.__file__).parent
QUESTIONS = "www.example.com A\nx.wild.example.com A\nnothing.example.com A\nalias.example.com AAAA\n"


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture
def service(ns: Namespace, tmp_path: Path) -> Iterator[Service]:
    told = {"PYTHONPATH": str(EXAMPLE), "DNS_ZONE": str(EXAMPLE / "example.zone")}
    with Service(tmp_path, "nameserver:NameServer", "-w", 2, "--policy", "source+port", environment=told) as made:
        made.begun(2)
        yield made


def received(ns: Namespace, more: int) -> None:
    """Wait until so many datagrams more have been received."""
    before = udp_counters(ns)["InDatagrams"]
    until(lambda: udp_counters(ns)["InDatagrams"] - before > more, lambda: "nobody asks")


def counted(service: Service) -> Counter[str]:
    """What all workers that have ended have counted."""
    found: Counter[str] = Counter()
    for counts in re.findall(r"nameserver \d+: ({.*})", service.log):
        found.update(ast.literal_eval(counts))
    return found


def test_dnsperf_loses_no_query_in_a_rolling_restart(service: Service, ns: Namespace) -> None:
    questions = service.folder / "questions"
    questions.write_text(QUESTIONS)
    words = [program("dnsperf", "dnsperf"), "-s", ADDRESS, "-p", PORT, "-c", 8, "-Q", 2000, "-l", 60, "-d", questions]
    with subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, text=True) as asking:
        try:
            received(ns, 200)  # queries, and answers to them
            service.send(signal.SIGHUP)
            service.says("all workers are new")
            received(ns, 1000)
        finally:
            asking.send_signal(signal.SIGINT)
        said = asking.communicate(timeout=20)[0]
    figures = {name: int(number) for name, number in re.findall(r"Queries (\w+): +(\d+)", said)}
    assert figures["lost"] == 0
    assert re.search(r"Response codes: +NOERROR \d+ \(7[45]\.\d+%\), NXDOMAIN \d+ \(2[45]\.\d+%\)", said)
    assert service.stop() == 0
    assert counted(service) == {"answered": figures["sent"]}


def test_dig_gets_its_answer_and_nonsense_is_counted(service: Service) -> None:
    dig = program("dig", "bind9-dnsutils")
    words = [dig, f"@{ADDRESS}", "-p", str(PORT), "+short", "+tries=1", "+time=5", "alias.example.com", "A"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    assert done.stdout.split() == ["www.example.com.", "192.0.2.1"]
    for asked, said in (
        (["+edns=1", "+noednsnegotiation", "alias.example.com", "A"], "status: BADVERS"),
        (["+edns=1", "alias.example.com", "A"], "status: NOERROR"),  # it has been told the version, and asks again
        (["version.bind", "TXT", "CH"], "status: REFUSED"),
    ):
        again = [word for word in words[:-2] if word != "+short"]
        done = subprocess.run([*again, *asked], capture_output=True, text=True, timeout=10, check=True)
        assert said in done.stdout
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        for nonsense in (b"", b"short", b"\1\2\x80" + bytes(9), b"\1\2\0\0\0\1" + bytes(6)):
            sock.sendto(nonsense, (ADDRESS, PORT))
        assert sock.recv(99) == b"\1\2\x80\1" + bytes(8)
    assert service.stop() == 0
    assert counted(service) == {"answered": 5, "dropped": 3, "malformed": 1}
