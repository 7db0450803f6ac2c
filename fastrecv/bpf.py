"""BPF objects for the rest of fastrecv: the compiled programs that the package carries, and the classes that hold them.

Everything that needs libbpf imports it from here, late: the extension behind it is the only part of fastrecv that links
to libbpf, and its absence is answered with what to install.
"""

from __future__ import annotations

import hashlib
import socket
import struct
from errno import EACCES, EPERM
from importlib.resources import files
from ipaddress import IPv4Address, IPv6Address

from fastrecv.errors import BpfError

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
        Ring,
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
    "Ring",
    "Statistics",
    "TestRun",
    "compiled",
    "digest",
    "link_ids",
    "link_info",
    "packaged",
    "program_info",
    "run_sk_lookup",
    "sk_lookup_links",
    "tracing",
]


_Address = IPv4Address | IPv6Address


def compiled(name: str) -> bytes:
    """What bpf/<name>.bpf.c was compiled to: an ELF file."""
    return files("fastrecv").joinpath("objects", f"{name}.bpf.o").read_bytes()


def digest(name: str) -> str:
    """What tells this version's object from another's."""
    return hashlib.sha256(compiled(name)).hexdigest()[:16]


def packaged(name: str) -> Object:
    """The BPF object compiled from bpf/<name>.bpf.c: opened, not yet loaded."""
    return Object(compiled(name), name)


def tracing(name: str, purpose: str, **variables: object) -> Object:
    """The object compiled from bpf/<name>.bpf.c, whose programs look into the kernel: variables set, loaded.

    PermissionError says that the `purpose` needs CAP_BPF and CAP_PERFMON. Linux with BTF (/sys/kernel/btf/vmlinux).
    """
    opened = packaged(name)
    try:
        opened.set(**variables)
        return opened.load()
    except BaseException as error:
        opened.close()
        if isinstance(error, BpfError) and error.errno in (EPERM, EACCES):
            message = f"{purpose} needs CAP_BPF and CAP_PERFMON: run as root, or grant them"
            raise PermissionError(error.errno, message) from None
        raise


def run_sk_lookup(
    program: Program, protocol: int, source: tuple[_Address, int], destination: tuple[_Address, int]
) -> tuple[int, int]:
    """BPF_PROG_TEST_RUN of an sk_lookup program: its verdict (SK_DROP 0, SK_PASS 1), and a socket's cookie or 0.

    source, destination : (address, port) of the packet. It comes in by no interface: the kernel lets test runs name
    none. Linux 5.13.
    """
    family = socket.AF_INET if destination[0].version == 4 else socket.AF_INET6
    in4, in6 = (4, 0) if family == socket.AF_INET else (0, 16)
    remote, local = source[0].packed, destination[0].packed
    context = struct.pack(  # struct bpf_sk_lookup, include/uapi/linux/bpf.h
        "=QII4s16s2sH4s16sII4x", 0, family, protocol, remote[:in4], remote[:in6], struct.pack("!H", source[1]), 0,
        local[:in4], local[:in6], destination[1], 0,
    )  # fmt: skip
    run = program.run(context=context)
    return run.verdict, int(struct.unpack_from("=Q", run.context)[0])


def sk_lookup_links() -> dict[int, LinkInfo]:
    """All sk_lookup links on the host, of every process and namespace, by id. CAP_SYS_ADMIN."""
    found = {}
    for number in link_ids():
        info = link_info(number)
        if info is not None and info.type == LINK_NETNS and info.attach_type == SK_LOOKUP:
            found[number] = info
    return found
