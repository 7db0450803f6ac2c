"""BPF objects for the rest of fastrecv: the compiled programs that the package carries, and the classes that hold them.

Everything that needs libbpf imports it from here, late: the extension behind it is the only part of fastrecv that links
to libbpf, and its absence is answered with what to install.
"""

from __future__ import annotations

from importlib.resources import files

try:
    from fastrecv._bpf import (
        LIBBPF_VERSION,
        LINK_NETNS,
        SK_LOOKUP,
        Link,
        LinkInfo,
        Map,
        Object,
        Program,
        ProgramInfo,
        Statistics,
        TestRun,
        link_ids,
        link_info,
        program_info,
    )
except ImportError as error:
    raise ImportError(
        f"fastrecv's BPF part cannot be loaded ({error}): install libbpf 1.1 or newer (Debian: apt install libbpf1); "
        "in a git checkout run `make setup`",
        name="fastrecv._bpf",
    ) from error

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
    "Statistics",
    "TestRun",
    "compiled",
    "link_ids",
    "link_info",
    "packaged",
    "program_info",
    "sk_lookup_links",
]


def compiled(name: str) -> bytes:
    """What bpf/<name>.bpf.c was compiled to: an ELF file."""
    return files("fastrecv").joinpath("objects", f"{name}.bpf.o").read_bytes()


def packaged(name: str) -> Object:
    """The BPF object compiled from bpf/<name>.bpf.c: opened, not yet loaded."""
    return Object(compiled(name), name)


def sk_lookup_links() -> dict[int, LinkInfo]:
    """All sk_lookup links on the host, of every process and namespace, by id. CAP_SYS_ADMIN."""
    found = {}
    for number in link_ids():
        info = link_info(number)
        if info is not None and info.type == LINK_NETNS and info.attach_type == SK_LOOKUP:
            found[number] = info
    return found
