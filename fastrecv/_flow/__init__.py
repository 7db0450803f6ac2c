"""NetFlow and IPFIX datagrams into columns, in Cython: what would cost a Python object a datagram, or a flow."""

from fastrecv._flow.columns import KINDS, STEP, Columns
from fastrecv._flow.distinct import distinct
from fastrecv._flow.exporters import EXPORTER, MALFORMED, MOST_EXPORTERS, MOST_TEMPLATES, Exporters
from fastrecv._flow.text import ipv4, ipv6, mac
from fastrecv._flow.walk import DONE, FULL, META, MOST_FIELDS, MOST_ROWS, TEMPLATES, Walk

__all__ = [
    "DONE",
    "EXPORTER",
    "FULL",
    "KINDS",
    "MALFORMED",
    "META",
    "MOST_EXPORTERS",
    "MOST_FIELDS",
    "MOST_ROWS",
    "MOST_TEMPLATES",
    "STEP",
    "TEMPLATES",
    "Columns",
    "Exporters",
    "Walk",
    "distinct",
    "ipv4",
    "ipv6",
    "mac",
]
