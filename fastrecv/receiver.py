"""Receiver: what the author of a service holds."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from fastrecv import sockets
from fastrecv._recv import MAX_BATCH, MAX_SLOT, Batch, Reader, send
from fastrecv.options import FAMILIES, Features, Options, apply, columns_of, refuse_unknown, reports_errors
from fastrecv.receiving import Receiving
from fastrecv.replies import Buffer, Replier
from fastrecv.sockets import Address

if TYPE_CHECKING:
    from fastrecv.xdp import XdpReceiver

__all__ = ["Receiver", "Statistics", "destinations_of"]

_MAX_ARENAS = 1 << 20
_MAX_BUFFER = (1 << 30) - 1  # INT_MAX / 2: the kernel doubles it


class Statistics(NamedTuple):
    """Counters of a Receiver since it was made. unanswered : replies that the kernel refused."""

    batches: int
    datagrams: int
    bytes: int
    truncated: int
    control_truncated: int
    unanswered: int


class Receiver(Receiving[Reader]):
    """Receives batches of datagrams from one socket: UDP over IPv4, IPv6 or both, or AF_UNIX.

    Receiver(sock) works on a socket that is open already and stays its owner's: the Receiver has a descriptor of its
    own for it, so closing one never closes the other. Receiver.bind(address) opens the socket, and closes it.

    Threads may call recv at once; each gets batches of its own. close() wakes them. Needs no privilege.

    Options of both, as keyword arguments
    -------------------------------------
    batch_size : datagrams (with gro: trains of them) of one batch at most, 1 to 1024 (UIO_MAXIOV, recvmmsg(2)). 64.
    slot_size : bytes kept of a datagram at most. 65535, which truncates no UDP datagram; memory is only touched where
        datagrams lie. With gro it is never less.
    arenas : for how many batches there is memory from the start. 4.
    max_arenas : for how many there may ever be, those included; as many as `arenas` unless given.
    timestamps, hardware_timestamps, destinations, destination_ports, tos, drops, gro : fastrecv.options.Features;
        each is a bool, and off.
    """

    def __init__(
        self,
        sock: socket.socket,
        /,
        *,
        batch_size: int = 64,
        slot_size: int = 65535,
        arenas: int = 4,
        max_arenas: int | None = None,
        **features: Unpack[Features],
    ) -> None:
        """Receive from `sock`; options: Receiver."""
        if not isinstance(sock, socket.socket):
            raise TypeError(f"Receiver takes an open socket, not {sock!r}: Receiver.bind(address) opens one")
        if sock.type != socket.SOCK_DGRAM or sock.family not in FAMILIES:
            raise ValueError(f"a Receiver needs a UDP or AF_UNIX datagram socket, not {sock!r}")
        refuse_unknown(features)
        max_arenas = arenas if max_arenas is None else max_arenas
        _within("batch_size", batch_size, 1, MAX_BATCH)
        _within("slot_size", slot_size, 1, MAX_SLOT)
        _within("arenas", arenas, 1, _MAX_ARENAS)
        _within("max_arenas", max_arenas, arenas, _MAX_ARENAS)
        on, room = apply(sock, {feature for feature, value in features.items() if value})
        self.features = frozenset(on)
        self._path: tuple[int, int, int] | None = None  # process, device and inode of a path that is ours to remove
        self.socket = sock.dup()
        try:
            self._replier = Replier(self.socket, bool(on & {"destinations", "destination_ports"}))
            lost = sockets.drops(self.socket) if "drops" in on else -1
            self._reader = Reader(self.socket.fileno(), sock.family, batch_size, slot_size, arenas, max_arenas,
                                  room, columns_of(on), "gro" in on, reports_errors(sock), lost)  # fmt: skip
        except BaseException:
            self.socket.close()
            raise

    @classmethod
    def bind(
        cls,
        address: Address,
        /,
        *,
        reuse_port: bool = False,
        dual_stack: bool = True,
        receive_buffer: int | None = None,
        busy_poll: int | None = None,
        prefer_busy_poll: bool = False,
        busy_poll_budget: int | None = None,
        incoming_cpu: int | None = None,
        **options: Unpack[Options],
    ) -> Self:
        """A Receiver on a socket of its own, bound to (host, port) or to the path of an AF_UNIX socket.

        The arguments up to incoming_cpu are those of open_datagram, grow_receive_buffer, busy_poll and incoming_cpu in
        fastrecv.sockets; options: Receiver. Hosts are numeric. Without CAP_NET_ADMIN the kernel cuts receive_buffer to
        sysctl net.core.rmem_max: Receiver.receive_buffer says what it has become.
        """
        if busy_poll is None and (prefer_busy_poll or busy_poll_budget is not None):
            raise ValueError("prefer_busy_poll and busy_poll_budget need busy_poll: give its microseconds")
        if receive_buffer is not None:
            _within("receive_buffer", receive_buffer, 1, _MAX_BUFFER)
        for name, value in (("busy_poll", busy_poll), ("busy_poll_budget", busy_poll_budget)):
            if value is not None:
                _within(name, value, 0, (1 << 16) - 1)
        if incoming_cpu is not None:
            _within("incoming_cpu", incoming_cpu, 0, (os.cpu_count() or 1) - 1)
        sock = sockets.open_datagram(address, reuse_port=reuse_port, dual_stack=dual_stack)
        try:
            if receive_buffer is not None:
                sockets.grow_receive_buffer(sock, receive_buffer)
            if busy_poll is not None:
                sockets.busy_poll(sock, busy_poll, prefer=prefer_busy_poll, budget=busy_poll_budget)
            if incoming_cpu is not None:
                sockets.incoming_cpu(sock, incoming_cpu)
            made = cls(sock, **options)
        except BaseException:
            sockets.remove_path(sock, sockets.path_of(sock))
            sock.close()
            raise
        if sock.family == socket.AF_UNIX:
            made._path = sockets.path_of(sock)
        sock.close()  # the Receiver has its own descriptor
        return made

    @staticmethod
    def open(
        address: Address, /, *, backend: str = "auto", interface: str | None = None, **options: Any
    ) -> Receiver | XdpReceiver:
        """A receiver of what is sent to (host, port): Receiver.bind(address), or a fastrecv.XdpReceiver.

        backend : "socket", "xdp", or "auto": AF_XDP where the interface's driver, the privileges at hand and libxdp
        allow it and the options do not speak against it, else the socket. `reason` of what is returned says why. Past a
        firewall and rp_filter goes only the former. interface : its name; by default the one that has the host's
        address. options : those of both, and those of the one that is meant; "auto" gives each its own.
        """
        from fastrecv.choosing import chosen  # noqa: PLC0415 - it knows both receivers

        return chosen(address, backend, interface, options)

    def recv(self, timeout: float | None = None) -> Batch:
        """Receive what is queued, up to batch_size datagrams (trains, with GRO), with one recvmmsg(2).

        timeout : seconds; None waits for ever, 0 does not wait.
        Returns a Batch; an empty one only when the time was over. The GIL is released while waiting and receiving.
        Signal handlers run at once where the signal finds this thread waiting, within a second otherwise.

        Raises
        ------
        BufferError : every arena is held by batches, or views of them; copy() or release() one, or raise max_arenas.
        OSError : the socket failed, and errno says how: ECONNREFUSED on a connected socket whose peer is not there
            (what is queued comes with the next recv); EBADF when the Receiver is closed, also meanwhile.

        """
        return self._reader.recv(timeout)

    def send(
        self,
        payloads: Batch | Sequence[Buffer],
        destinations: NDArray[np.void] | np.void | Address | Sequence[Address] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Send datagrams with sendmmsg(2), in order; how many were sent.

        payloads : bytes-like objects, or a batch. destinations : one address for all or one for each, as addresses
        or as an array like Batch.sources; None on a connected socket. timeout : seconds to wait for room in the send
        buffer, None for ever; when they are over, what is sent is the answer. So it is when the kernel refuses one;
        its OSError is raised when that is the first. Runs of equal datagrams to one peer leave as one train
        (UDP_SEGMENT, Linux 4.18).
        """
        to = destinations_of(destinations)
        fd, wake = self._reader.enter()
        try:
            sent, _, code = send(fd, payloads, to, timeout=timeout, wake=wake)
        finally:
            self._reader.leave()
        if code and not sent:
            raise OSError(code, f"sending: {os.strerror(code)}")
        return sent

    def reply(self, batch: Batch, payloads: Batch | Sequence[Buffer | None], timeout: float | None = None) -> int:
        """Answer the senders of `batch`, one payload each (None: no answer); how many were sent.

        Answers leave from the address, and port, that the datagram was sent to. A socket bound to every address needs
        `destinations` for that; any-port steering `destination_ports`, and CAP_NET_RAW or the right to bind to those
        ports. An answer that the kernel refuses is counted (Statistics.unanswered) and the others go on; so is one to
        an AF_UNIX peer whose queue is full.
        """
        fd, wake = self._reader.enter()
        try:
            return self._replier.reply(fd, wake, batch, payloads, timeout)
        finally:
            self._reader.leave()

    def fileno(self) -> int:
        """The descriptor to poll for readability."""
        return self._reader.fileno()

    def statistics(self) -> Statistics:
        """Counters, also readable when closed: fastrecv.Statistics."""
        reader = self._reader
        return Statistics(reader.batches, reader.datagrams, reader.bytes, reader.truncated, reader.control_truncated,
                          self._replier.unanswered)  # fmt: skip

    def _open(self) -> socket.socket:
        self._reader.fileno()  # says so where the Receiver is closed
        return self.socket

    @property
    def drops(self) -> int:
        """Datagrams the socket has lost so far because its queue was full: fastrecv.sockets.drops."""
        return sockets.drops(self._open())

    @property
    def address(self) -> Any:
        """What the socket is bound to, as socket.getsockname says it."""
        return self._open().getsockname()

    @property
    def receive_buffer(self) -> int:
        """Bytes that may be queued: fastrecv.sockets.receive_buffer."""
        return sockets.receive_buffer(self._open())

    @property
    def batch_size(self) -> int:
        return self._reader.batch_size

    @property
    def slot_size(self) -> int:
        """Bytes kept of a datagram at most."""
        return self._reader.slot_size

    @property
    def arenas(self) -> int:
        """How many arenas there are now; grows up to max_arenas."""
        return self._reader.arenas

    def join(self, group: str, *, interface: str | int | None = None, source: str | None = None) -> None:
        """Receive a multicast group: fastrecv.sockets.join."""
        sockets.join(self._open(), group, interface=interface, source=source)

    def leave(self, group: str, *, interface: str | int | None = None, source: str | None = None) -> None:
        """Undo `join` with the same arguments."""
        sockets.leave(self._open(), group, interface=interface, source=source)

    def close(self) -> None:
        """Stop receiving; from any thread, and more than once. Who waits in recv is woken and gets EBADF.

        A socket that the Receiver has opened is closed, with what is still queued in it. Batches stay good.
        """
        self._reader.close()
        self._replier.close()
        if self.socket.fileno() >= 0:
            sockets.remove_path(self.socket, self._path)
            self.socket.close()

    def __del__(self) -> None:
        if hasattr(self, "_reader") and not self.closed:  # a constructor may have failed
            warnings.warn(f"unclosed Receiver on {self.socket!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<Receiver {'closed' if self.closed else f'on {self.address}'}>"


def _within(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}: give {low:,} to {high:,}")


def destinations_of(
    given: NDArray[np.void] | np.void | Address | Sequence[Address] | None,
) -> NDArray[np.void] | list[bytes] | None:
    """What _recv.send takes: an array of ENDPOINT, a list of paths, or None."""
    if given is None or isinstance(given, np.ndarray):
        return given
    if isinstance(given, np.void):
        return np.array([given], given.dtype)
    paths = (str, bytes, os.PathLike)
    # ("192.0.2.1", 53) is one address, (("192.0.2.1", 53), ...) are several.
    one = isinstance(given, paths) or (isinstance(given, tuple) and len(given) > 1 and isinstance(given[1], int))
    addresses: Any = [given] if one else given
    if all(isinstance(address, paths) for address in addresses):
        return [os.fsencode(path) for path in addresses]
    for address in addresses:
        if not isinstance(address, tuple):
            raise TypeError(f"{address!r} is no socket address: give (host, port) tuples, or paths, for all")
    return sockets.endpoints(addresses)
