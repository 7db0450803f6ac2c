"""How a service is shown: metrics that a parser takes, a screen that fits, rates of the time between two looks."""

from __future__ import annotations

import io
from collections.abc import Iterator
from http.client import HTTPConnection
from urllib.parse import urlsplit

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from fastrecv import metrics as common
from fastrecv.cli.main import run
from fastrecv.cli.rates import History
from fastrecv.cli.top_view import screen, short, sparkline
from fastrecv.cli.workers import span
from fastrecv.errors import StateError
from fastrecv.workers import metrics
from fastrecv.workers.counters import FILLS
from fastrecv.workers.metrics import Endpoint, ServiceCollector
from fastrecv.workers.status import Counts, Service, Worker

BUSY = [3, 0, 0, 0, 0, 2, 6, 0, 0, 0, 1]
COUNTS = Counts(
    datagrams=2000, bytes=900_000, batches=sum(BUSY), fill=BUSY, truncated=1, handled=1900, failed=64, errors=1,
    killed=36, handler_seconds=0.5, kernel_drops=7, restarts=2, deaths=3,
)  # fmt: skip


def worker(slot: int, **changed: object) -> Worker:
    base = Worker(
        slot=slot, pid=4000 + slot, state="reading", reading_seconds=60.0, given_up=False, cause=None,
        queue_bytes=1024, queue_limit=4096, **msgspec.structs.asdict(COUNTS),
    )  # fmt: skip
    return msgspec.structs.replace(base, **changed)


def service(*workers: Worker, **changed: object) -> Service:
    base = Service(
        pid=4711, uptime=100.0, address="udp 192.0.2.1 port 2055", policy="source", chooser="balancer",
        handler='odd"name\\:handle', state="running", wanted=len(workers), restarting=0, failure=None,
        put_back=0, renewed=0, total=COUNTS, workers=list(workers),
    )  # fmt: skip
    return msgspec.structs.replace(base, **changed)


GIVEN_UP = worker(1, pid=None, state="given up", reading_seconds=None, given_up=True, cause="exit code 7")


def test_a_parser_takes_the_metrics_and_they_say_the_same() -> None:
    text = common.text(ServiceCollector(service(worker(0), GIVEN_UP)))
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for family in families.values():
        assert family.name.startswith("fastrecv_")
        assert family.documentation.endswith(".")
        assert family.samples
        if family.type == "counter":
            assert all(sample.name == f"{family.name}_total" for sample in family.samples)
        elif family.type == "gauge":
            assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert not any("pid" in sample.labels for sample in family.samples if not family.name.endswith("_info"))

    def of(name: str, slot: int) -> float:
        (value,) = [one.value for one in families[name].samples if one.labels == {"slot": str(slot)}]
        return value

    for name, expected in (
        ("datagrams", 2000), ("received_bytes", 900_000), ("truncated_datagrams", 1), ("handled_datagrams", 1900),
        ("failed_datagrams", 64), ("killed_datagrams", 36), ("handler_errors", 1), ("handler_seconds", 0.5),
        ("kernel_drops", 7), ("restarts", 2), ("deaths", 3), ("queue_bytes", 1024), ("queue_limit_bytes", 4096),
    ):  # fmt: skip
        assert of(f"fastrecv_worker_{name}", 0) == expected
    assert [of("fastrecv_worker_reading", slot) for slot in (0, 1)] == [1, 0]
    assert [of("fastrecv_worker_given_up", slot) for slot in (0, 1)] == [0, 1]
    (known,) = families["fastrecv_worker_info"].samples
    assert known.labels == {"slot": "0", "pid": "4000"}
    (what,) = families["fastrecv_service_info"].samples
    assert what.labels["handler"] == 'odd"name\\:handle'
    assert families["fastrecv_service_ready"].samples[0].value == 0


def test_the_histogram_of_batches_is_one() -> None:
    text = common.text(ServiceCollector(service(worker(0))))
    (family,) = [one for one in text_string_to_metric_families(text) if one.type == "histogram"]
    buckets = {one.labels["le"]: one.value for one in family.samples if one.name.endswith("_bucket")}
    assert list(buckets) == ["1.0", "3.0", "7.0", "15.0", "31.0", "63.0", "127.0", "255.0", "511.0", "1023.0", "+Inf"]
    assert len(buckets) == FILLS
    assert list(buckets.values()) == [3, 3, 3, 3, 3, 5, 11, 11, 11, 11, 12]
    rest = {one.name.rpartition("_")[2]: one.value for one in family.samples if not one.name.endswith("_bucket")}
    assert rest == {"count": 12, "sum": 2000}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """One whose loop does not turn yet."""
    monkeypatch.setattr(metrics, "_PATIENCE", 0.1)
    with Endpoint("127.0.0.1", 0, lambda: service(worker(0))) as made:
        made.begin()
        yield made


def got(where: str, path: str) -> tuple[int, str]:
    address = urlsplit(where).netloc
    connection = HTTPConnection(address, timeout=20)
    connection.request("GET", path)
    response = connection.getresponse()
    found = response.status, response.read().decode()
    connection.close()
    return found


def test_a_loop_that_does_not_turn_is_unhealthy(endpoint: Endpoint) -> None:
    for path in ("/healthz", "/readyz", "/metrics"):
        assert got(endpoint.where, path) == (503, "the supervisor has not answered within 0.1 s\n")
    assert got(endpoint.where, "/else") == (404, "give /metrics, /healthz or /readyz\n")
    ((_, answer),) = endpoint.watched().items()
    answer()  # who has given up waiting is passed over
    with pytest.raises(BlockingIOError):
        answer()


def test_a_port_that_is_taken(endpoint: Endpoint) -> None:
    port = urlsplit(endpoint.where).port
    assert port is not None
    with pytest.raises(StateError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
        Endpoint("127.0.0.1", port, service)


def test_why_a_service_is_not_ready() -> None:
    assert service(worker(0)).unready is None
    assert service(worker(0), GIVEN_UP).unready == "worker 1 does not read: it is given up"
    joining = worker(1, state="joining", reading_seconds=None)
    assert service(worker(0), joining).unready is None  # it has no senders yet
    assert service(worker(0), state="stopping").unready == "the service is stopping"


def later(one: Worker, seconds: float, datagrams: int) -> Service:
    """A second look, so many datagrams later."""
    more = {
        "datagrams": one.datagrams + datagrams, "bytes": one.bytes + 100 * datagrams,
        "batches": one.batches + 10 + datagrams // 1024,
        "handled": one.handled + datagrams, "handler_seconds": one.handler_seconds + 0.25, "kernel_drops": 27,
    }  # fmt: skip
    total = msgspec.structs.replace(COUNTS, **more)
    return service(msgspec.structs.replace(one, **more), uptime=100.0 + seconds, total=total)


def test_rates_are_of_the_time_between_two_looks() -> None:
    history = History(1.0)
    history.take(service(worker(0)))
    assert history.rates == {}
    history.take(later(worker(0), 2.0, 500))
    for slot in (None, 0):
        rates = history.rates[slot]
        assert rates == (250.0, 200_000.0, 10.0, 50.0, 500_000.0, 0.125)
    history.take(later(worker(0), 3.0, 500))
    assert history.rates[0][:3] == (0.0, 0.0, 0.0)
    assert (history.rates[0].fill, history.rates[0].nanoseconds) == (None, None)
    assert history.line(0, 10) == [125.0]  # of two looks, since a place is six
    assert history.line(0, 60) == [250.0, 0.0]
    history.take(service(worker(0), uptime=1.0, pid=4712))  # another service
    assert history.rates == {}
    assert history.line(0, 60) == []


def test_a_minute_is_remembered() -> None:
    history = History(0.5)
    for look in range(200):
        history.take(later(worker(0), 0.5 * (look + 1), 10 * look))
    line = history.line(None, 120)
    assert line == [20.0] * 120
    assert len(history.line(None, 10)) == 10


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (0.25, "0.25"), (2.5, "2.5"), (7, "7"), (1234, "1,234"), (99_999, "99,999"), (123_456, "123k"),
        (1_234_567, "1.23M"), (999_600, "1M"), (5e9, "5G"), (7e12, "7T"), (8e15, "8P"),
    ],
)  # fmt: skip
def test_numbers_are_short(number: float, text: str) -> None:
    assert short(number) == text


def test_sparklines_and_spans() -> None:
    assert sparkline([0, 0.001, 4, 8], 8) == " ▁▄█"
    assert sparkline([0, 0], 0) == "  "
    assert [span(seconds) for seconds in (0.5, 61, 3600, 100_000)] == ["0s", "1m 1s", "1h 0m", "1d 3h"]


def shown(found: Service | None, history: History, notice: str | None, width: int, height: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, height=height, force_terminal=False).print(
        screen(found, history, notice, width, height)
    )
    return out.getvalue().rstrip("\n").split("\n")


@pytest.mark.parametrize("width", [80, 200])
def test_a_screen_fits_and_leaves_nothing_out(width: int) -> None:
    history = History(1.0)
    history.take(service(worker(0), GIVEN_UP))
    now = later(worker(0), 1.0, 123_456_789)
    history.take(msgspec.structs.replace(now, workers=[*now.workers, GIVEN_UP]))
    lines = shown(service(worker(0, pid=4_194_304), GIVEN_UP), history, None, width, 24)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    assert lines[2].strip() == "worker 1 does not read: it is given up"
    table = {line.split()[0]: line for line in lines[4:7]}
    assert table["0"].split() == ["0", "4194304", "123M", "98,765", "1024", "2.0", "25%", "25%", "20", "2/3", "█"]
    assert table["all"].split()[1:] == ["123M", "98,765", "1024", "2.0", "25%", "25%", "20", "2/3", "█"]
    assert table["1"].split()[:4] == ["1", "given", "up", "0"]
    assert lines[-1].strip() == "q ends"


def test_more_workers_than_lines() -> None:
    lines = shown(service(*map(worker, range(128))), History(1.0), "waiting for the service, 3 s", 80, 24)
    assert len(lines) <= 24
    assert lines[-2].startswith("and 111 more workers")
    assert lines[-1] == "q ends  waiting for the service, 3 s"
    assert shown(None, History(1.0), "gone", 80, 24) == ["q ends  gone"]


def test_top_takes_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top"]) == 2
    assert "it takes a terminal: `fastrecv workers status --json` is for programs" in capsys.readouterr().err
