"""What docs/sinks.md shows does what it says."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastrecv.sinks import Sink, SinkFull, record_batch
from fastrecv.sinks.urls import _ENGINE

PAGE = (Path(__file__).parents[2] / "docs" / "sinks.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_a_sink_of_ones_own_is_a_sink() -> None:
    found: dict[str, Any] = {}
    exec(PROGRAMS[1], found)  # noqa: S102 - the page's
    assert isinstance(found["Kept"](room=1), Sink)
    with found["Kept"](room=1) as sink:
        sink.publish([{"n": 1}])
        with pytest.raises(SinkFull, match="1 record batches are kept"):
            sink.publish([{"n": 2}])
        assert sink.kept == [record_batch([{"n": 1}])]
        assert sink.statistics()[:4] == (1, 1, 0, 1)


def test_the_collector_is_a_handler() -> None:
    found: dict[str, Any] = {}
    exec(PROGRAMS[0], found)  # noqa: S102 - the page's
    from fastrecv.workers.handlers import _of_class

    assert _of_class("collector", found["Collector"]).handle is not None


def test_the_command_to_try_prints_what_is_sent_to_it() -> None:
    (program,) = re.findall(r"python -c '(.*?)'\n```", PAGE, re.DOTALL)
    with socket.socket(type=socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert '("127.0.0.1", 2055)' in program
    code = program.replace("2055", str(port)).replace("    while", "    print('ready', flush=True)\n    while")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.sendto(b"hello", ("127.0.0.1", port))
        assert '"payload": "aGVsbG8="' in process.stdout.readline()
        process.kill()


def test_every_option_is_on_the_page() -> None:
    section = PAGE[PAGE.index("## NATS JetStream") :]
    assert [name for name in _ENGINE if f"`{name}`" not in section] == []
