"""A service over HTTP: /metrics for Prometheus, /healthz and /readyz for who watches over it.

Requests are answered by threads, which ask the supervisor's loop how the service stands and wait for it a while: so
every answer is of one moment, and a loop that no longer turns is found out.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fastrecv.closing import Closing
from fastrecv.metrics import build_info
from fastrecv.web import HttpServer
from fastrecv.workers.counters import FILLS
from fastrecv.workers.status import Service, Worker

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["Endpoint", "ServiceCollector"]

_PATIENCE = 2.0  # seconds for the loop to answer
_POLL = 0.1  # seconds until the server notices that it is to end
_SLOT = ("slot",)


class Endpoint(Closing):
    """Listens from the start, so that a port in use is found out early; serves once `begin` is called.

    status : called in the loop of others that polls `watched`. StateError where it cannot listen.
    """

    def __init__(self, host: str, port: int, status: Callable[[], Service]) -> None:
        self._status = status
        self._server = HttpServer(host, port)
        self._server.set_app(self._serve)
        self._asked: deque[Future[Service]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # over `_wake`, which must not be written to once it is closed
        self._thread: threading.Thread | None = None

    @property
    def where(self) -> str:
        """http://ADDRESS:PORT."""
        return self._server.where

    def begin(self) -> None:
        """Start threads: whatever privileges are to be given up must be by now."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL,), name="fastrecv-metrics", daemon=True
        )
        self._thread.start()

    def watched(self) -> dict[int, Callable[[], object]]:
        """Descriptors to poll for reading, and what to call then."""
        return {self._wake: self._answer}

    def _answer(self) -> None:
        os.eventfd_read(self._wake)
        while self._asked:
            future = self._asked.popleft()
            if future.set_running_or_notify_cancel():
                future.set_result(self._status())

    def _service(self) -> Service | None:
        """In a thread: how it stands; None where the loop does not answer."""
        future: Future[Service] = Future()
        with self._lock:
            if self._wake < 0:
                return None
            self._asked.append(future)
            os.eventfd_write(self._wake, 1)
        try:
            return future.result(_PATIENCE)
        except (TimeoutError, CancelledError):
            future.cancel()
            return None

    def _serve(self, environment: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environment["PATH_INFO"]
        if path not in ("/metrics", "/healthz", "/readyz"):
            return _said(start, "404 Not Found", "give /metrics, /healthz or /readyz")
        service = self._service()
        if service is None:
            return _said(start, "503 Service Unavailable", f"the supervisor has not answered within {_PATIENCE:g} s")
        if path == "/metrics":
            registry = CollectorRegistry()
            registry.register(ServiceCollector(service))
            app: WSGIApplication = make_wsgi_app(registry)
            return app(environment, start)
        if path == "/readyz" and service.unready is not None:
            return _said(start, "503 Service Unavailable", service.unready)
        return _said(start, "200 OK", "ok")

    def close(self) -> None:
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()
        with self._lock:
            if self._wake >= 0:
                os.close(self._wake)
            self._wake = -1
        while self._asked:
            self._asked.popleft().cancel()


def _said(start: StartResponse, status: str, text: str) -> list[bytes]:
    body = f"{text}\n".encode()
    start(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
    return [body]


class ServiceCollector(Collector):
    """One look at a service, as metrics. Labels: slot; the pid, which changes, is in an _info only."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        service = self._service
        yield build_info()
        info = GaugeMetricFamily(
            "fastrecv_service_info", "What the service is.", labels=("address", "policy", "chooser", "handler")
        )
        info.add_metric([service.address, service.policy, service.chooser, service.handler], 1)
        yield info
        yield GaugeMetricFamily("fastrecv_service_uptime_seconds", "Since the service began.", service.uptime)
        yield GaugeMetricFamily("fastrecv_service_ready", "Whether every slot has a reader.", service.unready is None)
        yield GaugeMetricFamily("fastrecv_service_workers_wanted", "Workers that there shall be.", service.wanted)
        yield GaugeMetricFamily(
            "fastrecv_service_workers_restarting", "Workers that are still to be restarted.", service.restarting
        )
        yield GaugeMetricFamily(
            "fastrecv_service_in_rings", "Datagrams that wait in AF_XDP rings, or were lost in them.", service.in_rings
        )
        yield CounterMetricFamily(
            "fastrecv_service_program_repairs", "How often the group's program was put back.", service.put_back
        )
        yield CounterMetricFamily(
            "fastrecv_service_socket_repairs", "Sockets that had left the group, and were replaced.", service.renewed
        )
        yield from _gauges(service.workers)
        yield from _counters(service.workers)
        yield _fill(service.workers)


def _gauges(workers: list[Worker]) -> Iterator[Metric]:
    info = GaugeMetricFamily("fastrecv_worker_info", "Which process a slot has.", labels=("slot", "pid"))
    for worker in workers:
        if worker.pid is not None:
            info.add_metric([str(worker.slot), str(worker.pid)], 1)
    yield info
    for name, text, value in _GAUGES:
        family = GaugeMetricFamily(f"fastrecv_worker_{name}", text, labels=_SLOT)
        for worker in workers:
            family.add_metric([str(worker.slot)], value(worker))
        yield family


def _counters(workers: list[Worker]) -> Iterator[Metric]:
    for field, (name, text) in _COUNTERS.items():
        family = CounterMetricFamily(f"fastrecv_worker_{name}", text, labels=_SLOT)
        for worker in workers:
            family.add_metric([str(worker.slot)], getattr(worker, field))
        yield family


def _fill(workers: list[Worker]) -> Metric:
    """The histogram; its count is of its own buckets, so that it fits them while a worker counts on."""
    family = HistogramMetricFamily("fastrecv_worker_batch_datagrams", "Batches by datagrams.", labels=_SLOT)
    for worker in workers:
        buckets, total = [], 0
        for place, count in enumerate(worker.fill):
            total += count
            last = place == FILLS - 1
            buckets.append(("+Inf" if last else f"{(2 << place) - 1}.0", float(total)))
        family.add_metric([str(worker.slot)], buckets, float(worker.datagrams))
    return family


_GAUGES: tuple[tuple[str, str, Callable[[Worker], float]], ...] = (
    ("reading", "Whether the slot has a reader.", lambda worker: worker.reading_seconds is not None),
    ("reading_seconds", "Since its reader began to read.", lambda worker: worker.reading_seconds or 0.0),
    ("given_up", "Whether nobody is started any more.", lambda worker: worker.given_up),
    ("queue_bytes", "What waits in the socket, in the kernel's account.", lambda worker: worker.queue_bytes),
    ("queue_limit_bytes", "What may wait in the socket.", lambda worker: worker.queue_limit),
)
_COUNTERS = {
    "datagrams": ("datagrams", "Datagrams received."),
    "bytes": ("received_bytes", "Bytes received."),
    "truncated": ("truncated_datagrams", "Datagrams received that were longer than a slot of the batch."),
    "handled": ("handled_datagrams", "Datagrams whose handler has returned."),
    "failed": ("failed_datagrams", "Datagrams of batches whose handler raised an exception."),
    "killed": ("killed_datagrams", "Datagrams in the hands of workers that died."),
    "errors": ("handler_errors", "Batches whose handler raised an exception."),
    "handler_seconds": ("handler_seconds", "What handlers took for what they have handled."),
    "kernel_drops": ("kernel_drops", "Datagrams that the kernel dropped at the socket: no room, or the filter."),
    "restarts": ("restarts", "How often another worker than the first has begun to read."),
    "deaths": ("deaths", "Workers that have ended otherwise than told."),
}
