"""The spool: what was appended comes out in order until it is acknowledged, whatever happens to the process between."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrecv.sinks.spool import Message, Spool

LIMIT = 4000
OVERHEAD = 20  # bytes of a message's header


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    with Spool.new(tmp_path, LIMIT) as made:
        yield made


def read_all(spool: Spool) -> list[Message]:
    return list(iter(spool.read, None))


@contextmanager
def after_a_kill(spool: Spool, cut: int = 0) -> Iterator[list[Spool]]:
    """What the next process finds, had this one been killed now, `cut` bytes before the end of its last write."""
    with tempfile.TemporaryDirectory() as parent:
        shutil.copytree(Path(f"/proc/self/fd/{spool._lock}").readlink(), Path(parent, spool.identity))
        segments = sorted(Path(parent, spool.identity).glob("*.messages"))
        if cut and segments:
            os.truncate(segments[-1], max(segments[-1].stat().st_size - cut, 0))
        found = list(Spool.orphans(Path(parent), LIMIT))
        try:
            yield found
        finally:
            for each in found:
                each.close()


def test_messages_come_out_as_they_went_in_and_their_files_go_when_they_are_acknowledged(
    spool: Spool, tmp_path: Path
) -> None:
    data = [bytes([number]) * 100 for number in range(20)]
    for number in range(0, 20, 2):
        assert spool.append([(7, data[number]), (8, data[number + 1])])
    assert spool.size == 20 * (100 + OVERHEAD)
    found = read_all(spool)
    assert found == [Message(number, 7 + number % 2, data[number]) for number in range(20)]
    segments = len(list(tmp_path.glob("*/*.messages")))
    assert segments >= 5
    for message in found[1:]:
        assert spool.acknowledge(message.number)
    assert (spool.waiting, len(list(tmp_path.glob("*/*.messages")))) == (1, segments)
    assert spool.acknowledge(0)
    assert not spool.acknowledge(0)
    assert (spool.waiting, len(list(tmp_path.glob("*/*.messages")))) == (0, 1)
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_spool_takes_nothing_and_has_room_again_when_all_is_acknowledged(spool: Spool) -> None:
    while spool.append([(0, bytes(500))]):
        pass
    assert spool.waiting == LIMIT // (500 + OVERHEAD)
    assert not spool.append([(0, bytes(400)), (0, bytes(400))])
    for message in read_all(spool):
        spool.acknowledge(message.number)
    assert spool.append([(0, bytes(LIMIT - OVERHEAD))])
    assert [len(message.data) for message in read_all(spool)] == [LIMIT - OVERHEAD]
    with pytest.raises(ValueError, match="never fit into a spool of 4000"):
        spool.append([(0, bytes(LIMIT))])


def test_the_oldest_are_dropped_whole_segments_at_a_time_and_counted(spool: Spool) -> None:
    for number in range(10):
        assert spool.append([(0, b"%d" % number * 300)])
    first = spool.read()
    assert first is not None
    spool.acknowledge(0)
    assert spool.drop_oldest() == 1
    assert not spool.acknowledge(1)
    assert [message.number for message in read_all(spool)] == list(range(2, 10))
    dropped = 0
    while spool.waiting:
        dropped += spool.drop_oldest()
    assert dropped == 8
    assert spool.size == 0
    assert spool.append([(0, b"more")])
    assert [message.number for message in read_all(spool)] == [10]


def test_folders_of_live_processes_are_left_alone(spool: Spool, tmp_path: Path) -> None:
    spool.append([(0, b"a")])
    assert list(Spool.orphans(tmp_path, LIMIT)) == []
    with closing(Spool.new(tmp_path, LIMIT)) as other:
        assert other.identity > spool.identity


def test_what_a_process_leaves_when_it_ends_is_taken_over_once_and_the_oldest_first(tmp_path: Path) -> None:
    for text in (b"first", b"", b"second"):
        with Spool.new(tmp_path, LIMIT) as spool:
            if text:
                spool.append([(0, text)])
    found = list(Spool.orphans(tmp_path, LIMIT))
    assert list(Spool.orphans(tmp_path, LIMIT)) == []
    assert [message.data for spool in found for message in read_all(spool)] == [b"first", b"second"]
    for spool in found:
        spool.acknowledge(0)
        spool.close()
    assert list(tmp_path.iterdir()) == []


def test_damage_in_the_midst_costs_the_rest_of_its_segment_and_nothing_waits_for_ever(spool: Spool) -> None:
    for number in range(9):
        spool.append([(0, b"%d" % number * 100)])
    segments = sorted(Path(f"/proc/self/fd/{spool._lock}").readlink().glob("*.messages"))
    with segments[1].open("r+b") as damaged:
        damaged.seek(OVERHEAD)
        damaged.write(b"!")
    lost = range(int(segments[1].stem), int(segments[2].stem))
    with after_a_kill(spool) as (left,):
        assert left.torn == 1
        found = [message.number for message in read_all(left)]
        assert found == [number for number in range(9) if number not in lost]
        for number in found:
            left.acknowledge(number)
        assert left.waiting == 0


def test_a_disk_that_is_full_costs_the_message_and_no_other(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    spool.append([(0, b"before")])
    real, left = os.pwrite, [10]

    def limited(fd: int, data: bytes, at: int) -> int:
        if not left[0]:
            raise OSError(28, "No space left on device")
        done = real(fd, data[: left[0]], at)
        left[0] -= done
        return done

    monkeypatch.setattr(os, "pwrite", limited)
    assert not spool.append([(0, b"half")])
    monkeypatch.undo()
    assert spool.append([(0, b"after")])
    assert [message.data for message in read_all(spool)] == [b"before", b"after"]
    with after_a_kill(spool) as (left_behind,):
        assert (left_behind.torn, left_behind.waiting) == (0, 2)


def test_what_cannot_be_taken_over_keeps_nobody_from_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, sound = tmp_path / "0", tmp_path / "1"
    (broken / "acknowledged").mkdir(parents=True)
    with Spool.new(tmp_path, LIMIT) as spool:
        spool.append([(0, b"one")])
        shutil.copytree(tmp_path / spool.identity, sound)
        (sound / "notes.messages").write_text("somebody's")
        for _ in range(2):
            (left,) = Spool.orphans(tmp_path, LIMIT)
            assert [message.data for message in read_all(left)] == [b"one"]
            left.close()
    said = f"what a dead process has left cannot be taken over: [Errno 21] Is a directory: '{broken}'"
    assert caplog.messages == [said] * 2
    fcntl.flock(fd := os.open(broken, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)


Step = tuple[str, int]
STEPS = st.lists(st.one_of(
    st.tuples(st.just("append"), st.integers(0, 900)),
    st.tuples(st.just("append two"), st.integers(0, 300)),
    st.tuples(st.just("read"), st.integers(1, 5)),
    st.tuples(st.just("acknowledge"), st.integers(0, 30)),
    st.tuples(st.just("drop"), st.just(0)),
), max_size=60)  # fmt: skip


@given(STEPS, st.integers(0, 2000))
@settings(max_examples=150, deadline=None)
def test_whatever_is_done_what_waits_is_what_was_neither_acknowledged_nor_dropped(steps: list[Step], cut: int) -> None:
    with tempfile.TemporaryDirectory() as parent, Spool.new(Path(parent), LIMIT) as spool:
        waiting: dict[int, int] = {}  # number and size
        read: list[int] = []
        last = total = 0  # bytes of the last append; messages of all
        for step, number in steps:
            match step:
                case "append" | "append two":
                    sizes = [number] * (1 if step == "append" else 2)
                    if spool.append([(5, bytes([size % 256]) * size) for size in sizes]):
                        last = sum(sizes) + OVERHEAD * len(sizes)
                        waiting |= dict(enumerate(sizes, total))
                        total += len(sizes)
                case "read":
                    for _ in range(number):
                        if (message := spool.read()) is not None:
                            assert message == (message.number, 5, bytes([waiting[message.number] % 256])
                                               * waiting[message.number])  # fmt: skip
                            assert all(before < message.number for before in read)
                            read.append(message.number)
                case "acknowledge":
                    known = number < len(read) and read[number] in waiting
                    if number < len(read):
                        assert spool.acknowledge(read[number]) == known
                        waiting.pop(read[number], None)
                case "drop":
                    gone = spool.drop_oldest()
                    for oldest in sorted(waiting)[:gone]:
                        del waiting[oldest]
            assert spool.waiting == len(waiting)
            assert sum(waiting.values()) + OVERHEAD * len(waiting) <= spool.size <= LIMIT
        _check_the_next_process(spool, waiting, total, min(cut, last))


def _check_the_next_process(spool: Spool, waiting: dict[int, int], total: int, cut: int) -> None:
    """It finds all that waits, but for what is cut, and nothing older than the first of that."""
    with after_a_kill(spool, cut) as found:
        numbers = [message.number for left in found for message in read_all(left)]
        lost = [number for number in waiting if number not in numbers]
        assert numbers == sorted(numbers)
        assert len(lost) <= (2 if cut else 0)
        assert all(number >= total - 2 for number in lost)
        if numbers and waiting:
            assert numbers[0] >= min(waiting)
        assert sum(left.torn for left in found) <= 1
