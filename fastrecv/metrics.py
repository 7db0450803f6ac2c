"""What dispatchers and balancers count, as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastrecv import balance_life
from fastrecv.lookup import BPFFS, ERRORS, Dispatcher, PathLike
from fastrecv.rules import FAMILY_NAMES, PROTOCOL_NAMES

__all__ = ["BalancerCollector", "DispatcherCollector", "build_info", "text"]

_NAMES = ("label", "family", "protocol")
_SLOT = ("name", "slot")
_OUTCOME = (*_SLOT, "outcome")


class DispatcherCollector(Collector):
    """Reads the dispatcher of a namespace anew at every scrape; needs no more than its group's permissions."""

    def __init__(self, netns: str | None = None, bpffs: PathLike = BPFFS) -> None:
        self._netns, self._bpffs = netns, bpffs

    def describe(self) -> Iterator[Metric]:
        return iter(())  # so that registering it does not collect

    def collect(self) -> Iterator[Metric]:
        yield build_info()
        up = GaugeMetricFamily("fastrecv_lookup_up", "Whether a dispatcher is loaded and could be read.")
        try:
            with Dispatcher(self._netns, bpffs=self._bpffs, read_only=True) as dispatcher:
                families = list(_families(dispatcher))
        except OSError:  # nothing is loaded, it is locked, or not ours to read: of all that, `status` says which
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        yield from families


def _families(dispatcher: Dispatcher) -> Iterator[Metric]:
    bindings = GaugeMetricFamily("fastrecv_lookup_bindings", "Bindings in force.")
    bindings.add_metric([], len(dispatcher.state.rows))
    lookups = CounterMetricFamily("fastrecv_lookup_lookups", "Packets that a binding took.", labels=_NAMES)
    misses = CounterMetricFamily(
        "fastrecv_lookup_misses", "Packets that a binding took whose label had no socket.", labels=_NAMES
    )
    errors = CounterMetricFamily(
        "fastrecv_lookup_errors", "Packets whose sockets the kernel refused.", labels=(*_NAMES, "reason")
    )
    sockets = GaugeMetricFamily("fastrecv_lookup_sockets", "Sockets registered.", labels=_NAMES)
    for name, _, members, counters in dispatcher.serving():
        labels = [name.label or "drop", FAMILY_NAMES[name.family], PROTOCOL_NAMES[name.protocol]]
        lookups.add_metric(labels, counters["lookups"])
        if name.label is None:
            continue
        misses.add_metric(labels, counters["misses"])
        sockets.add_metric(labels, len(members))
        for reason in ERRORS:
            errors.add_metric([*labels, reason], counters[reason])
    yield from (bindings, lookups, misses, errors, sockets)


class BalancerCollector(Collector):
    """Reads all balancers of a BPF file system anew at every scrape; needs no more than their group's permissions."""

    def __init__(self, bpffs: PathLike = BPFFS) -> None:
        self._bpffs = bpffs

    def describe(self) -> Iterator[Metric]:
        return iter(())  # so that registering it does not collect

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("fastrecv_balance_up", "Whether a balancer could be read.", labels=["name"])
        packets = CounterMetricFamily("fastrecv_balance_packets", "Packets by slot and outcome.", labels=_OUTCOME)
        senders = GaugeMetricFamily("fastrecv_balance_buckets", "Buckets of senders.", labels=_SLOT)
        sockets = GaugeMetricFamily("fastrecv_balance_sockets", "Sockets registered.", labels=_SLOT)
        for name in balance_life.names(self._bpffs):
            try:
                with balance_life.opened(name, bpffs=self._bpffs, read_only=True) as balancer:
                    slots, others = balancer.slots(), balancer.counters()[None]
            except OSError:  # locked, another version's, or not ours to read: of all that, `status` says which
                up.add_metric([name], 0)
                continue
            up.add_metric([name], 1)
            for slot in slots:
                labels = [name, str(slot.number)]
                senders.add_metric(labels, slot.buckets)
                sockets.add_metric(labels, slot.socket is not None)
                for outcome, count in slot.counters.items():
                    packets.add_metric([*labels, outcome], count)
            for outcome in ("empty", "unreadable"):  # the only ones without a slot
                packets.add_metric([name, "none", outcome], others[outcome])
        yield from (build_info(), up, packets, senders, sockets)


def build_info() -> Metric:
    build = GaugeMetricFamily("fastrecv_build_info", "The version of fastrecv.", labels=["version"])
    build.add_metric([version("fastrecv")], 1)
    return build


def text(collector: Collector) -> str:
    """The metrics of one collector in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()
