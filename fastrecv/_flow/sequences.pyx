"""What is missing between two datagrams of an exporter, by the sequence numbers of their headers.

v5 numbers flows (Cisco, NetFlow Collection Engine User Guide, appendix B), v9 datagrams (RFC 3954, 5.1), IPFIX records:
those sent before the datagram (RFC 7011, 3.1). softflowd 1.1.0 has a habit of its own with IPFIX: it counts the flows of
the datagram itself in, and records of options never. So the first number of one is 0, that of the other its flows. Whoever
is heard later shows it between datagrams of unlike size; a loss may look like the other habit once, so two signs in a row
settle it, and it stays until the exporter begins anew.
"""

from fastrecv._flow.exporters cimport Counts
from libc.stdint cimport int8_t, int64_t, uint32_t, uint64_t

cdef enum:
    _FURTHEST = 1 << 20  # a larger gap between two sequence numbers is an exporter that begins anew
    _ANEW = 4  # and so are so many datagrams that come late and follow one another
    _BEFORE = 2  # a habit: the number counts what was sent before
    _WITHIN = -2  # and flows of the datagram itself; between the two, nothing is settled


cdef void understood(Counts *counts, uint32_t sequence, int64_t records, int64_t flows) noexcept nogil:
    """A datagram was understood to its end. records : in it, -1 where nobody can say; flows : those that are no options.
    """
    if counts.version == 9:
        follow(counts, sequence, 1)
    elif counts.version == 0 or records < 0:  # what stands for many has no sequence
        counts.followed = False
    elif counts.version == 10:
        follow_records(counts, sequence, <uint32_t>records, <uint32_t>flows)
    else:
        follow(counts, sequence, <uint32_t>records)


cdef void not_understood(Counts *counts, uint32_t sequence) noexcept nogil:
    """What a datagram that was not counts in sequence numbers is known of v9 alone."""
    if counts.version == 9:
        follow(counts, sequence, 1)
    else:
        counts.followed = False


cdef void follow_records(Counts *counts, uint32_t sequence, uint32_t records, uint32_t flows) noexcept nogil:
    """The same for IPFIX, whatever the exporter's habit."""
    cdef bint before, within
    if counts.habit > _WITHIN and counts.habit < _BEFORE and not counts.followed:
        if counts.habit == 0 and flows and sequence in (0, flows):  # the latter may be chance: its first may be missing
            counts.habit = _BEFORE if sequence == 0 else -1
    elif counts.habit > _WITHIN and counts.habit < _BEFORE:
        before = sequence == counts.due
        within = flows != 0 and sequence - counts.sequence == flows  # templates alone may just have been overtaken
        if before != within:
            settle(counts, before)
        if counts.habit == _WITHIN:
            counts.due = counts.sequence  # from here on it is the first flow's number that is compared
        elif within or counts.habit < 0:
            counts.due = counts.sequence + flows
    if counts.habit == _WITHIN:
        follow(counts, sequence - flows, flows)
        if counts.habit == 0:  # it has begun anew, and nothing is settled
            counts.sequence, counts.due = sequence, sequence + records
    else:
        follow(counts, sequence, records)


cdef void settle(Counts *counts, bint before) noexcept nogil:
    """One more datagram that only one habit explains: the second in a row settles it."""
    if before:
        counts.habit = <int8_t>(max(<int>counts.habit, 0) + 1)
    else:
        counts.habit = <int8_t>(min(<int>counts.habit, 0) - 1)


cdef void follow(Counts *counts, uint32_t sequence, uint32_t units) noexcept nogil:
    """Compare a sequence number with the one that was due. units : by how much the next one is higher."""
    cdef uint32_t gap = sequence - counts.due
    cdef bint late = counts.followed and gap > <uint32_t>0 - <uint32_t>_FURTHEST
    if late:
        counts.behind = counts.behind + 1 if counts.behind and sequence == counts.late_due else 1
        counts.late_due = sequence + units
        if counts.behind < _ANEW:
            counts.late += 1
            counts.lost -= min(counts.lost, <uint64_t>units)
            return
    elif counts.followed and gap <= _FURTHEST:
        counts.lost += gap
    if counts.followed and gap > _FURTHEST:
        counts.habit = 0  # it may be another program now
    counts.behind = 0
    counts.followed = True
    counts.sequence = sequence
    counts.due = sequence + units
