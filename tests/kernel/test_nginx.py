"""Debian's nginx, unmodified and already running on loopback, gets a whole prefix; Debian's curl sees it."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastrecv.cli.main import run
from tests.kernel.steering import Stage
from tests.programs import program

PREFIX = "198.51.100.0/24"
CONFIGURATION = """
daemon off;
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:8080{options}; return 200 "{answer} $http_host\\n"; }}
}}
"""


class Nginx:
    """A running nginx with a configuration of its own."""

    def __init__(self, folder: Path, options: str) -> None:
        self.folder, self.options = folder, options
        self.configure("first")
        self.process = subprocess.Popen(self.command())
        self.pid_file = folder / "nginx.pid"

    def configure(self, answer: str) -> None:
        text = CONFIGURATION.format(folder=self.folder, options=self.options, answer=answer)
        (self.folder / "nginx.conf").write_text(text)

    def command(self, *words: str) -> list[str]:
        log = str(self.folder / "error.log")
        return [program("nginx", "nginx"), "-p", str(self.folder), "-c", "nginx.conf", "-e", log, *words]

    def reload(self) -> None:
        subprocess.run(self.command("-s", "reload"), check=True)

    def workers(self) -> set[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return {int(pid) for pid in children.split()}


@pytest.fixture(params=["", " reuseport"], ids=["one-socket", "reuseport"])
def nginx(stage: Stage, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Nginx]:
    started = Nginx(tmp_path, request.param)
    try:
        wait_for(lambda: started.pid_file.exists() and len(started.workers()) == 2)
        yield started
    finally:
        started.process.send_signal(signal.SIGTERM)
        started.process.wait(10)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def curl(*urls: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [program("curl", "curl"), "-sS", "--fail", "--max-time", "10", *urls], stdout=subprocess.PIPE, text=True
    )


def fastrecv(bpffs: Path, *words: object) -> None:
    assert run(["lookup", *map(str, words), "--bpffs", str(bpffs)]) == 0


def test_nginx_gets_a_prefix_while_it_runs_and_refuses_nobody_while_it_is_reloaded(
    stage: Stage, bpffs: Path, nginx: Nginx
) -> None:
    with curl("http://198.51.100.7/") as refused:
        pass
    assert refused.returncode == 7, "nothing is bound yet: the connection is refused"

    fastrecv(bpffs, "load")
    fastrecv(bpffs, "bind", "web", "tcp", PREFIX, 80)
    fastrecv(bpffs, "register-pid", nginx.pid_file, "web", "tcp", "127.0.0.1", 8080)
    with curl("http://198.51.100.[1-254]/") as first:
        answers = first.communicate(timeout=60)[0].splitlines()
    assert answers == [f"first 198.51.100.{host}" for host in range(1, 255)]

    old = nginx.workers()
    nginx.configure("second")
    seen: set[str] = set()
    rounds = 0
    reloaded = registered = False
    while not (registered and seen == {"second"}):
        with curl("http://198.51.100.[1-254]/") as asking:
            if not reloaded:  # in the midst of the requests
                nginx.reload()
                reloaded = True
            elif not registered and not old & nginx.workers():
                fastrecv(bpffs, "register-pid", nginx.pid_file, "web", "tcp", "127.0.0.1", 8080)
                registered = True
            answers = asking.communicate(timeout=60)[0].splitlines()
        assert asking.returncode == 0, "a connection was refused"
        assert len(answers) == 254
        seen = {answer.split()[0] for answer in answers}
        rounds += 1
        assert rounds < 200
    fastrecv(bpffs, "unload")
