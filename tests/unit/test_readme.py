"""What the README shows first does what it says."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

README = (Path(__file__).parents[2] / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@contextlib.contextmanager
def running(program: str, address: str, before: str) -> Iterator[tuple[IO[str], socket.socket]]:
    """The program on a free port, ready for a connected client: its output, and the client.

    address : what stands for the port. before : the line that waits, before which it says that it is ready.
    """
    assert address in program
    assert before in program
    indent = before[: len(before) - len(before.lstrip())]
    with socket.socket(type=socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        where = free.getsockname()
    text = program.replace(address, repr(where)).replace(before, f"{indent}print('ready')\n{before}")
    service = subprocess.Popen([sys.executable, "-u", "-c", text], stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    try:
        assert service.stdout.readline() == "ready\n"
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.connect(where)
            yield service.stdout, client
    finally:
        service.kill()
        service.communicate()


def test_the_service_in_ten_lines_serves() -> None:
    assert len(PROGRAMS[0].splitlines()) <= 10
    with running(PROGRAMS[0], '("0.0.0.0", 2055)', "    for batch in") as (output, client):
        client.send(struct.pack("!HH", 5, 30) + bytes(20))
        assert client.recv(10) == b"ok"
        assert output.readline() == f"1 24 30 {client.getsockname()}\n"


def test_the_echo_server_echoes() -> None:
    with running(PROGRAMS[1], '("127.0.0.1", 9999)', "    await asyncio.get_r") as (_, client):
        client.send(b"hello")
        assert client.recv(10) == b"hello"
