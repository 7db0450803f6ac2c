"""A balancer without privileges: the policies of fastrecv.policies in classic BPF, for an ordinary user's own group.

    members = [...]                                  # of one reuseport group, bound; TCP listens
    Filter(Policy("source"), len(members)).attach(members[0])

It differs from fastrecv.balance (each seen on Linux 6.18, tests/kernel/test_classic_guards.py):

- Members are numbers in the order in which they joined the group (UDP by bind, TCP by listen). When one leaves, the
  last takes its number: let groups shrink from the highest number on, and attach a Filter of the new size.
- The hash is another, of 32 bits, so a sender's number here is not his slot there.
- By modulo only: a change of size moves nearly all senders. There are no weights, no slots, and no drains.
- A number that no member has goes by the kernel's hash, so nobody is refused and nobody told. Nothing is counted.
- A load that fails gives 0. So lengths are looked at first: a packet that is too short for its key goes by its source.
- The program is the group's. Any member's user attaches and detaches it, and neither this nor the balancer's program
  sees which one it replaces: for a group that has a Balancer, ask the Balancer.
- Attach after bind(), TCP after listen(): a group of one's own is a second group on that address, and the kernel
  refuses it (EADDRINUSE).
- Connections that wait in a listener that closes are lost, or go by the kernel's hash (net.ipv4.tcp_migrate_req).
- No "quic" and no mapped prefixes. Instead, what the kernel knows of a packet, each number modulo the size:
  "interface" (its index), "mark" (SO_MARK, or netfilter's), "protocol" (0x0800 and 0x86dd: even and odd), "queue" (a
  device's receive queues count from 1, skb_record_rx_queue; over veth it is the sender's, from 0), "rxhash" (0 where
  nobody made one: neither the device nor RPS, nor for a packet of this host its socket) and "vlan" (the tag; the kernel
  has taken it off before it looks for a socket, so 0: the interface tells VLANs apart).
- Ports of IPv6 packets count as 0 behind extension headers. A reassembled packet is like any other.
- A train of datagrams that GRO or UDP_SEGMENT made goes as a whole where its first datagram goes.

What a Fast Open SYN carries is its payload (RFC 7413); other SYNs have none, and go by source where the key is one of
bytes. A SYN cookie's ACK is looked up like a SYN, by what it carries itself.
"""

from fastrecv.classic.filter import MAX_SIZE, Filter
from fastrecv.classic.instructions import Instruction, disassembled

__all__ = ["MAX_SIZE", "Filter", "Instruction", "disassembled"]
