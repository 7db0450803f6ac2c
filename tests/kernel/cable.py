"""Two private namespaces with ordinary stacks, joined by a veth; and frames, made by hand, for one end to send.

far namespace                     near namespace
far0  192.0.2.2, 2001:db8::2 ---- near0  192.0.2.1, 2001:db8::1
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD

from fastrecv.netns import Namespace
from fastrecv.xdp import XdpReceiver

NEAR, FAR = "192.0.2.1", "192.0.2.2"
NEAR6, FAR6 = "2001:db8::1", "2001:db8::2"
VLAN, VLAN_NEAR, VLAN_FAR = 7, "198.51.100.1", "198.51.100.2"
PORT = 2055


class Cable:
    """mac, far_mac : of the two ends. index : of near0."""

    def __init__(self, undo: contextlib.ExitStack, queues: int = 1) -> None:
        self._undo = undo
        self.near, self.far = (undo.enter_context(contextlib.closing(Namespace())) for _ in range(2))
        for namespace in (self.near, self.far):
            with namespace:
                Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0\n")
                Path("/proc/sys/net/ipv6/conf/default/router_solicitations").write_text("0\n")
        with self.far:
            far_net = undo.enter_context(IPRoute())
        with self.near:
            net = undo.enter_context(IPRoute())
            net.link("add", ifname="near0", kind="veth", num_rx_queues=queues, num_tx_queues=queues,
                     peer={"ifname": "far0", "net_ns_fd": self.far.fd, "num_rx_queues": queues,
                           "num_tx_queues": queues})  # fmt: skip
        self.net, self.far_net = net, far_net
        self.index, self.mac = up(net, "near0", NEAR, NEAR6)
        self.far_index, self.far_mac = up(far_net, "far0", FAR, FAR6)
        for family, address in ((socket.AF_INET, NEAR), (socket.AF_INET6, NEAR6)):
            far_net.neigh("add", family=family, dst=address, lladdr=self.mac.hex(":"), ifindex=self.far_index,
                          state="permanent")  # fmt: skip
        for family, address in ((socket.AF_INET, FAR), (socket.AF_INET6, FAR6)):
            net.neigh("add", family=family, dst=address, lladdr=self.far_mac.hex(":"), ifindex=self.index,
                      state="permanent")  # fmt: skip
        with self.far:
            self._packets = undo.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
            self._packets.bind(("far0", 0))

    def put(self, frame: bytes) -> None:
        """Send a frame as it is."""
        self._packets.send(frame)

    def client(self, host: str = NEAR, port: int = PORT) -> socket.socket:
        """A socket at the far end, connected; it waits two seconds."""
        with self.far:
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self._undo.enter_context(sock)
        sock.settimeout(2)
        sock.connect((host, port))
        return sock

    def server(self, host: str = NEAR, port: int = PORT) -> socket.socket:
        """A socket of the near stack."""
        with self.near:
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self._undo.enter_context(sock)
        sock.settimeout(2)
        sock.bind((host, port))
        return sock

    def offload(self, on: bool) -> None:
        """Whether the far end leaves checksums to the card: ETHTOOL_STXCSUM, include/uapi/linux/ethtool.h."""
        value = ctypes.create_string_buffer(struct.pack("II", 0x17, on))
        with self.far, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, 0x8946, struct.pack("16sP", b"far0", ctypes.addressof(value)))

    def datagram(
        self, payload: bytes, source: str = FAR, port: int = PORT, to: str = "", sender: int = 4000, tags: bytes = b""
    ) -> bytes:
        """A frame from far to near with one UDP datagram, all checksums right. tags : between addresses and type."""
        to = to or (NEAR6 if ":" in source else NEAR)
        return self.ethernet(packet(source, to, udp(source, to, sender, port, payload)), tags)

    def ethernet(self, packet: bytes, tags: bytes = b"") -> bytes:
        kind = b"\x86\xdd" if packet[:1] and packet[0] >> 4 == 6 else b"\x08\x00"
        return self.mac + self.far_mac + tags + kind + packet


def up(net: IPRoute, name: str, *addresses: str) -> tuple[int, bytes]:
    """Give a device its addresses and set it up; its index and Ethernet address."""
    (link,) = net.get_links(ifname=name)
    for address in addresses:
        six = ":" in address
        net.addr("add", index=link["index"], address=address, prefixlen=64 if six else 24,
                 flags=IFA_F_NODAD if six else 0)  # fmt: skip
    net.link("set", index=link["index"], state="up")
    return link["index"], bytes.fromhex(link.get("address").replace(":", ""))


def udp(source: str, to: str, sender: int, port: int, payload: bytes, length: int | None = None) -> bytes:
    header = struct.pack("!HHHH", sender, port, 8 + len(payload) if length is None else length, 0)
    pseudo = ip_address(source).packed + ip_address(to).packed + struct.pack("!HH", 17, 8 + len(payload))
    sum_ = checksum(pseudo + header + payload) or 0xFFFF
    return header[:6] + struct.pack("!H", sum_) + payload


def packet(source: str, to: str, body: bytes, protocol: int = 17, fragment: int = 0, options: bytes = b"") -> bytes:
    """An IP packet; fragment : of IPv4, flags and offset."""
    here, there = ip_address(source).packed, ip_address(to).packed
    if ":" in source:
        return struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + here + there + body
    size = 20 + len(options)
    header = struct.pack("!BBHHHBBH", 4 << 4 | size // 4, 0, size + len(body), 1, fragment, 64, protocol, 0)
    header += here + there + options
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + body


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += bytes(len(data) & 1)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def payloads(receiver: XdpReceiver, count: int) -> list[bytes]:
    """Of the next `count` datagrams; fails when they do not come."""
    found: list[bytes] = []
    while len(found) < count:
        batch = receiver.recv(2)
        assert len(batch), f"{len(found)} of {count} datagrams came"
        found += [data for data, _ in batch.datagrams()]
    assert not len(receiver.recv(0))
    return found


@contextlib.contextmanager
def laid(queues: int = 1) -> Iterator[Cable]:
    with contextlib.ExitStack() as undo:
        yield Cable(undo, queues)
