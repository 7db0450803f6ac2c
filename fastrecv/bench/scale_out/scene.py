"""The scene: test bed, engine, hosts, consumers and exporters together, and what can be done to them."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from fastrecv.bench.scale_out import account
from fastrecv.bench.scale_out.addresses import SHARDS
from fastrecv.bench.scale_out.bed import Bed, Policy
from fastrecv.bench.scale_out.consumers import CONSUMERS, Consumers
from fastrecv.bench.scale_out.engine import Engine
from fastrecv.bench.scale_out.exporters import ROUNDS, Exporters
from fastrecv.bench.scale_out.hosts import WORKERS, Host
from fastrecv.bench.survive_service import until

__all__ = ["Scene"]

_PATIENCE = 60.0  # seconds
_TICK = 0.05  # seconds
_NOTICED = 0.5  # seconds until the router knows that a host is gone


class Scene:
    """A context manager. hosts : by number. routed : who shares the exporters now. done : what was done, how often.

    changes : of routes: what, and how many hosts there were before and after; each has an odd phase of the exporters'.
    spooled : records that a killed host had acknowledged, and that were at no consumer when it came back.
    """

    def __init__(self, folder: Path, hosts: int, exporters: int, policy: Policy, seed: int) -> None:
        self.hosts: dict[int, Host] = {}
        self.routed: list[int] = []
        self.killed: set[int] = set()
        self.changes: list[tuple[str, int, int]] = []
        self.done: Counter[str] = Counter()
        self.spooled = 0
        self._folder, self._rng = folder, np.random.default_rng(seed)
        self._exporters, self._known = exporters, 0
        self._dead_node = self._dead_host = self._restarted = 0
        with contextlib.ExitStack() as undo:
            self.bed = undo.enter_context(Bed(policy))
            (folder / "engine").mkdir()
            self.engine = undo.enter_context(Engine(self.bed.engine, folder / "engine", SHARDS))
            self.consumers = undo.enter_context(Consumers(self.bed.engine, folder / "consumers", SHARDS))
            undo.callback(self._close_hosts)
            for _ in range(hosts):
                self._new_host()
            self._route([1])
            self.source = undo.enter_context(Exporters(self.bed.exporters, exporters))
            self._undo = undo.pop_all()

    def _close_hosts(self) -> None:
        for host in self.hosts.values():
            host.__exit__(None, None, None)

    def _new_host(self) -> int:
        number = self.bed.add_host()
        self.hosts[number] = Host(number, self.bed.hosts[number], self._folder / f"host{number}")
        self.hosts[number].start()
        return number

    def _route(self, hosts: list[int]) -> None:
        """In the order of their numbers: the kernel gives each a stretch of the hashes, in the order of the route."""
        self.routed = sorted(hosts)
        self.bed.route(self.routed)

    @contextlib.contextmanager
    def changing(self, what: str, hosts: list[int]) -> Iterator[None]:
        """A change that ends with the routes to these hosts; in a phase of its own."""
        self._heard_all()
        before = len(self.routed)
        self._next_phase()
        yield
        self._route(hosts)
        self._next_phase()
        self.changes.append((what, before, len(hosts)))
        self._known = self.source.sent + ROUNDS * self._exporters

    def _heard_all(self) -> None:
        until(lambda: self.source.sent >= self._known, lambda: "the exporters hardly send", _PATIENCE)

    def _next_phase(self) -> None:
        """What is sent from now on is of the next phase, and nothing of the last is still to be sent."""
        self.source.next_phase()
        sent = self.source.sent
        until(lambda: self.source.sent > sent + 1, lambda: "the exporters do not send")

    def share(self, hosts: int) -> None:
        """Let the first hosts share the exporters."""
        with self.changing(f"{hosts} share", list(range(1, hosts + 1))):
            pass

    # What befalls it. Each says in words what was done.

    def kill_worker(self) -> str:
        host = self.hosts[int(self._rng.choice(self.routed))]
        slot = int(self._rng.integers(WORKERS))
        host.kill_worker(slot)
        return self._did("worker killed", f"worker {slot} of host {host.number} killed")

    def kill_node(self) -> str:
        self._dead_node = self.engine.leader()
        self.engine.kill(self._dead_node)
        return self._did("engine node killed", f"engine node {self._dead_node}, the stream's leader, killed")

    def return_node(self) -> str:
        self.engine.start(self._dead_node)
        return self._did("engine node back", f"engine node {self._dead_node} back")

    def kill_host(self) -> str:
        number = self._dead_host = int(self._rng.choice(self.routed))
        with self.changing(f"host {number} killed", [one for one in self.routed if one != number]):
            self.hosts[number].kill()
            self.killed.add(number)
            time.sleep(_NOTICED)
        return self._did("host killed", f"host {number} killed, all its processes at once")

    def return_host(self) -> str:
        host = self.hosts[self._dead_host]
        self.spooled = self._behind(host)
        host.start()
        with self.changing(f"host {host.number} back", [*self.routed, host.number]):
            pass
        return self._did("host back", f"host {host.number} back, with {self.spooled:,} records in its spool")

    def add_host(self) -> str:
        number = self._new_host()
        with self.changing(f"host {number} added", [*self.routed, number]):
            pass
        return self._did("host added", f"host {number} added")

    def remove_host(self) -> str:
        """First it has no senders any more, then nothing in its spool, which leaves with it; then it stops."""
        number = int(self._rng.choice(self.routed))
        with self.changing(f"host {number} taken away", [one for one in self.routed if one != number]):
            pass
        self._emptied(self.hosts[number])
        self.hosts[number].stop()
        return self._did("host taken away", f"host {number} taken away")

    def restart_consumer(self) -> str:
        number = self._restarted % CONSUMERS
        self._restarted += 1
        self.consumers.restart(number)
        return self._did("consumer killed and restarted", f"consumer {number} killed and restarted")

    def _did(self, what: str, words: str) -> str:
        self.done[what] += 1
        return words

    def _behind(self, host: Host) -> int:
        """Records that it has acknowledged, and that are at no consumer."""
        theirs = account.identities(self.consumers.kept())
        return int(np.count_nonzero(~np.isin(account.identities(host.acknowledged()), theirs)))

    def _emptied(self, host: Host) -> None:
        deadline = time.monotonic() + _PATIENCE
        while (behind := self._behind(host)) and time.monotonic() < deadline:
            self.consumers.look()
            time.sleep(10 * _TICK)
        if behind:
            raise RuntimeError(f"host {host.number} has {behind:,} records in its spool still")

    # Its end

    def finish(self) -> int:
        """Let everything come to the consumers, and stop; how many datagrams were sent.

        What a killed worker has left in its spool is taken over by those who live, if not at once.
        """
        self._heard_all()
        sent = self.source.stop()
        deadline = time.monotonic() + _PATIENCE
        while self.consumers.count() < sum(host.count() for host in self.hosts.values()):
            if time.monotonic() > deadline:
                break  # the account will tell
            time.sleep(_TICK)
        for host in self.hosts.values():
            host.stop()
        until(
            lambda: self.engine.held()[2:] == (0, 0), lambda: f"messages are left in the engine: {self.engine.held()}",
            _PATIENCE,
        )  # fmt: skip
        self.consumers.stop()
        return sent

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()
