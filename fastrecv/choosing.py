"""Which receiver an address gets: by AF_XDP where that can be had, else by a socket; and why."""

from __future__ import annotations

import logging
import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeVar

from fastrecv.interfaces import Address as IpAddress
from fastrecv.interfaces import Interface
from fastrecv.receiver import Receiver
from fastrecv.sockets import Address

if TYPE_CHECKING:
    from fastrecv.xdp import XdpReceiver

__all__ = ["BACKENDS", "chosen", "interface_of"]

R = TypeVar("R", "Receiver", "XdpReceiver")

log = logging.getLogger("fastrecv")

BACKENDS = ("auto", "socket", "xdp")
_OF_XDP = {"queues", "mode", "ring_size", "frames", "frame_size", "checksums", "need_wakeup"}
_OF_BOTH = {"batch_size", "timestamps", "tos", "busy_poll", "prefer_busy_poll", "busy_poll_budget"}
_ALWAYS = {"destinations", "destination_ports"}  # an XdpReceiver says them unasked


def chosen(address: Address, backend: str, interface: str | None, options: dict[str, Any]) -> Receiver | XdpReceiver:
    """Receiver.open."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose {', '.join(BACKENDS)}")
    by_xdp = {name: value for name, value in options.items() if name in _OF_XDP | _OF_BOTH and value is not None}
    by_socket = {name: value for name, value in options.items() if name not in _OF_XDP}
    if backend == "socket":
        return _because(Receiver.bind(address, **options), "it was asked for")
    if backend == "xdp":
        if others := [name for name, value in options.items() if name not in _OF_XDP | _OF_BOTH | _ALWAYS and value]:
            raise TypeError(f"{', '.join(others)} cannot be had of AF_XDP: leave it out, or choose backend='socket'")
        return _because(_open(address, interface, by_xdp), "it was asked for")
    if others := [name for name, value in by_socket.items() if name not in _OF_BOTH | _ALWAYS and value]:
        return _because(Receiver.bind(address, **by_socket), f"AF_XDP has no {', '.join(others)}")
    try:
        made = _open(address, interface, by_xdp)
    except (ImportError, OSError) as error:
        return _because(Receiver.bind(address, **by_socket), str(error))
    if made.mode != "generic" or options.get("mode") == "generic":
        return _because(made, f"interface {made.redirect.interface.name} has AF_XDP in {made.mode} mode")
    made.close()
    return _because(Receiver.bind(address, **by_socket), f"only generic XDP can be had: {made.refused['copy']}")


def _because(receiver: R, reason: str) -> R:
    receiver.reason = reason
    log.info("%r: %s", receiver, reason)
    return receiver


def _open(address: Address, interface: str | None, options: dict[str, Any]) -> XdpReceiver:
    """OSError, ImportError where that cannot be; ValueError where the caller has to say more."""
    from fastrecv.xdp import XdpReceiver  # noqa: PLC0415 - the receive core works without libxdp

    if not isinstance(address, tuple) or len(address) < 2 or not address[1]:
        raise OSError(f"AF_XDP takes (host, port) with a port, not {address!r}")
    host = ip_address(address[0] or "0.0.0.0")  # noqa: S104 - as Receiver.bind reads it
    name = interface or interface_of(host)
    return XdpReceiver(name, address[1], addresses=None if host.is_unspecified else [host], **options)


def interface_of(host: IpAddress) -> str:
    """The name of the interface that has an address. OSError where AF_XDP cannot take what comes for it."""
    if host.is_unspecified:
        raise OSError("every address of the host is asked for, AF_XDP is of one interface: name it")
    if host.is_loopback:
        raise OSError("AF_XDP takes nothing off the loopback interface")
    for _, name in socket.if_nameindex():
        if any(address == host for address, _ in Interface.named(name).addresses()):
            return name
    raise OSError(f"no interface has the address {host}")
