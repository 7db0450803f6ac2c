"""What the kernel says about a network interface: rtnetlink(7) and ethtool, with nothing to install.

Of the calling thread's network namespace. Needs no privilege.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from errno import ENODEV, EOPNOTSUPP
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Self

from fastrecv.errors import XdpError

__all__ = ["Address", "Interface"]

Address = IPv4Address | IPv6Address

# include/uapi/linux: netlink.h, rtnetlink.h, if_link.h, if_addr.h
_REQUEST, _DUMP, _ERROR, _DONE = 0x001, 0x300, 2, 3
_GETLINK, _GETADDR = 18, 22
_IFLA_ADDRESS, _IFLA_MTU, _IFLA_LINK, _IFLA_LINKINFO, _IFLA_NUM_RX_QUEUES, _IFLA_XDP = 1, 4, 5, 18, 32, 43
_INFO_KIND, _INFO_DATA, _VLAN_ID, _VLAN_PROTOCOL = 1, 2, 1, 5
_XDP_PROG_ID = 4
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_HEADER, _LINK, _ADDR, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BxHiII"), struct.Struct("=BBBBI"), 4
_8021Q = 0x8100
_NESTED = 0x7FFF  # NLA_TYPE_MASK leaves this of an attribute's type

_SIOCETHTOOL, _GCHANNELS = 0x8946, 0x3C  # include/uapi/linux/sockios.h, ethtool.h
_CHANNELS = struct.Struct("=9I")

_Attributes = dict[int, bytes]


@dataclass(frozen=True)
class Interface:
    """One interface as it was when it was asked for.

    index; mac : 6 bytes; mtu : bytes of an IP packet; queues : it receives by; kind : of a virtual device ("veth",
    "vlan", ...), else ""; program : the id of an XDP program that is attached, 0 for none; vlans : the interfaces on
    top of it with an 802.1Q tag, by its number.
    """

    name: str
    index: int
    mac: bytes
    mtu: int
    queues: int
    kind: str
    program: int
    vlans: dict[int, int]

    @classmethod
    def named(cls, name: str) -> Self:
        """The interface of this name; XdpError (ENODEV) where there is none."""
        links = dict(_links())
        try:
            index = socket.if_nametoindex(name)
            link = links[index]
        except (OSError, KeyError):
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise XdpError(ENODEV, f"no interface {name!r} here: choose from {known}") from None
        info = _attributes(link.get(_IFLA_LINKINFO, b""))
        vlans = {}
        for other, attributes in links.items():
            number = _vlan(attributes)
            if number is not None and _number(attributes.get(_IFLA_LINK)) == index:
                vlans[number] = other
        return cls(
            name, index, link.get(_IFLA_ADDRESS, b""), _number(link.get(_IFLA_MTU)),
            _channels(name) or _number(link.get(_IFLA_NUM_RX_QUEUES)) or 1, _text(info.get(_INFO_KIND)),
            _number(_attributes(link.get(_IFLA_XDP, b"")).get(_XDP_PROG_ID)), vlans,
        )  # fmt: skip

    def addresses(self) -> set[tuple[Address, int]]:
        """Its addresses, and those of its VLANs: (address, number of the VLAN), 0 for its own."""
        numbers = {self.index: 0, **{index: number for number, index in self.vlans.items()}}
        return {(address, numbers[index]) for index, address in _addresses() if index in numbers}

    @staticmethod
    def martians() -> set[IPv4Address]:
        """IPv4 addresses that no packet may come from: those of the host itself (RFC 1812, 5.3.7)."""
        return {own for _, own in _addresses() if isinstance(own, IPv4Address)}


def _addresses() -> Iterator[tuple[int, Address]]:
    """(index of the interface, address) of all interfaces."""
    for message in _dump(_GETADDR, _ADDR.pack(0, 0, 0, 0, 0)):
        *_, index = _ADDR.unpack_from(message)
        attributes = _attributes(message[_ADDR.size :])
        # IFA_ADDRESS is the peer's, where there is one
        packed = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS))
        if packed is not None:
            yield index, ip_address(packed)


def _links() -> Iterator[tuple[int, _Attributes]]:
    for message in _dump(_GETLINK, _LINK.pack(0, 0, 0, 0, 0)):
        _, _, index, _, _ = _LINK.unpack_from(message)
        yield index, _attributes(message[_LINK.size :])


def _dump(kind: int, request: bytes) -> Iterator[bytes]:
    """The messages, without their headers, that answer a request for all of a kind."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as rtnetlink:
        rtnetlink.send(_HEADER.pack(_HEADER.size + len(request), kind, _REQUEST | _DUMP, 1, 0) + request)
        while True:
            data = rtnetlink.recv(1 << 17)
            while data:
                length, answer, _, _, _ = _HEADER.unpack_from(data)
                if answer == _DONE:
                    return
                if answer == _ERROR:
                    code = -struct.unpack_from("=i", data, _HEADER.size)[0]
                    raise XdpError(code, f"asking the kernel for its interfaces: {os.strerror(code)}")
                yield data[_HEADER.size : length]
                data = data[(length + 3) & ~3 :]


def _attributes(data: bytes) -> _Attributes:
    found = {}
    while len(data) >= _ATTRIBUTE:
        length, kind = struct.unpack_from("=HH", data)
        found[kind & _NESTED] = data[_ATTRIBUTE:length]
        data = data[(length + 3) & ~3 :]
    return found


def _vlan(link: _Attributes) -> int | None:
    """The number of an 802.1Q device, else None."""
    info = _attributes(link.get(_IFLA_LINKINFO, b""))
    if _text(info.get(_INFO_KIND)) != "vlan":
        return None
    data = _attributes(info.get(_INFO_DATA, b""))
    if data.get(_VLAN_PROTOCOL) != struct.pack("!H", _8021Q):
        return None
    return int(struct.unpack("=H", data[_VLAN_ID])[0])


def _number(value: bytes | None) -> int:
    return int(struct.unpack("=I", value)[0]) if value else 0


def _text(value: bytes | None) -> str:
    return (value or b"").rstrip(b"\0").decode()


def _channels(name: str) -> int:
    """Queues that are in use, rx and combined: ETHTOOL_GCHANNELS, ethtool(8); 0 where the driver does not say."""
    channels = ctypes.create_string_buffer(_CHANNELS.pack(_GCHANNELS, *[0] * 8))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            fcntl.ioctl(sock, _SIOCETHTOOL, struct.pack("16s P", name.encode(), ctypes.addressof(channels)))
        except OSError as error:
            if error.errno != EOPNOTSUPP:
                raise
            return 0
    _, _, _, _, _, receive, _, _, combined = _CHANNELS.unpack(channels.raw[: _CHANNELS.size])
    return int(receive + combined)
