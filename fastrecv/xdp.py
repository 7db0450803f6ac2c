"""XdpReceiver: batches of datagrams taken off an interface before its stack, by AF_XDP.

What it gives is a Batch like any other, whose rows lie in the memory that the kernel, or the card, has put the frames
into.
"""

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from fastrecv._recv import Batch
from fastrecv.interfaces import Address as IpAddress
from fastrecv.receiver import destinations_of
from fastrecv.receiving import Receiving
from fastrecv.redirect import Redirect
from fastrecv.replies import Buffer
from fastrecv.sockets import Address
from fastrecv.xdp_options import MODES, Reader, XdpOptions, opened
from fastrecv.xdp_sending import Outgoing

if TYPE_CHECKING:
    from fastrecv._xsk import KernelStatistics

__all__ = ["MODES", "XdpReceiver", "XdpStatistics"]


class XdpStatistics(NamedTuple):
    """Counters of an XdpReceiver since it was made.

    batches, datagrams, bytes : received. truncated, control_truncated : 0, nothing is ever cut: what is too long goes
    on to the stack. unanswered : replies that the kernel refused. martian : from an IPv4 address of this
    host, dropped as the stack drops them. bad_checksum : datagrams that were dropped for it.
    unreadable : frames that were not what the program had found; 0 unless there is a defect. held : frames that
    batches, or views of them, hold now. passed : frames that went on to the stack, by reason
    (fastrecv.redirect.PASSED), of the whole interface. kernel : its XDP_STATISTICS; `dropped` are the datagrams that
    were lost for want of a free frame.
    """

    batches: int
    datagrams: int
    bytes: int
    truncated: int
    control_truncated: int
    unanswered: int
    bad_checksum: int
    martian: int
    unreadable: int
    held: int
    passed: dict[str, int]
    kernel: KernelStatistics


class XdpReceiver(Receiving[Reader]):
    """Receives batches of UDP datagrams for some ports of an interface, before its stack sees them.

    XdpReceiver(interface, ports) takes them off every queue until it is closed or its process ends, on whatever way.
    XdpReceiver.of(redirect) receives from some queues only, where each is to have a receiver of its own.

    What cannot be judged here goes on to the stack untouched: fragments, IPv4 options, IPv6 extension headers, nested
    VLANs, other addresses, other ports. Open a socket at a port for what may come that way, or the stack answers that
    nobody is there (ICMP). No firewall, no rp_filter and no socket sees what is taken. A card that removes VLAN tags
    (ethtool: rx-vlan-offload) hides them from XDP: turn that off where VLANs must not be mixed.

    Threads may call recv at once. Takes CAP_NET_RAW for the sockets, CAP_BPF and CAP_NET_ADMIN for the program.
    Linux 5.18.

    Options of both, as keyword arguments
    -------------------------------------
    queues : of the interface to receive from; all unless given. What comes by others goes on to the stack.
    mode : "zero-copy" (the card writes into our memory), "copy" (native XDP and one copy), "generic" (behind the
        driver, for every driver), or "auto", the first of these that works. `mode` says which, `refused` why not the
        others. In generic mode a train that the other end of a veth has left to its card (UDP_SEGMENT, udp(7)) comes as
        one datagram, unless it is longer than the MTU: the program cannot see that it is one.
    batch_size : datagrams of one batch at most, 1 to 1024. 64.
    ring_size : frames that the kernel may fill ahead, a queue; a power of two. 2048.
    frames : how many there are, a queue; what is above ring_size batches may hold without a loss. Twice ring_size. All
        of queues x frames x frame_size is locked memory (RLIMIT_MEMLOCK, or CAP_IPC_LOCK): 8 MiB a queue, unless asked
        otherwise, where the MTU allows frames of 2048 bytes.
    checksums : "verify" drops and counts datagrams whose UDP checksum is wrong; "trust" looks at none, for cards that
        do; "partial" accepts also what a sender on this host has left to its card to finish, and no veth finishes
        (CHECKSUM_PARTIAL, include/linux/skbuff.h). "partial" on a veth, else "verify".
    timestamps : when a datagram was taken from the ring, ns since the epoch. What a driver knows of its arrival
        (bpf_xdp_metadata_rx_timestamp, Linux 6.3) is not asked for: it is told in the card's own clock, which is
        nobody's epoch, binds the program to native mode and one device (BPF_F_XDP_DEV_BOUND_ONLY), and few drivers have
        it; a veth hands on what the sender's skb had, mostly 0 (drivers/net/veth.c).
    tos : type of service or traffic class.
    need_wakeup : the driver sleeps until it is called (XDP_USE_NEED_WAKEUP). True.
    busy_poll, prefer_busy_poll, busy_poll_budget : fastrecv.sockets.busy_poll; each receive drives the card. The last
        two need Linux 5.11.
    """

    def __init__(
        self,
        interface: str,
        ports: int | Iterable[int],
        *,
        addresses: Iterable[str | IpAddress] | None = None,
        queues: Sequence[int] | None = None,
        mode: str = "auto",
        frame_size: int | None = None,
        **options: Unpack[XdpOptions],
    ) -> None:
        """ports, addresses, frame_size : fastrecv.redirect.Redirect; options: XdpReceiver."""
        redirect = Redirect(interface, ports, addresses=addresses, frame_size=frame_size)
        try:
            self._begin(redirect, queues, mode, options, own=True)
        except BaseException:
            redirect.close()
            raise

    @classmethod
    def of(
        cls,
        redirect: Redirect,
        *,
        queues: Sequence[int] | None = None,
        mode: str = "auto",
        **options: Unpack[XdpOptions],
    ) -> Self:
        """A receiver of what `redirect`, which stays its owner's to attach and close, takes off these queues."""
        made = cls.__new__(cls)
        made._begin(redirect, queues, mode, options, own=False)
        return made

    def _begin(
        self, redirect: Redirect, queues: Sequence[int] | None, mode: str, options: XdpOptions, own: bool
    ) -> None:
        self.redirect = redirect
        self._owns = own
        self._last: tuple[int, dict[str, int], KernelStatistics] | None = None
        self._reader, self._umem, self.mode, self.refused = opened(redirect, queues, mode, options, attach=own)
        self._batch_size = options.get("batch_size", 64)
        self._outgoing = Outgoing(redirect, self._umem)

    def recv(self, timeout: float | None = None) -> Batch:
        """Receive what is there, up to batch_size datagrams; see Receiver.recv.

        Raises
        ------
        BufferError : a queue has no frame to receive into: batches, or views of them, hold them; release() or copy()
            some, or give more frames. Meanwhile datagrams are lost, and counted (statistics().kernel).
        OSError : EBADF when the receiver is closed, also meanwhile; ENETDOWN when the interface is gone.

        """
        return self._reader.recv(timeout)

    def send(
        self,
        payloads: Batch | Sequence[Buffer],
        destinations: NDArray[np.void] | np.void | Address | Sequence[Address] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Send datagrams by way of the stack, from the lowest of our ports and an address of the interface.

        payloads, timeout and what is returned: Receiver.send. destinations : one for all or one for each.
        """
        to = destinations_of(destinations)
        if not isinstance(to, np.ndarray):
            raise TypeError("an XdpReceiver is connected to nobody: give destinations, (host, port) each")
        _, wake = self._reader.enter()
        try:
            return self._outgoing.send(wake, payloads, to, timeout)
        finally:
            self._reader.leave()

    def reply(self, batch: Batch, payloads: Batch | Sequence[Buffer | None], timeout: float | None = None) -> int:
        """Answer the senders of `batch`, one payload each (None: no answer); how many were sent.

        Answers leave from the address and port that was asked, by the first queue's ring and to whom the frame came
        from; those that find no room there, or are longer than the MTU, by the stack (a raw socket, CAP_NET_RAW).
        timeout and unanswered: Receiver.reply.
        """
        _, wake = self._reader.enter()
        try:
            return self._outgoing.reply(wake, batch, payloads, timeout)
        finally:
            self._reader.leave()

    def sending_socket(self) -> socket.socket:
        """A copy of the socket that stands for us where one is asked for: bound to nothing, it receives nothing."""
        return self._outgoing.socket.dup()

    def fileno(self) -> int:
        """The descriptor to poll for readability: of an epoll, for all queues."""
        return self._reader.fileno()

    def statistics(self) -> XdpStatistics:
        """Counters, also readable when closed: held, passed and kernel as they were then."""
        reader, (held, passed, kernel) = self._reader, self._last or self._outside()
        return XdpStatistics(
            reader.batches, reader.datagrams, reader.bytes, 0, 0, self._outgoing.unanswered, reader.bad_checksum,
            reader.martian, reader.unreadable, held, dict(passed), kernel,
        )  # fmt: skip

    def _outside(self) -> tuple[int, dict[str, int], KernelStatistics]:
        """What others count: frames that are held, what the program has passed on, the kernel's statistics."""
        passed = self.redirect.outcomes()
        passed.pop("taken")
        return self._umem.held, passed, self._umem.statistics()

    def refresh(self) -> None:
        """Look for addresses and VLANs of the interface anew: fastrecv.redirect.Redirect.refresh."""
        self.redirect.refresh()
        interface = self.redirect.interface
        self._reader.place({0: interface.index, **interface.vlans}, interface.martians())

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def memory(self) -> int:
        """Bytes that are locked for frames."""
        return self._umem.size

    def close(self) -> None:
        """Leave the interface to its stack; from any thread, and more than once. Who waits in recv gets EBADF.

        Batches stay good. What the rings still hold is lost.
        """
        if self.closed:
            return
        self._last = self._outside()
        if self._owns:
            self.redirect.close()
        self._reader.close()
        self._outgoing.close()

    def __del__(self) -> None:
        if hasattr(self, "_outgoing") and not self.closed:  # a constructor may have failed
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        name, ports = self.redirect.interface.name, ", ".join(map(str, sorted(self.redirect.ports)))
        return f"<XdpReceiver on {name} port {ports}, {'closed' if self.closed else self.mode}>"
