"""The exceptions of fastrecv that the kernel or the state of the host is the cause of: OSErrors that say what to do."""

from __future__ import annotations

import errno

__all__ = ["BpfError", "NotSupported", "SinkFull", "SocketRefusedError", "StateError", "XdpError"]


class BpfError(OSError):
    """A call into libbpf or bpf(2) failed.

    Attributes: errno; strerror, which says what was tried, why it failed and what to do; log, all that libbpf and
    the kernel's verifier printed during the call ("" when they were silent).
    """

    def __init__(self, errno: int, message: str, log: str = "") -> None:
        super().__init__(errno, message)
        self.log = log

    def __str__(self) -> str:
        return str(self.strerror)


class NotSupported(OSError):  # noqa: N818 - names a state of the host, not a mistake of the caller
    """The kernel or the privileges at hand cannot do this.

    Attributes: feature, a name in fastrecv.features.FEATURES; requires (e.g. "Linux 5.9", "CAP_NET_ADMIN"); reason,
    what is wrong or would mend it; errno.
    """

    def __init__(self, feature: str, requires: str, errno: int, reason: str) -> None:
        super().__init__(errno, f"{feature} not available: {reason} (needs {requires})")
        self.feature = feature
        self.requires = requires
        self.reason = reason

    def __str__(self) -> str:
        return str(self.strerror)


class StateError(OSError):
    """What is loaded on this host does not allow what was asked; the message says why and what to do."""


class SinkFull(OSError):  # noqa: N818 - names a state of the sink, not a mistake of the caller
    """A sink had no room before its patience ended, and has taken nothing of what was given; the message says why."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOBUFS, message)

    def __str__(self) -> str:
        return str(self.strerror)


class SocketRefusedError(OSError):
    """A socket cannot be what it was given for; the message says why and, where there is one, the cure."""


class XdpError(OSError):
    """AF_XDP, or an interface, refused something; the message says what was tried, why it failed and what to do."""

    def __str__(self) -> str:
        return str(self.strerror)
