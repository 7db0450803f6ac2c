"""The one door to libbpf; nothing else in fastrecv calls libbpf or bpf(2).

The GIL is released around whatever loads, attaches, runs, or goes through many entries. Privileges: CAP_BPF and
CAP_NET_ADMIN (or root) to load and attach, CAP_SYS_ADMIN to enumerate. Linux 5.9 for sk_lookup, 5.18 for live test
runs.
"""

from fastrecv._bpf.handle import LIBBPF_VERSION
from fastrecv._bpf.links import (
    LINK_NETNS,
    SK_LOOKUP,
    Link,
    LinkInfo,
    ProgramInfo,
    Statistics,
    link_ids,
    link_info,
    program_info,
)
from fastrecv._bpf.maps import Map
from fastrecv._bpf.objects import Object, Program, TestRun
from fastrecv._bpf.rings import Ring

__all__ = [
    "LIBBPF_VERSION",
    "LINK_NETNS",
    "SK_LOOKUP",
    "Link",
    "LinkInfo",
    "Map",
    "Object",
    "Program",
    "ProgramInfo",
    "Ring",
    "Statistics",
    "TestRun",
    "link_ids",
    "link_info",
    "program_info",
]
