"""The JetStream sink against a real nats-server: killed publishers, killed servers, and every record accounted for."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nats.errors
import pyarrow as pa
import pytest

from fastrecv.sinks import Access, JetStream, Sink, SinkFull, parsed
from tests.kernel.jetstream import Server, by_subject, free_port, until

SHARDS = 4


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as made:
        yield made


def sink_to(server: Server, tmp_path: Path, **options: Any) -> JetStream:
    return JetStream(Access([server.address]), "flows", tmp_path / "spool", **{"stream": "FLOWS", **options})


def expected(count: int) -> dict[str, list[int]]:
    return {f"flows.{shard}": list(range(shard, count, SHARDS)) for shard in range(SHARDS)}


def publish(sink: JetStream, numbers: range) -> None:
    for number in numbers:
        sink.publish([{"n": number}], number % SHARDS)


def test_rows_arrive_as_arrow_streams_by_subject_and_in_order(server: Server, tmp_path: Path) -> None:
    with sink_to(server, tmp_path) as sink:
        assert isinstance(sink, Sink)
        publish(sink, range(100))
        sink.publish([])
        sink.flush(10)
        statistics = sink.statistics()
    assert (statistics.rows, statistics.published, statistics.acknowledged, statistics.waiting) == (100, 100, 100, 0)
    assert (statistics.duplicates, statistics.dropped, statistics.reconnects) == (0, 0, 0)
    stored = server.stored("FLOWS")
    assert by_subject(stored) == expected(100)
    assert len({message.identity for message in stored}) == 100
    assert list((tmp_path / "spool" / "flows").iterdir()) == []


def test_of_several_servers_one_that_answers_is_enough(server: Server, tmp_path: Path) -> None:
    place = f"127.0.0.1:{free_port()},{server.address}/flows?stream=FLOWS&spool={tmp_path}/spool"
    with parsed(f"nats://{place}") as sink:
        sink.publish([{"n": 0}], 4095)
    assert by_subject(server.stored("FLOWS")) == {"flows.4095": [0]}


def test_a_batch_that_is_too_long_for_a_message_becomes_several(server: Server, tmp_path: Path) -> None:
    rows = [{"n": number, "pad": bytes(100_000)} for number in range(30)]
    with sink_to(server, tmp_path) as sink:
        sink.publish(rows, 1)
        with pytest.raises(ValueError, match=r"a row of .* bytes: a message has room for 1000000"):
            sink.publish([{"n": 1, "pad": bytes(2_000_000)}])
        assert sink.statistics().published == 4
    stored = server.stored("FLOWS")
    assert len(stored) == 4
    assert by_subject(stored) == {"flows.1": list(range(30))}


def test_messages_have_of_a_dictionary_what_their_rows_name(server: Server, tmp_path: Path) -> None:
    names = pa.array([f"2001:db8::{number:x}" for number in range(60_000)])
    named = pa.DictionaryArray.from_arrays(pa.array(range(60_000), pa.int32()), names)
    none = pa.nulls(60_000, named.type)
    with sink_to(server, tmp_path) as sink:
        sink.publish(pa.record_batch({"n": range(60_000), "named": named, "none": none}))
        sink.flush(10)
    stored = server.stored("FLOWS")
    assert len(stored) <= 4
    rows = [row for message in stored for row in message.rows]
    assert [row["n"] for row in rows] == list(range(60_000))
    assert [row["named"] for row in rows] == names.to_pylist()
    assert {row["none"] for row in rows} == {None}


ON_A_FULL_DISK = """
import sys
from fastrecv.sinks import Access, JetStream
with open(f"{sys.argv[1]}/full", "wb", buffering=0) as full:
    try:
        while full.write(bytes(4096)):
            pass
    except OSError:
        pass
try:
    JetStream(Access(["127.0.0.1:9"]), "flows", sys.argv[1]).open()
except OSError as error:
    print(error)
"""


def test_a_disk_that_is_full_from_the_beginning_is_an_error_and_no_crash(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("there are no mounts of one's own here")
    mounted = 'mount -t tmpfs -o size=64k none "$1" && mkdir "$1/flows" && exec "$2" -c "$3" "$1"'
    words = ["unshare", "--mount", "sh", "-c", mounted, "sh", str(tmp_path), sys.executable, ON_A_FULL_DISK]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=20)
    assert done.stdout.startswith(f"[Errno 28] No space left on device: '{tmp_path}/flows/")
    assert done.stdout.count("\n") == 1


def test_a_server_that_comes_later_and_goes_meanwhile_gets_all_in_order(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        server.kill()
        with sink_to(server, tmp_path) as sink:
            publish(sink, range(200))
            with pytest.raises(TimeoutError, match=r"200 messages wait in .*Connect"):
                sink.flush(0.3)
            server.start()
            sink.flush(20)
            for again, begin in enumerate(range(200, 2000, 600), 1):
                publish(sink, range(begin, begin + 300))
                server.kill()
                publish(sink, range(begin + 300, begin + 600))
                server.start()
                reached = functools.partial(lambda count: sink.statistics().reconnects == count, again)
                until(reached, lambda: str(sink.statistics()))
            sink.flush(30)
            statistics = sink.statistics()
        assert statistics.acknowledged == statistics.published == 2000
        assert by_subject(server.stored("FLOWS")) == expected(2000)


PUBLISHER = """
import sys
from fastrecv.sinks import Access, JetStream
address, folder, begin = sys.argv[1], sys.argv[2], int(sys.argv[3])
sink = JetStream(Access([address]), "flows", folder, stream="FLOWS", window=8)
sink.open()
for number in range(begin, 10**9):
    sink.publish([{"n": number}], number % 4)
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


def killed_publisher(server: Server, tmp_path: Path, begin: int, seconds: float) -> int:
    """The number behind the last for which publish() has returned in a process that was killed after a while."""
    words = [sys.executable, "-c", PUBLISHER, server.address, str(tmp_path / "spool"), str(begin)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(seconds)
        process.kill()
        returned = (first + process.stdout.read()).split(b"\n")[:-1]
    return int(returned[-1]) + 1


def survive(server: Server, tmp_path: Path, rounds: int, draw: random.Random) -> int:
    """Publishers that are killed, one after the other, and a server that is killed now and then; how many numbers."""
    begin = 0
    for place in range(rounds):
        if place % 2:
            server.kill()
        if place % 4 == 3:  # a publisher that lives and dies without a server
            begin = killed_publisher(server, tmp_path, begin, draw.uniform(0, 0.1))
        if place % 2:
            server.start()
        begin = killed_publisher(server, tmp_path, begin, draw.uniform(0, 0.3))
    return begin


@pytest.mark.parametrize("rounds", [4, pytest.param(60, marks=pytest.mark.proof)])
def test_what_publish_has_returned_for_is_there_once_and_in_order_though_all_are_killed(
    server: Server, tmp_path: Path, rounds: int
) -> None:
    count = survive(server, tmp_path, rounds, random.Random(rounds))
    with sink_to(server, tmp_path) as sink:
        until(lambda: sink.statistics().adopted, lambda: "nothing was taken over")
        sink.flush(60)
        statistics = sink.statistics()
        assert statistics.acknowledged == statistics.adopted
        assert statistics.torn <= rounds * 2
    stored = server.stored("FLOWS")
    assert len({message.identity for message in stored}) == len(stored)
    found = by_subject(stored)
    # A number that was written to the spool and whose publish() had not returned is given again by the next publisher.
    unique = {subject: list(dict.fromkeys(numbers)) for subject, numbers in found.items()}
    more = {number for numbers in unique.values() for number in numbers if number >= count}
    assert len(more) <= 1
    assert {subject: [number for number in numbers if number < count] for subject, numbers in unique.items()} == (
        expected(count)
    )
    assert sum(map(len, found.values())) - sum(map(len, unique.values())) <= rounds * 2
    assert list((tmp_path / "spool" / "flows").iterdir()) == []


ACKNOWLEDGED_LATE = """
import os, sys
from fastrecv.sinks import Access, JetStream
JetStream.acknowledged = lambda *arguments: os.kill(os.getpid(), 9)
sink = JetStream(Access([sys.argv[1]]), "flows", sys.argv[2], stream="FLOWS")
sink.open()
sink.publish([{"n": 0}])
sink.flush()
"""


def test_what_a_dead_process_had_sent_is_removed_by_the_stream_when_it_is_sent_again(
    server: Server, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", ACKNOWLEDGED_LATE, server.address, str(tmp_path / "spool")]
    assert subprocess.run(words, check=False, timeout=20).returncode == -signal.SIGKILL
    with sink_to(server, tmp_path) as sink:
        until(lambda: sink.statistics().acknowledged, lambda: "nothing was taken over")
        assert sink.statistics()[2:7] == (1, 1, 0, 0, 1)
    assert by_subject(server.stored("FLOWS")) == {"flows.0": [0]}


@pytest.mark.proof
def test_a_cluster_whose_leaders_change_and_whose_servers_die_gets_all_once_and_in_order(tmp_path: Path) -> None:
    ports = [free_port() for _ in range(3)]
    routes = ", ".join(f"nats://127.0.0.1:{port}" for port in ports)
    with contextlib.ExitStack() as stack:
        servers = []
        for port in ports:
            folder = tmp_path / str(port)
            folder.mkdir()
            cluster = f'cluster {{ name: c, listen: "127.0.0.1:{port}", routes: [{routes}] }}\nserver_name: n{port}'
            servers.append(stack.enter_context(Server(folder, cluster)))
        config = {"name": "FLOWS", "subjects": ["flows.>"], "num_replicas": 3}
        _done(servers[0], "STREAM.CREATE.FLOWS", json.dumps(config).encode())
        access = Access([server.address for server in servers])
        with JetStream(access, "flows", tmp_path / "spool", stream="FLOWS", window=8) as sink:
            count = 0
            for turn in range(12):
                for _ in range(20):
                    publish(sink, range(count, count + 100))
                    count += 100
                    time.sleep(0.01)
                if turn % 3 == 2:
                    servers[turn % 2].kill()
                    servers[turn % 2].start()
                else:
                    _done(servers[2], "STREAM.LEADER.STEPDOWN.FLOWS")
            sink.flush(60)
            assert sink.statistics().acknowledged == count
        _done(servers[2], "STREAM.INFO.FLOWS")
        stored = servers[2].stored("FLOWS")
    assert by_subject(stored) == expected(count)


def _done(server: Server, call: str, payload: bytes = b"") -> None:
    """By JetStream's API, as soon as there is a leader of what it is asked for."""

    def answered() -> bool:
        with contextlib.suppress(nats.errors.Error):
            return "error" not in server.asked(f"$JS.API.{call}", payload)
        return False

    until(answered, lambda: f"{call}: no leader")


def test_what_another_process_leaves_while_we_run_is_taken_over(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastrecv.sinks.delivery._ADOPT", 0.1)
    monkeypatch.setattr("fastrecv.sinks.jetstream._LEFT", 0.1)
    away = JetStream(Access(["127.0.0.1:9"]), "flows", tmp_path / "spool")
    with sink_to(server, tmp_path) as sink:
        publish(sink, range(4))
        sink.flush(10)
        away.open()
        publish(away, range(4, 8))
        assert sink.statistics().adopted == 0
        with pytest.raises(TimeoutError, match="4 messages wait"):
            away.close(0)
        until(lambda: sink.statistics().acknowledged == 8, lambda: str(sink.statistics()))
    assert by_subject(server.stored("FLOWS")) == expected(8)


def test_a_full_spool_refuses_what_it_has_no_room_for_and_takes_it_later(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        server.kill()
        with sink_to(server, tmp_path, spool_size=16 << 20, patience=0.05) as sink:
            row = {"pad": os.urandom(900_000)}
            taken = 0
            while sink.statistics().spooled_bytes < 15 << 20:
                sink.publish([{"n": taken, **row}])
                taken += 1
            began = time.monotonic()
            with pytest.raises(SinkFull, match=r"the spool .* is full: .*Connect"):
                sink.publish([{"n": taken, **row}, {"n": taken + 1, **row}])
            assert time.monotonic() - began >= 0.05
            assert sink.statistics().published == taken
            server.start()
            sink.flush(20)
            sink.publish([{"n": taken}])
            sink.flush(10)
        assert by_subject(server.stored("FLOWS")) == {"flows.0": list(range(taken + 1))}


def test_a_full_spool_that_is_to_drop_keeps_the_newest_and_counts_the_others(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        server.kill()
        with sink_to(server, tmp_path, spool_size=16 << 20, full="drop-oldest", patience=0) as sink:
            for number in range(40):
                sink.publish([{"n": number, "pad": os.urandom(900_000)}])
            before = sink.statistics()
            assert before.published == 40
            assert before.waiting + before.dropped == 40
            assert before.dropped >= 40 - 18
            server.start()
            sink.flush(20)
            after = sink.statistics()
            assert (after.acknowledged, after.dropped) == (before.waiting, before.dropped)
        assert by_subject(server.stored("FLOWS")) == {"flows.0": list(range(before.dropped, 40))}


def test_a_server_that_stands_still_is_left_and_gets_all_when_it_goes_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastrecv.sinks.delivery._ACKNOWLEDGE", 0.3)
    with sink_to(server, tmp_path) as sink:
        publish(sink, range(50))
        sink.flush(10)
        server.send(signal.SIGSTOP)
        publish(sink, range(50, 1000))
        with pytest.raises(TimeoutError, match=r"messages wait in .*not acknowledged for 0.3 s"):
            sink.flush(1.5)
        server.send(signal.SIGCONT)
        sink.flush(20)
    assert by_subject(server.stored("FLOWS")) == expected(1000)


def test_a_sink_to_a_server_that_stands_still_is_closed_in_time_though_the_connection_is_full(
    server: Server, tmp_path: Path
) -> None:
    sink = sink_to(server, tmp_path)
    sink.open()
    sink.publish([{"n": 0}])
    sink.flush(10)
    server.send(signal.SIGSTOP)
    for number in range(1, 31):
        sink.publish([{"n": number, "pad": os.urandom(800_000)}], number)
    with pytest.raises(TimeoutError, match="30 messages wait"):
        sink.close(0.2)
    server.send(signal.SIGCONT)
    with sink_to(server, tmp_path) as successor:
        until(lambda: successor.statistics().acknowledged == 30, lambda: str(successor.statistics()))
    assert by_subject(server.stored("FLOWS")) == {f"flows.{number}": [number] for number in range(31)}


def test_a_stream_that_is_made_later_gets_what_waited_for_it(server: Server, tmp_path: Path) -> None:
    with sink_to(server, tmp_path, stream=None) as sink:
        publish(sink, range(8))
        with pytest.raises(TimeoutError, match="no stream takes"):
            sink.flush(0.5)
        server.made("OTHER", "flows.*")
        sink.flush(10)
    assert by_subject(server.stored("OTHER")) == expected(8)


def test_a_stream_that_is_there_stays_as_it_is_and_one_that_takes_other_subjects_is_said(
    server: Server, tmp_path: Path
) -> None:
    server.made("FLOWS", "other.>")
    with pytest.raises(TimeoutError, match="no stream takes"), sink_to(server, tmp_path, patience=0.5) as sink:
        publish(sink, range(1))
    assert server.stored("FLOWS") == []


def test_a_server_without_jetstream_is_said(tmp_path: Path) -> None:
    with Server(tmp_path, "jetstream: disabled") as server:
        sink = sink_to(server, tmp_path, patience=0.5)
        with pytest.raises(TimeoutError, match="the server has no JetStream, or it is not ready"), sink:
            sink.publish([{"n": 0}])
