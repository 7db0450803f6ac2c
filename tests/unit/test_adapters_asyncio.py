"""The asyncio adapter keeps the contract of loop.create_datagram_endpoint: the same tests run against that one, too."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop

from fastrecv import Batch, Receiver
from fastrecv.adapters.asyncio import create_datagram_endpoint

Run = Callable[[Coroutine[Any, Any, None]], None]
Create = Callable[..., Awaitable[tuple[Any, Any]]]


async def reference(*arguments: Any, **options: Any) -> tuple[Any, Any]:
    return await asyncio.get_running_loop().create_datagram_endpoint(*arguments, **options)


LOOPS = {"asyncio": asyncio.run, "uvloop": uvloop.run}
# Python 3.11.2 has no pause_reading for its own datagram endpoints, 3.11.7 has.
OWN_PAUSES = (
    asyncio.selector_events._SelectorDatagramTransport.pause_reading  # type: ignore[attr-defined] # not in typeshed
    is not asyncio.ReadTransport.pause_reading
)


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine on one of the loops; a test hangs for ten seconds at most."""
    loop_run: Any = LOOPS[request.param]
    return lambda coroutine: loop_run(asyncio.wait_for(coroutine, 10))


@pytest.fixture(params=["asyncio-own", "asyncio-fastrecv", "uvloop-fastrecv"])
def endpoint(request: pytest.FixtureRequest) -> tuple[Run, Create]:
    """What runs a coroutine, and what makes endpoints in it: asyncio's own as the reference, and ours on both loops."""
    loop, _, whose = request.param.partition("-")
    loop_run: Any = LOOPS[loop]
    create: Create = reference if whose == "own" else create_datagram_endpoint
    return lambda coroutine: loop_run(asyncio.wait_for(coroutine, 10)), create


class Notes(asyncio.DatagramProtocol):
    """Notes every call, and does what the test wants when a datagram comes."""

    def __init__(self, act: Callable[[Notes, bytes, Any], None] | None = None) -> None:
        self.transport: Any = None
        self.calls: list[str] = []
        self.received: list[tuple[bytes, Any]] = []
        self.errors: list[Exception] = []
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.act = act

    def connection_made(self, transport: Any) -> None:
        self.calls.append("made")
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.append((data, addr))
        if self.act is not None:
            self.act(self, data, addr)

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append("lost")
        self.lost.set_result(exc)

    @property
    def payloads(self) -> list[bytes]:
        return [data for data, _ in self.received]


class Batches(Notes):
    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Batch] = []

    def datagrams_received(self, batch: Batch) -> None:
        self.batches.append(batch)


def echo(protocol: Notes, data: bytes, address: Any) -> None:
    protocol.transport.sendto(data, address)


@asynccontextmanager
async def opened(create: Create, factory: Callable[[], Any] = Notes, **options: Any) -> AsyncIterator[tuple[Any, Any]]:
    """An endpoint, on a free port of localhost where nothing else is said, and closed with all that is due."""
    if not options.keys() & {"sock", "remote_addr", "local_addr", "family"}:
        options["local_addr"] = ("127.0.0.1", 0)
    transport, protocol = await create(factory, **options)
    try:
        yield transport, protocol
    finally:
        if not protocol.lost.done():
            transport.abort()
        await protocol.lost


def peer(to: Any = None, family: int = socket.AF_INET) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if family != socket.AF_UNIX:
        sock.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
    sock.settimeout(5)
    if to is not None:
        sock.connect(to)
    return sock


def queue(transport: Any, *payloads: bytes) -> None:
    """Datagrams that are all queued in the kernel before the loop looks."""
    with peer(transport.get_extra_info("sockname")) as sock:
        for payload in payloads:
            sock.send(payload)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def came(protocol: Notes, count: int) -> None:
    await until(lambda: len(protocol.received) == count)


def reports() -> list[dict[str, Any]]:
    """What the loop's exception handler is told from now on."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    return told


NUMBERED = [b"%d" % number for number in range(100)]


def test_datagrams_come_in_order_with_their_senders(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint

    async def check() -> None:
        async with opened(create, partial(Notes, echo)) as (transport, protocol):
            with peer(transport.get_extra_info("sockname")) as sock:
                for payload in NUMBERED:
                    sock.send(payload)
                await came(protocol, 100)
                assert protocol.received == [(payload, sock.getsockname()) for payload in NUMBERED]
                assert [sock.recv(9) for _ in NUMBERED] == NUMBERED
        assert protocol.calls == ["made", "lost"]
        assert protocol.errors == []

    run(check())


def test_ipv6(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint

    async def check() -> None:
        async with opened(create, partial(Notes, echo), local_addr=("::1", 0)) as (transport, protocol):
            with peer(transport.get_extra_info("sockname"), socket.AF_INET6) as sock:
                for payload in (b"one", b"two"):
                    sock.send(payload)
                await came(protocol, 2)
                assert protocol.received == [(b"one", sock.getsockname()), (b"two", sock.getsockname())]
                assert [sock.recv(9), sock.recv(9)] == [b"one", b"two"]

    run(check())


@pytest.mark.parametrize("abstract", [False, True])
def test_unix(endpoint: tuple[Run, Create], tmp_path: Path, abstract: bool) -> None:
    run, create = endpoint
    here = str(tmp_path / "here")
    there = b"\0" + str(tmp_path).encode() if abstract else str(tmp_path / "there")

    async def check() -> None:
        for _ in range(2):  # the second finds the path of the first
            async with opened(create, partial(Notes, echo), local_addr=here, family=socket.AF_UNIX) as (_, protocol):
                with peer(here, socket.AF_UNIX) as nameless, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                    sock.bind(there)
                    sock.settimeout(5)
                    for payload in (b"one", b"two"):
                        sock.sendto(payload, here)
                    await came(protocol, 2)
                    assert protocol.received == [(b"one", there), (b"two", there)]
                    assert [sock.recv(9), sock.recv(9)] == [b"one", b"two"]
                    protocol.act = None
                    nameless.send(b"who?")
                    await came(protocol, 3)
                    assert protocol.received[2] == (b"who?", None)
            if isinstance(there, str):
                Path(there).unlink()

    run(check())


def test_unix_datagrams_may_be_larger_than_those_of_udp(endpoint: tuple[Run, Create], tmp_path: Path) -> None:
    run, create = endpoint

    async def check() -> None:
        path = str(tmp_path / "here")
        async with opened(create, local_addr=path, family=socket.AF_UNIX) as (_, protocol):
            with peer(path, socket.AF_UNIX) as sock:
                sock.send(b"x" * 100_000)
                await came(protocol, 1)
                assert protocol.payloads == [b"x" * 100_000]

    run(check())


def test_a_connected_endpoint_talks_to_its_peer_only(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint

    async def check() -> None:
        with peer() as sock, peer() as stranger:
            async with opened(create, remote_addr=sock.getsockname()) as (transport, protocol):
                assert transport.get_extra_info("peername") == sock.getsockname()
                transport.sendto(b"one")
                transport.sendto(b"two", sock.getsockname())
                assert [sock.recv(9), sock.recv(9)] == [b"one", b"two"]
                with pytest.raises(ValueError, match="Invalid address"):
                    transport.sendto(b"three", stranger.getsockname())
                stranger.sendto(b"intruder", transport.get_extra_info("sockname"))
                sock.sendto(b"answer", transport.get_extra_info("sockname"))
                await until(lambda: protocol.received)
                assert protocol.received == [(b"answer", sock.getsockname())]

    run(check())


def test_a_connected_pair_without_names(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint

    async def check() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with theirs:
            async with opened(create, sock=ours) as (_, protocol):
                theirs.send(b"one")
                await until(lambda: protocol.received)
                assert protocol.payloads == [b"one"]

    run(check())


def test_a_socket_that_is_given(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint

    async def check() -> None:
        sock = peer()
        async with opened(create, sock=sock) as (transport, protocol):
            assert sock.gettimeout() == 0
            assert transport.get_extra_info("socket").fileno() == sock.fileno()
            queue(transport, b"one")
            await until(lambda: protocol.received)
        assert sock.fileno() == -1

    run(check())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, "unexpected address family"),
        ({"local_addr": "127.0.0.1"}, TypeError, "2-tuple is expected"),
        ({"local_addr": ("127.0.0.1", 0), "remote_addr": ("::1", 9)}, ValueError, "can not get address information"),
        ({"local_addr": (b"x", 0), "family": socket.AF_UNIX}, TypeError, "string is expected"),
        ({"local_addr": ("192.0.2.1", 0)}, OSError, "[Cc]annot assign"),
    ],
)
def test_what_cannot_be_opened_is_refused(
    endpoint: tuple[Run, Create], options: Any, error: type[Exception], match: str
) -> None:
    run, create = endpoint

    async def check() -> None:
        with pytest.raises(error, match=match):
            await create(Notes, **options)

    run(check())


def test_a_socket_is_refused_with_what_would_change_it(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint

    async def check() -> None:
        with peer() as sock, socket.socket() as stream:
            with pytest.raises(ValueError, match=r"can not be used when sock is specified. \(reuse_port=True\)"):
                await create(Notes, sock=sock, reuse_port=True)
            with pytest.raises(ValueError, match="A UDP Socket was expected"):
                await create(Notes, sock=stream)

    run(check())


def test_a_port_can_be_shared(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint

    async def check() -> None:
        async with opened(create, local_addr=("127.0.0.1", 0), reuse_port=True) as (transport, _):
            address = transport.get_extra_info("sockname")
            async with opened(create, local_addr=address, reuse_port=True):
                pass
            with pytest.raises(OSError, match="in use"):
                await create(Notes, local_addr=address)

    run(check())


def test_broadcast_stays_unconnected(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint

    async def check() -> None:
        with peer() as sock:
            async with opened(create, remote_addr=sock.getsockname(), allow_broadcast=True) as (transport, _):
                assert transport.get_extra_info("peername") is None
                assert transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)
                transport.sendto(b"one")
                assert sock.recv(9) == b"one"

    run(check())


def test_only_bytes_are_sent(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint

    async def check() -> None:
        with peer() as sock:
            async with opened(create) as (transport, _):
                for wrong in ("text", 5, None):
                    with pytest.raises(TypeError, match="bytes-like"):
                        transport.sendto(wrong, sock.getsockname())
                for right in (b"one", bytearray(b"one"), memoryview(b"one")):
                    transport.sendto(right, sock.getsockname())
                    assert sock.recv(9) == b"one"

    run(check())


def test_empty_datagrams_come_and_go(run: Run) -> None:
    async def check() -> None:
        async with opened(create_datagram_endpoint, partial(Notes, echo)) as (transport, protocol):
            with peer(transport.get_extra_info("sockname")) as sock:
                for payload in (b"", b"x", b""):
                    sock.send(payload)
                await came(protocol, 3)
                transport.sendto(b"", sock.getsockname())
                assert [sock.recv(9) for _ in range(4)] == [b"", b"x", b"", b""]

    run(check())


def test_nobody_listening_is_an_error_received(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint

    async def check() -> None:
        with peer() as sock:
            nowhere = sock.getsockname()
        async with opened(create, remote_addr=nowhere) as (transport, protocol):
            transport.sendto(b"one")
            await until(lambda: protocol.errors)
            assert [type(error) for error in protocol.errors] == [ConnectionRefusedError]
            assert not transport.is_closing()

    run(check())


def test_an_error_of_sending_is_an_error_received(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint

    async def check() -> None:
        with peer() as sock:
            async with opened(create) as (transport, protocol):
                transport.sendto(bytes(70000), sock.getsockname())
                transport.sendto(b"one", sock.getsockname())
                assert sock.recv(9) == b"one"
                assert [error.errno for error in protocol.errors] == [errno.EMSGSIZE]

    run(check())


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_replies_keep_their_order_and_one_that_fails_stops_no_other(
    endpoint: tuple[Run, Create], family: socket.AddressFamily
) -> None:
    run, create = endpoint
    host, name = ("127.0.0.1", "localhost") if family == socket.AF_INET else ("::1", "::1")

    def act(protocol: Notes, data: bytes, address: Any) -> None:
        if data == b"7":
            protocol.transport.sendto(bytes(70000), address)
        protocol.transport.sendto(data, (name, address[1]) if data == b"20" else address)
        if data == b"50":
            for number in range(300):
                protocol.transport.sendto(b"more %d" % number, address)

    async def check() -> None:
        async with opened(create, partial(Notes, act), local_addr=(host, 0)) as (transport, protocol):
            with peer(transport.get_extra_info("sockname"), family) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
                for payload in NUMBERED:
                    sock.send(payload)
                await came(protocol, 100)
                await asyncio.sleep(0)
                more = [b"more %d" % number for number in range(300)]
                wanted = [*NUMBERED[:51], *more, *NUMBERED[51:]]
                assert [sock.recv(9) for _ in wanted] == wanted
                assert [error.errno for error in protocol.errors] == [errno.EMSGSIZE]

    run(check())


def test_the_replies_to_a_batch_leave_together(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    send = Receiver.send

    def counted(self: Receiver, payloads: Any, *arguments: Any) -> int:
        sizes.append(len(payloads))
        return send(self, payloads, *arguments)

    monkeypatch.setattr(Receiver, "send", counted)

    async def check() -> None:
        async with opened(create_datagram_endpoint, partial(Notes, echo)) as (transport, protocol):
            queue(transport, *NUMBERED)
            await came(protocol, 100)
        assert sizes == [64, 36]

    run(check())


def test_a_callback_that_fails_loses_no_datagram(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint

    def act(protocol: Notes, data: bytes, address: Any) -> None:
        echo(protocol, data, address)
        if data == b"7":
            raise ZeroDivisionError
        if data == b"8":
            raise asyncio.CancelledError

    async def check() -> None:
        told = reports()
        async with opened(create, partial(Notes, act)) as (transport, protocol):
            with peer(transport.get_extra_info("sockname")) as sock:
                for payload in NUMBERED:
                    sock.send(payload)
                await came(protocol, 100)
                assert [sock.recv(9) for _ in NUMBERED] == NUMBERED
            assert [type(context["exception"]) for context in told] == [ZeroDivisionError, asyncio.CancelledError]
            assert not transport.is_closing()

    run(check())


def test_a_callback_that_ends_the_loop_leaves_the_rest_for_the_next_run(endpoint: tuple[Run, Create]) -> None:
    _, create = endpoint

    def act(_: Notes, data: bytes, __: Any) -> None:
        if data == b"7":
            raise KeyboardInterrupt

    loop = asyncio.new_event_loop()
    transport, protocol = loop.run_until_complete(create(lambda: Notes(act), local_addr=("127.0.0.1", 0)))
    queue(transport, *NUMBERED)
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(asyncio.wait_for(came(protocol, 100), 5))
    assert protocol.payloads == NUMBERED[:8]
    loop.run_until_complete(asyncio.wait_for(came(protocol, 100), 5))
    assert protocol.payloads == NUMBERED
    transport.close()
    loop.run_until_complete(protocol.lost)
    cancel_all(loop)


def cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
        loop.run_until_complete(asyncio.wait([task]))
    loop.close()


def test_pausing_holds_back_what_was_read_and_resuming_delivers_it(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint
    if create is reference and not OWN_PAUSES:
        pytest.skip("this Python's own datagram endpoints cannot pause")

    def act(protocol: Notes, data: bytes, _: Any) -> None:
        if data in (b"7", b"8", b"99"):
            protocol.transport.pause_reading()

    async def check() -> None:
        async with opened(create, partial(Notes, act)) as (transport, protocol):
            queue(transport, *NUMBERED)
            for held in (8, 9, 100):
                await came(protocol, held)
                await asyncio.sleep(0.02)
                assert protocol.payloads == NUMBERED[:held]
                assert not transport.is_reading()
                transport.resume_reading()
                assert transport.is_reading()
            queue(transport, b"last")
            await came(protocol, 101)
            assert protocol.payloads == [*NUMBERED, b"last"]

    run(check())


def test_pausing_and_resuming_in_one_callback_changes_nothing(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint
    if create is reference and not OWN_PAUSES:
        pytest.skip("this Python's own datagram endpoints cannot pause")

    def act(protocol: Notes, _: bytes, __: Any) -> None:
        protocol.transport.pause_reading()
        protocol.transport.resume_reading()

    async def check() -> None:
        async with opened(create, partial(Notes, act)) as (transport, protocol):
            queue(transport, *NUMBERED)
            await came(protocol, 100)
            assert protocol.payloads == NUMBERED

    run(check())


@pytest.mark.parametrize("way", ["close", "abort"])
def test_nothing_is_delivered_after_the_end(endpoint: tuple[Run, Create], way: str) -> None:
    run, create = endpoint

    def act(protocol: Notes, data: bytes, address: Any) -> None:
        echo(protocol, data, address)
        if data == b"7":
            getattr(protocol.transport, way)()
            assert protocol.transport.is_closing()

    async def check() -> None:
        async with opened(create, partial(Notes, act)) as (transport, protocol):
            with peer(transport.get_extra_info("sockname")) as sock:
                for payload in NUMBERED:
                    sock.send(payload)
                assert await protocol.lost is None
                assert protocol.payloads == NUMBERED[:8]
                assert [sock.recv(9) for _ in range(8)] == NUMBERED[:8]
            assert protocol.calls == ["made", "lost"]

    run(check())


def test_another_protocol_takes_over(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint

    async def check() -> None:
        async with opened(create) as (transport, first):
            second = Notes(lambda protocol, *_: transport.set_protocol(first))
            transport.set_protocol(second)
            assert transport.get_protocol() is second
            queue(transport, b"one", b"two", b"three")
            await until(lambda: len(first.received) == 2)
            assert (second.payloads, first.payloads) == ([b"one"], [b"two", b"three"])

    run(check())


@asynccontextmanager
async def full(create: Create, path: str) -> AsyncIterator[tuple[Any, Any, socket.socket, int]]:
    """An endpoint whose peer reads nothing, so that everything from the `sent`-th datagram on is buffered."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.setblocking(False)
        async with opened(create, remote_addr=path, family=socket.AF_UNIX) as (transport, protocol):
            sent = 0
            while transport.get_write_buffer_size() == 0:
                transport.sendto(b"%d" % sent)
                sent += 1
            yield transport, protocol, sock, sent


async def drained(sock: socket.socket, count: int) -> list[bytes]:
    got: list[bytes] = []
    while len(got) < count:
        try:
            got.append(sock.recv(99))
        except BlockingIOError:
            await asyncio.sleep(0.002)
    return got


def test_what_finds_no_room_is_buffered_and_leaves_in_order(endpoint: tuple[Run, Create], tmp_path: Path) -> None:
    run, create = endpoint

    async def check() -> None:
        async with full(create, str(tmp_path / "x")) as (transport, protocol, sock, sent):
            transport.set_write_buffer_limits(high=100)
            changing = bytearray(b"before")
            transport.sendto(changing)
            changing[:] = b"behind"
            assert "pause" not in protocol.calls
            transport.sendto(bytes(99))
            transport.sendto(b"last")
            assert protocol.calls == ["made", "pause"]
            got = await drained(sock, sent + 3)
            assert got == [*(b"%d" % number for number in range(sent)), b"before", bytes(99), b"last"]
            await until(lambda: transport.get_write_buffer_size() == 0)
            assert protocol.calls == ["made", "pause", "resume"]
            transport.sendto(b"again")
            assert await drained(sock, 1) == [b"again"]

    run(check())


def test_what_is_buffered_for_a_peer_that_goes_is_errors_received(endpoint: tuple[Run, Create], tmp_path: Path) -> None:
    run, create = endpoint

    async def check() -> None:
        async with full(create, str(tmp_path / "x")) as (transport, protocol, sock, _):
            for _ in range(4):
                transport.sendto(b"more")
            sock.close()
            await until(lambda: transport.get_write_buffer_size() == 0)
            assert [error.errno for error in protocol.errors] == [errno.ECONNREFUSED, *4 * [errno.ENOTCONN]]
            assert not transport.is_closing()

    run(check())


def test_a_protocol_that_closes_when_it_may_write_again_is_lost_once(run: Run, tmp_path: Path) -> None:
    class Closing(Notes):
        def resume_writing(self) -> None:
            super().resume_writing()
            self.transport.close()

    async def check() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(str(tmp_path / "x"))
            sock.setblocking(False)
            options = {"remote_addr": str(tmp_path / "x"), "family": socket.AF_UNIX}
            async with opened(create_datagram_endpoint, Closing, **options) as (transport, protocol):
                transport.set_write_buffer_limits(high=0)
                sent = 0
                while "pause" not in protocol.calls:
                    transport.sendto(b"more")
                    sent += 1
                await drained(sock, sent)
                assert await protocol.lost is None
                await asyncio.sleep(0.01)
                assert protocol.calls == ["made", "pause", "resume", "lost"]

    run(check())


def test_closing_sends_what_is_buffered_first(endpoint: tuple[Run, Create], tmp_path: Path) -> None:
    run, create = endpoint

    async def check() -> None:
        async with full(create, str(tmp_path / "x")) as (transport, protocol, sock, sent):
            transport.sendto(b"last")
            transport.close()
            transport.close()
            await asyncio.sleep(0.02)
            assert protocol.calls == ["made"]
            assert (await drained(sock, sent + 1))[-2:] == [b"%d" % (sent - 1), b"last"]
            assert await protocol.lost is None

    run(check())


def test_aborting_drops_what_is_buffered(endpoint: tuple[Run, Create], tmp_path: Path) -> None:
    run, create = endpoint

    async def check() -> None:
        async with full(create, str(tmp_path / "x")) as (transport, protocol, sock, sent):
            transport.abort()
            assert await protocol.lost is None
            assert len(await drained(sock, sent - 1)) == sent - 1
            with pytest.raises(BlockingIOError):
                sock.recv(9)

    run(check())


def test_replies_that_find_no_room_are_buffered_too(endpoint: tuple[Run, Create], tmp_path: Path) -> None:
    run, create = endpoint

    def act(protocol: Notes, _: bytes, __: Any) -> None:
        for number in range(1000):
            protocol.transport.sendto(b"%d" % number)

    async def check() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(str(tmp_path / "peer"))
            sock.setblocking(False)
            options = {"local_addr": str(tmp_path / "here"), "remote_addr": str(tmp_path / "peer")}
            async with opened(create, partial(Notes, act), family=socket.AF_UNIX, **options) as (transport, protocol):
                transport.set_write_buffer_limits(high=100)
                sock.sendto(b"go", str(tmp_path / "here"))
                await until(lambda: "pause" in protocol.calls)
                assert await drained(sock, 1000) == [b"%d" % number for number in range(1000)]
                await until(lambda: "resume" in protocol.calls)

    run(check())


def test_a_mistaken_address_is_fatal(endpoint: tuple[Run, Create]) -> None:
    run, create = endpoint

    async def check() -> None:
        told = reports()
        async with opened(create) as (transport, protocol):
            transport.sendto(b"one", 5)
            assert isinstance(await protocol.lost, TypeError)
        assert [context["message"] for context in told] == ["Fatal write error on datagram transport"]

    run(check())


def test_sending_after_the_end_is_harmless(run: Run) -> None:
    async def check() -> None:
        async with opened(create_datagram_endpoint) as (transport, protocol):
            transport.close()
            for _ in range(10):
                transport.sendto(b"late", ("127.0.0.1", 9))
            await protocol.lost
            transport.sendto(b"late", ("127.0.0.1", 9))
            transport.pause_reading()
            transport.resume_reading()
            transport.close()
            transport.abort()
        assert protocol.calls == ["made", "lost"]
        assert "closed" in repr(transport)

    run(check())


def test_who_forgets_to_close_is_warned(run: Run) -> None:
    async def check() -> None:
        transport, _ = await create_datagram_endpoint(Notes, local_addr=("127.0.0.1", 0))
        transport.pause_reading()  # the loop lets go of it
        await asyncio.sleep(0)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run(check())
        gc.collect()
    assert "unclosed transport" in {str(warning.message).partition(" <")[0] for warning in told}


def test_a_protocol_may_take_whole_batches_and_keep_them(run: Run) -> None:
    async def check() -> None:
        async with opened(create_datagram_endpoint, Batches) as (transport, protocol):
            queue(transport, *NUMBERED)
            await until(lambda: sum(map(len, protocol.batches)) == 100)
            assert [len(batch) for batch in protocol.batches] == [64, 36]
            assert [data for batch in protocol.batches for data, _ in batch.datagrams()] == NUMBERED
            assert protocol.received == []

    run(check())


def test_a_protocol_that_holds_all_batches_is_told_once_and_loses_nothing(run: Run) -> None:
    async def check() -> None:
        told = reports()
        async with opened(create_datagram_endpoint, Batches, batch_size=10, arenas=2) as (transport, protocol):
            queue(transport, *NUMBERED)
            await until(lambda: told)
            await asyncio.sleep(0.05)
            transport.pause_reading()
            transport.resume_reading()
            await asyncio.sleep(0.05)
            assert len(protocol.batches) == 2
            got: list[bytes] = []
            while len(got) < 100:
                await until(lambda: protocol.batches)
                with protocol.batches.pop(0) as batch:
                    got += [data for data, _ in batch.datagrams()]
                del batch
            assert got == NUMBERED
        messages = {context["message"] for context in told}
        assert messages == {"The protocol holds all batches: reading waits until it releases or copies one"}
        assert isinstance(told[0]["exception"], BufferError)

    run(check())


def test_options_reach_the_receiver_and_it_can_be_had(run: Run) -> None:
    async def check() -> None:
        async with opened(create_datagram_endpoint, batch_size=7, timestamps=True) as (transport, _):
            receiver = transport.get_extra_info("receiver")
            assert isinstance(receiver, Receiver)
            assert (receiver.batch_size, set(receiver.features)) == (7, {"timestamps"})
        assert receiver.closed
        with pytest.raises(TypeError, match="no option 'nonsense'"):
            await create_datagram_endpoint(Notes, local_addr=("127.0.0.1", 0), nonsense=True)  # type: ignore[call-arg]

    run(check())


def test_a_receiver_that_is_closed_under_the_transport_ends_it(run: Run) -> None:
    async def check() -> None:
        async with opened(create_datagram_endpoint) as (transport, protocol):
            transport.get_extra_info("receiver").close()
            queue(transport, b"one")
            error = await protocol.lost
            assert isinstance(error, OSError)
            assert error.errno == errno.EBADF

    run(check())


def test_a_factory_that_fails_leaves_nothing_open(run: Run) -> None:
    def factory() -> Notes:
        raise ZeroDivisionError

    async def check() -> None:
        with pytest.raises(ZeroDivisionError):
            await create_datagram_endpoint(factory, local_addr=("127.0.0.1", 0))

    run(check())
    gc.collect()  # what is open would warn, which is an error
