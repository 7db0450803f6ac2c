"""What the README shows first does what it says."""

from __future__ import annotations

import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()


PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_service_in_ten_lines_serves() -> None:
    program = PROGRAMS[0]
    assert len(program.splitlines()) <= 10
    address = '("0.0.0.0", 2055)'
    assert address in program
    with socket.socket(type=socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        where = free.getsockname()
    text = program.replace(address, repr(where)).replace(
        "for batch in", "print('ready', flush=True); \n    for batch in"
    )
    service = subprocess.Popen([sys.executable, "-u", "-c", text], stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    try:
        assert service.stdout.readline() == "ready\n"
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.connect(where)
            client.send(struct.pack("!HH", 5, 30) + bytes(20))
            assert client.recv(10) == b"ok"
            assert service.stdout.readline() == f"1 24 30 {client.getsockname()}\n"
    finally:
        service.kill()
        service.communicate()


def test_the_echo_server_echoes() -> None:
    program = PROGRAMS[1]
    address = '("127.0.0.1", 9999)'
    assert address in program
    with socket.socket(type=socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        where = free.getsockname()
    text = program.replace(address, repr(where)).replace(
        "    await asyncio.get_r", "    print('ready')\n    await asyncio.get_r"
    )
    service = subprocess.Popen([sys.executable, "-u", "-c", text], stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    try:
        assert service.stdout.readline() == "ready\n"
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.connect(where)
            client.send(b"hello")
            assert client.recv(10) == b"hello"
    finally:
        service.kill()
        service.communicate()
