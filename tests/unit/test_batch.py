"""Batch: its views, its copies, and what happens when it is released while it is used."""

from __future__ import annotations

import gc
import pickle
import random
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from fastrecv import Batch, Receiver
from fastrecv.sockets import endpoints

HEADER = np.dtype([("kind", ">u2"), ("count", ">u4")])  # 6 bytes


@pytest.fixture
def pair() -> Iterator[tuple[Receiver, socket.socket]]:
    with Receiver.bind(("127.0.0.1", 0)) as receiver, socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.connect(receiver.address)
        yield receiver, sock


def batch_of(pair: tuple[Receiver, socket.socket], *payloads: bytes) -> Batch:
    receiver, sock = pair
    for payload in payloads:
        sock.send(payload)
    batch = receiver.recv(5)
    assert len(batch) == len(payloads)
    return batch


def train_of(*payloads: bytes) -> Batch:
    """A batch whose rows lie one behind the other."""
    with Receiver.bind(("127.0.0.1", 0), gro=True) as receiver, Receiver.bind(("127.0.0.1", 0)) as other:
        assert other.send(payloads, receiver.address) == len(payloads)
        batch = receiver.recv(5)
        assert len(batch) == len(payloads)
        return batch


def test_rows_lie_in_data_where_offsets_and_lengths_say(pair: tuple[Receiver, socket.socket]) -> None:
    payloads = [b"abc", b"", bytes(range(256))]
    batch = batch_of(pair, *payloads)
    rows = zip(batch.offsets, batch.lengths, strict=True)
    assert [batch.data[start : start + size].tobytes() for start, size in rows] == payloads
    assert [bytes(batch[i]) for i in (0, 1, 2, -1)] == [*payloads, payloads[-1]]
    for index in (3, -4):
        with pytest.raises(IndexError, match=r"no datagram -?\d in a batch of 3"):
            batch[index]


def test_views_are_read_only(pair: tuple[Receiver, socket.socket]) -> None:
    batch = batch_of(pair, b"abcdefgh")
    arrays = (batch.data, batch.offsets, batch.lengths, batch.flags, batch.sources, batch.records("u4"))
    assert not any(array.flags.writeable for array in arrays if array is not None)
    assert batch[0].readonly


def test_views_do_not_copy(pair: tuple[Receiver, socket.socket]) -> None:
    batch = batch_of(pair, b"abcdefgh", b"ijklmnop")
    assert np.shares_memory(np.frombuffer(batch[1], "u1"), batch.data)
    assert np.shares_memory(batch.records("S4"), batch.data)
    assert not np.shares_memory(batch.copy().data, batch.data)
    assert not np.shares_memory(batch.packed()[0], batch.data)


def test_records_are_a_view_where_no_datagram_is_too_short(pair: tuple[Receiver, socket.socket]) -> None:
    batch = batch_of(pair, *(struct.pack(">HI", 5, i) + bytes(i) for i in range(5)))
    records = batch.records(HEADER)
    assert type(records) is np.ndarray
    assert records["kind"].tolist() == [5] * 5
    assert records["count"].tolist() == list(range(5))
    assert np.shares_memory(records, batch.data)
    assert batch.records(">u4", offset=2).tolist() == list(range(5))


def test_records_mask_what_is_too_short_and_never_read_past_it(pair: tuple[Receiver, socket.socket]) -> None:
    receiver, _ = pair
    for _ in range(receiver.arenas):  # every arena now has old bytes where the new ones will be too few
        batch_of(pair, b"\xee" * 100, b"\xee" * 100).release()
    batch = batch_of(pair, b"12345", b"123456")
    records = batch.records(HEADER)
    assert isinstance(records, np.ma.MaskedArray)
    assert np.ma.getmaskarray(records["kind"]).tolist() == [True, False]
    assert records.data[0].tobytes() == bytes(6)
    assert records.data[1].tobytes() == b"123456"
    assert np.ma.getmaskarray(batch.records("u1", offset=5)).tolist() == [True, False]
    assert batch.records("u1", offset=4).tolist() == [ord("5")] * 2


def test_records_of_a_train_lie_evenly_or_are_gathered() -> None:
    even = train_of(*(struct.pack(">HI", 7, i) + bytes(50) for i in range(20)))
    assert np.shares_memory(even.records(HEADER), even.data)
    assert even.records(HEADER)["count"].tolist() == list(range(20))
    uneven = train_of(*(struct.pack(">HI", 7, i) + bytes(50 if i < 10 else 20) for i in range(20)))
    assert not np.shares_memory(uneven.records(HEADER), uneven.data)
    assert uneven.records(HEADER)["count"].tolist() == list(range(20))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((object,), TypeError),
        (("(2,)u4",), TypeError),
        (("V0",), ValueError),
        (("u1", -1), ValueError),
        (("u4", sys.maxsize - 1), ValueError),
    ],
)
def test_records_refuse_what_is_no_layout(
    pair: tuple[Receiver, socket.socket], arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    batch = batch_of(pair, b"x")
    with pytest.raises(error):
        batch.records(*arguments)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_packed_puts_all_bytes_in_a_row(pair: tuple[Receiver, socket.socket], kind: type) -> None:
    data, offsets = batch_of(pair, b"abc", b"", b"defg").packed(kind)
    assert data.tobytes() == b"abcdefg"
    assert offsets.tolist() == [0, 3, 3, 7]
    assert offsets.dtype == kind
    assert data.flags.writeable


def test_packed_takes_no_other_offsets(pair: tuple[Receiver, socket.socket]) -> None:
    with pytest.raises(TypeError, match="offsets are int32 or int64, not int16"):
        batch_of(pair, b"x").packed(np.int16)  # type: ignore[arg-type] # that is the test


def test_a_copy_has_every_column_and_holds_no_arena() -> None:
    features = dict.fromkeys(
        ("timestamps", "hardware_timestamps", "destinations", "destination_ports", "tos", "drops"), True
    )
    with (
        Receiver.bind(("::", 0), arenas=1, **features) as receiver,
        socket.socket(type=socket.SOCK_DGRAM) as sock,
    ):
        sock.connect(("127.0.0.1", receiver.address[1]))
        for payload in (b"abc", b"", b"defg"):
            sock.send(payload)
        batch = receiver.recv(5)
        twin = batch.copy()
        assert list(twin.datagrams()) == list(batch.datagrams())
        assert twin.offsets.tolist() == [0, 3, 3]
        for column in ("lengths", "flags", "sources", "destinations", "timestamps", "hardware_timestamps", "tos"):
            assert getattr(twin, column).tobytes() == getattr(batch, column).tobytes(), column
        assert twin.drops == batch.drops == 0
        batch.release()
        for _ in range(3):
            sock.send(b"\xff" * 9)
            receiver.recv(5).release()
        assert [bytes(view) for view, _ in twin] == [b"abc", b"", b"defg"]
        assert receiver.reply(twin, [b"1", b"2", b"3"]) == 3


def test_a_released_batch_refuses_and_its_views_stay(pair: tuple[Receiver, socket.socket]) -> None:
    batch = batch_of(pair, b"kept")
    view, array = batch[0], batch.lengths
    with batch:
        pass
    batch.release()
    assert repr(batch) == "<Batch, released>"
    uses: list[Callable[[], object]] = [
        lambda: len(batch), lambda: batch[0], lambda: batch.data, lambda: list(batch), lambda: batch.source(0),
        lambda: list(batch.datagrams()), lambda: batch.records("u1"), batch.packed, batch.copy, batch.arrow,
        batch.__arrow_c_array__, lambda: batch.drops, batch.__enter__,
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(ValueError, match="the batch has been released"):
            use()
    assert (bytes(view), array.tolist()) == (b"kept", [4])


def test_nobody_makes_a_batch_by_hand() -> None:
    with pytest.raises(TypeError, match=r"batches come from a Receiver, or from Batch\.of"):
        Batch()


def test_a_batch_of_given_payloads_is_like_any_other() -> None:
    sources = endpoints([("192.0.2.1", 1), ("2001:db8::1", 2), ("192.0.2.3", 3)])
    batch = Batch.of([b"abc", bytearray(), memoryview(b"defg")], sources)
    assert list(batch.datagrams()) == [
        (b"abc", ("192.0.2.1", 1)),
        (b"", ("2001:db8::1", 2, 0, 0)),
        (b"defg", ("192.0.2.3", 3)),
    ]
    assert batch.offsets.tolist() == [0, 3, 3]
    assert (batch.timestamps, batch.destinations, batch.tos, batch.drops) == (None, None, None, None)
    assert Batch.of([b"x"]).sources is None
    assert Batch.of([b"x"]).source(0) is None
    assert len(Batch.of([])) == 0
    with pytest.raises(ValueError, match="sources are an array of 1 ENDPOINT"):
        Batch.of([b"x"], sources)


def test_what_a_batch_is_not_for_is_said(pair: tuple[Receiver, socket.socket]) -> None:
    batch = batch_of(pair, b"x")
    with pytest.raises(TypeError, match="a batch has no slices"):
        batch[0:1]  # type: ignore[index] # that is the test
    with pytest.raises(TypeError, match="a Batch cannot be pickled: send list"):
        pickle.dumps(batch)
    with pytest.raises(TypeError, match="records need a dtype"):
        batch.records(None)  # type: ignore[arg-type] # that is the test


def test_a_batch_that_another_thread_releases_meanwhile_is_whole_or_refused() -> None:
    """packed, records, copies and loops on one side, release and the next receive on the other."""
    wrong: list[bytes] = []
    with Receiver.bind(("127.0.0.1", 0), arenas=1) as receiver, Receiver.bind(("127.0.0.1", 0)) as sender:
        uses: list[Callable[[Batch], bytes]] = [
            lambda batch: batch.packed()[0].tobytes(),
            lambda batch: batch.records("S500").tobytes(),
            lambda batch: b"".join(payload for payload, _ in batch.datagrams()),
            lambda batch: b"".join(bytes(view) for view, _ in batch),
            lambda batch: batch.copy().data.tobytes(),
        ]
        for number in range(1500):
            byte = bytes([number % 251 + 1])
            sender.send([byte * 500] * 8, receiver.address)
            batch = receiver.recv(5)
            thread = threading.Thread(target=batch.release)
            thread.start()
            try:
                found = uses[number % len(uses)](batch)
            except ValueError:
                pass  # released before it began, or between two datagrams
            else:
                if found != byte * 4000:
                    wrong.append(found)
            thread.join()
            del batch
    assert not wrong


def test_a_dtype_that_releases_the_batch_while_it_is_asked_for_changes_nothing(
    pair: tuple[Receiver, socket.socket],
) -> None:
    batch = batch_of(pair, b"abcdefgh").copy()

    class Sly:
        @property
        def dtype(self) -> Any:
            batch.release()
            return np.dtype("u4")

    with pytest.raises(ValueError, match="the batch has been released"):
        batch.records(Sly())


def test_leases_and_exports_made_by_hand_hold_nothing(pair: tuple[Receiver, socket.socket]) -> None:
    batch = batch_of(pair, b"x")
    lease, export = type(batch[0].obj), type(batch.arrow())
    with pytest.raises(BufferError):
        memoryview(lease.__new__(lease))
    with pytest.raises(TypeError, match=r"take batch\.arrow"):
        export.__new__(export).__arrow_c_schema__()


def test_an_arena_goes_back_when_the_last_of_many_holders_is_gone(pair: tuple[Receiver, socket.socket]) -> None:
    receiver, sock = pair
    batch = batch_of(pair, b"abcdefgh")
    array = batch.records("u4")
    holders: list[object] = [array, array[:1], batch[0], memoryview(batch[0])[1:], batch.arrow(),
                             batch.__arrow_c_array__(), np.frombuffer(batch[0], "u2").reshape(2, 2).T]  # fmt: skip
    del array
    batch.release()
    random.Random(1).shuffle(holders)
    while holders:
        taken = [batch_of(pair, b"x") for _ in range(receiver.arenas - 1)]
        sock.send(b"y")
        with pytest.raises(BufferError):
            receiver.recv(5)
        del taken
        assert bytes(receiver.recv(5)[0]) == b"y"
        holders.pop()
    gc.collect()
    assert len([batch_of(pair, b"x") for _ in range(receiver.arenas)]) == receiver.arenas
