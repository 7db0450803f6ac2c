"""AF_XDP is optional: without libxdp everything else works, and asking for it says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastrecv

ABSENT = """
import sys
sys.modules["fastrecv._xsk"] = None
import fastrecv
from fastrecv import Receiver, features
with Receiver.open(("127.0.0.1", 0)) as receiver:
    print(receiver.reason)
try:
    fastrecv.XdpReceiver
except ImportError as error:
    print(error)
"""


def test_without_libxdp_the_socket_is_there_and_the_cure_is_named() -> None:
    reason, raised = run(ABSENT)
    assert reason == raised
    assert "install libxdp 1.2 or newer (Debian: libxdp1)" in raised
    assert "apt install libxdp-dev and build again" in raised


SERVICE = """
import logging, sys
sys.modules["fastrecv._xsk"] = None
from fastrecv.workers.settings import Settings
from fastrecv.workers.taking import Taking
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
log = logging.getLogger("service")
print(Taking.begin(Settings(handler="a:b", bind="192.0.2.1:53", backend="auto"), 1, log))
try:
    Taking.begin(Settings(handler="a:b", bind="192.0.2.1:53", backend="xdp"), 1, log)
except OSError as error:
    print(error)
"""


def test_a_service_without_libxdp_has_its_sockets_and_is_told_the_cure_where_it_wants_no_others() -> None:
    logged, none, raised = run(SERVICE)
    assert none == "None"
    assert logged == f"datagrams come by sockets alone: {raised}"
    assert "install libxdp 1.2 or newer (Debian: libxdp1)" in raised


def test_the_receive_core_does_not_load_libxdp() -> None:
    command = "import fastrecv, sys; print([name for name in sys.modules if 'xsk' in name or '_bpf' in name])"
    assert run(command) == ["[]"]


def run(script: str) -> list[str]:
    """The lines that it prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fastrecv' has no attribute 'Nothing'"):
        _ = fastrecv.Nothing
