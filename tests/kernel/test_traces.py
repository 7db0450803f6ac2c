"""What a test or a run leaves behind is found, and told from what others hold."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator

from fastrecv.bpf import Link
from tests.kernel.steering import Stage
from tests.kernel.traces import held


def sleeping(stack: contextlib.ExitStack, link: Link, environment: dict[str, str] | None) -> subprocess.Popen[bytes]:
    """A process that holds the link, until it is killed."""
    process = subprocess.Popen(["/bin/sleep", "60"], pass_fds=[link.fileno()], env=environment)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


@contextlib.contextmanager
def forked() -> Iterator[None]:
    """A process that was forked from this one, runs no other program, and holds what this one holds now."""
    if not (child := os.fork()):
        signal.alarm(60)
        signal.pause()
    yield
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_links_and_namespaces_are_of_those_who_hold_them(stage: Stage) -> None:
    before = held()
    with contextlib.ExitStack() as stack:
        scripted = stack.enter_context(stage.opened()).programs["scripted"]
        with scripted.attach_netns(stage.namespace.fd) as link:
            number = link.info.id
            assert held().links - before.links == {number}
            assert number not in held(strangers=True).links
            child = sleeping(stack, link, None)
            sleeping(stack, link, {})
            copy = stack.enter_context(contextlib.ExitStack())
            copy.enter_context(forked())
        assert held().links - before.links == {number}
        child.kill()
        child.wait()
        assert held().links - before.links == {number}
        copy.close()
        assert held().links == before.links
        assert number in held(strangers=True).links
        assert f"net:[{stage.namespace.inode}]" in held(strangers=True).namespaces
    assert number not in held(strangers=True).links
