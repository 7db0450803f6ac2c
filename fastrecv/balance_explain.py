"""Who of a balanced group gets a sender, and why: by the tables in force and the program's hash, without any packet."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from fastrecv import buckets
from fastrecv.balance import SLOTS, Balancer
from fastrecv.policies import Sender

__all__ = ["Explanation", "explain"]

_UNKNOWN = -1


class Explanation(NamedTuple):
    """slot : whose the sender is; None where no slot has him, or where nobody can say beforehand.

    taker : the slot whose socket gets his packets, another one where `slot` is empty; None where they are dropped, or
    the kernel decides. socket : its cookie. bucket : None where chance decides. reason : a sentence.
    """

    slot: int | None
    taker: int | None
    socket: int | None
    bucket: int | None
    reason: str


def explain(balancer: Balancer, sender: Sender) -> Explanation:
    """Needs no more than to read the balancer. Says what the program would do, not whether it is attached."""
    bucket = balancer.policy.bucket(sender)
    slot, reason = _home(balancer, sender, bucket)
    if slot == _UNKNOWN:
        return Explanation(None, None, None, None, reason)
    sockets = balancer.sockets()
    own = slot if slot < SLOTS else None
    if slot in sockets:
        return Explanation(own, slot, sockets[slot], bucket, f"{reason}, which has socket sk:{sockets[slot]:x}")
    reason = f"{reason}, which has no socket" if own is not None else reason
    if balancer.empty == "kernel":
        return Explanation(own, None, None, bucket, f"{reason}: the kernel's hash decides")
    others = sockets.keys() & balancer.weights.keys()
    if balancer.empty == "drop" or not others:
        return Explanation(own, None, None, bucket, f"{reason}: dropped")
    taker = min(others, key=lambda other: (other - slot - 1) % SLOTS)
    more = f"{reason}: the next is slot {taker}, with socket sk:{sockets[taker]:x}"
    return Explanation(own, taker, sockets[taker], bucket, more)


def _home(balancer: Balancer, sender: Sender, bucket: int | None) -> tuple[int, str]:
    """The slot of a sender, SLOTS where none has him, and how he comes to it."""
    policy = balancer.policy
    if policy.mapped is not None:
        address = _plain(sender.source if policy.mapped == "source" else sender.destination)
        fitting = [prefix for prefix in balancer.places() if prefix.version == address.version and address in prefix]
        if fitting:
            longest = max(fitting, key=lambda prefix: prefix.prefixlen)
            slot = balancer.places()[longest]
            return slot, f"its {policy.mapped} is in {longest}, placed in slot {slot}"
    if bucket is None:
        return _UNKNOWN, {"random": "every packet goes where chance sends it"}.get(
            policy.key, "it goes by the CPU that takes the packet, which was not given"
        )
    if balancer.leaving.slots():
        home = balancer.leaving.home(policy.hash(sender))
        if home is not None:
            return home, f"it is known in slot {home}, which is being drained"
    found = int(balancer.maps.table()[bucket])
    by = f"by {policy}"
    if policy.key in ("payload", "quic") and policy.key_of(sender.payload) is None:
        by = f"by source, since its payload has no {policy},"
    if found == buckets.EMPTY:
        return SLOTS, f"{by} it is in bucket {bucket}, which no slot has"
    return found, f"{by} it is in bucket {bucket} of slot {found}"


def _plain(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
