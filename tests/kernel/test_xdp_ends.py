"""However a process with an XdpReceiver ends, the interface is without a program, and the stack has its port again."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrecv import Receiver, XdpReceiver
from fastrecv.bpf import packaged
from fastrecv.errors import BpfError, XdpError
from fastrecv.interfaces import Interface
from fastrecv.xdp_options import XdpOptions
from tests.kernel.cable import FAR, NEAR, PORT, Cable
from tests.kernel.privileges import CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW, only

pytestmark = pytest.mark.needs("AF_XDP in copy mode")

ROOT = Path(__file__).parents[2]
CHILD = """
import os, sys
from fastrecv import XdpReceiver
receiver = XdpReceiver("near0", int(sys.argv[1]))
print("ready", flush=True)
with receiver:
    for batch in receiver:
        print(bytes(batch[0]).decode(), flush=True)
        if bytes(batch[0]) == b"raise":
            raise RuntimeError("of the service")
        if bytes(batch[0]) == b"leave":
            os._exit(0)
"""


@contextlib.contextmanager
def child() -> Iterator[subprocess.Popen[str]]:
    """A process that receives, in this thread's namespace."""
    command = [sys.executable, "-c", CHILD, str(PORT)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("end", ["SIGKILL", "SIGINT", "SIGTERM", "raise", "leave"])
def test_the_interface_is_without_a_program_afterwards(cable: Cable, end: str) -> None:
    server = cable.server()
    with child() as process:
        assert process.stdout is not None
        assert Interface.named("near0").program
        cable.put(cable.datagram(b"taken"))
        assert process.stdout.readline() == "taken\n"
        if end.startswith("SIG"):
            process.send_signal(signal.Signals[end])
        else:
            cable.put(cable.datagram(end.encode()))
        process.wait(10)
        assert wait_for(lambda: Interface.named("near0").program == 0)
        cable.put(cable.datagram(b"to the stack"))
        assert server.recv(100) == b"to the stack"
    with XdpReceiver("near0", PORT) as receiver:  # nothing of it is in the way
        cable.put(cable.datagram(b"next"))
        assert bytes(receiver.recv(2)[0]) == b"next"


def wait_for(what: object) -> bool:
    """Whether that becomes true within five seconds: the kernel ends a process's sockets and links in its own time."""
    assert callable(what)
    deadline = time.monotonic() + 5
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(what())


def test_a_killed_receiver_under_load_leaves_a_working_interface(cable: Cable) -> None:
    server = cable.server()
    for _ in range(5):
        with child() as process:
            for number in range(500):
                cable.put(cable.datagram(b"%d" % number))
                if number == 250:
                    process.send_signal(signal.SIGKILL)
            process.wait(10)
        assert wait_for(lambda: Interface.named("near0").program == 0)
        server.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                server.recv(100)
        server.settimeout(2)
        cable.put(cable.datagram(b"after"))
        assert server.recv(100) == b"after"


def test_a_start_that_fails_leaves_nothing(cable: Cable) -> None:
    with packaged("swallow") as swallow, swallow.load().programs["swallow"].attach_xdp(cable.index):
        with pytest.raises(OSError, match="has an XDP program already"):
            XdpReceiver("near0", PORT)
        with pytest.raises(OSError, match="has an XDP program already"):
            Receiver.open((NEAR, PORT), backend="xdp")
    with XdpReceiver("near0", PORT) as receiver:
        assert receiver.mode == "copy"


def test_a_forked_child_neither_receives_nor_gives_frames_back(cable: Cable) -> None:
    with XdpReceiver("near0", PORT, ring_size=16, frames=16) as receiver:
        cable.put(cable.datagram(b"parent's"))
        batch = receiver.recv(2)
        pid = os.fork()
        if pid == 0:
            try:
                batch.release()
                with pytest.raises(OSError, match="make another one after a fork"):
                    receiver.recv(0)
                receiver.close()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert receiver.statistics().held == 1
        assert bytes(batch[0]) == b"parent's"
        for number in range(40):
            cable.put(cable.datagram(b"%d" % number))
            assert bytes(receiver.recv(2)[0]) == b"%d" % number
        assert receiver.statistics().kernel.invalid_descriptors == 0


def test_what_it_takes_is_what_it_says(cable: Cable) -> None:
    small = XdpOptions(ring_size=64, frames=64)
    with only(CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW), XdpReceiver("near0", PORT, **small) as receiver:
        cable.put(cable.datagram(b"enough"))
        assert bytes(receiver.recv(2)[0]) == b"enough"
    with only(CAP_BPF, CAP_NET_ADMIN), pytest.raises(XdpError, match="CAP_NET_RAW"):
        XdpReceiver("near0", PORT, **small)
    with only(CAP_NET_RAW), pytest.raises(BpfError, match="CAP_BPF and CAP_NET_ADMIN"):
        XdpReceiver("near0", PORT, **small)
    limits = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, limits[1]))
    try:
        with (
            only(CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW),
            pytest.raises(XdpError, match=r"8,388,608 bytes .* raise RLIMIT_MEMLOCK, or grant CAP_IPC_LOCK"),
        ):
            XdpReceiver("near0", PORT)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, limits)


def test_open_takes_what_can_be_had_and_says_why(cable: Cable) -> None:
    cable.net.link("set", index=1, state="up")
    with Receiver.open((NEAR, PORT)) as receiver:
        assert isinstance(receiver, XdpReceiver)
        assert receiver.reason == "interface near0 has AF_XDP in copy mode"
        cable.put(cable.datagram(b"by xdp"))
        assert list(receiver.recv(2).datagrams()) == [(b"by xdp", (FAR, 4000))]
    with Receiver.open((NEAR, PORT), backend="socket") as receiver:
        assert isinstance(receiver, Receiver)
        cable.put(cable.datagram(b"by socket"))
        assert list(receiver.recv(2).datagrams()) == [(b"by socket", (FAR, 4000))]
    with Receiver.open(("", PORT), interface="near0", backend="xdp", ring_size=64, busy_poll=None) as receiver:
        assert isinstance(receiver, XdpReceiver)
    for address, options, reason in (
        (("", PORT), {}, "every address of the host is asked for, AF_XDP is of one interface: name it"),
        ((NEAR, PORT), {"gro": True}, "AF_XDP has no gro"),
        ((NEAR, PORT), {"interface": "near9"}, "no interface 'near9' here: choose from lo, near0"),
        (("127.0.0.1", PORT), {}, "AF_XDP takes nothing off the loopback interface"),
    ):
        with Receiver.open(address, **options) as receiver:
            assert isinstance(receiver, Receiver)
            assert receiver.reason == reason
    with only(CAP_NET_RAW), Receiver.open((NEAR, PORT)) as receiver:
        assert isinstance(receiver, Receiver)
        assert "CAP_BPF and CAP_NET_ADMIN" in receiver.reason
    with pytest.raises(ValueError, match="backend is 'dpdk': choose auto, socket, xdp"):
        Receiver.open((NEAR, PORT), backend="dpdk")
    with pytest.raises(TypeError, match="gro cannot be had of AF_XDP"):
        Receiver.open((NEAR, PORT), backend="xdp", gro=True)
