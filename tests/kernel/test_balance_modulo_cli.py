"""`fastrecv balance modulo` and `object`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastrecv import bpf
from fastrecv.modulo import Modulo
from fastrecv.steerable import cookie_of
from tests.kernel.commands import Command, one_line
from tests.kernel.steering import PORT, UDP, Stage


@pytest.fixture
def root(bpffs: Path) -> Path:
    return bpffs / "pmacct"


def test_a_group_from_its_beginning_to_its_end(lookup: Command, stage: Stage, root: Path) -> None:
    def done(name: str, *words: object) -> str:
        said = lookup.bare("balance", "modulo", name, root, *words)
        assert (said.code, said.err) == (0, "")
        return said.out

    members = [stage.serve(str(number), UDP, "127.0.0.1", PORT, reuseport=True) for number in range(3)]
    cookies = [f"sk:{cookie_of(member):x}" for member in members]
    assert done("create", "--size", 2, "--nonce", 7) == f"{root}: size 2, nonce 7\n"
    assert done("create") == f"{root}: size 2, nonce 7\n", "what is there is taken"
    for slot in range(2):
        said = done("register", slot, "--fd", members[slot].fileno())
        assert said == f"slot {slot}: udp 127.0.0.1 port {PORT}, {cookies[slot]}\n"
    said = done("register", 2, "--fd", members[2].fileno())
    assert said.endswith(f"{cookies[2]}; it has no senders before `resize`: size is 2\n")
    assert done("attach", "--fd", members[0].fileno()) == f"attached to the group of udp 127.0.0.1 port {PORT}\n"
    with Modulo(root) as shared:
        for number in range(1, 40):
            source = f"127.0.5.{number}"
            slot = int(stage.ask(UDP, "127.0.0.1", PORT, (source, 0)))
            document = lookup.bare("balance", "modulo", "explain", root, source, "--json").json
            assert document == {"slot": slot, "tcp": None, "udp": cookie_of(members[slot])}
            assert done("explain", source) == f"slot {slot} of 2: tcp none, refused; udp {cookies[slot]}\n"
        assert done("resize", 3) == "size 2 before, 3 now, 66.7 % of the senders moved\n"
        assert shared.size == 3
    lines = done("status").splitlines()
    assert lines[0] == f"{root}: size 3, nonce 7"
    assert [line.split() for line in lines[1:]] == [
        ["slot", "tcp", "udp"], *([str(slot), "-", cookie] for slot, cookie in enumerate(cookies))
    ]  # fmt: skip
    document = lookup.bare("balance", "modulo", "status", root, "--json").json
    assert document == {
        "root": str(root), "size": 3, "nonce": 7, "tcp": {},
        "udp": {str(slot): cookie_of(member) for slot, member in enumerate(members)},
    }  # fmt: skip
    for slot in range(3):
        assert done("unregister", slot, "udp") == f"udp slot {slot} is empty\n"
    assert done("destroy") == f"destroyed {root}\n"
    assert not root.exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("create", "ROOT", "--size", 8), "size is 2 there, 8 here: all that share .* must agree"),
        (("status", "ROOT/none"), "none holds no maps of that kind: `fastrecv balance modulo create`"),
        (("unregister", "ROOT", 1, "tcp"), "tcp slot 1 has no socket"),
        (("register", "ROOT", 1, "--fd", "MEMBER"), "port 7007 has slot 0: unregister it there first"),
        (("register", "ROOT", 0, "--fd", "OTHER"), "slot 0 has socket sk:.*: unregister that, or take it over"),
        (("destroy", "ROOT"), "is in use, slots udp 0: unregister or close their sockets"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_said_in_a_line(
    lookup: Command, stage: Stage, root: Path, words: tuple[object, ...], reason: str
) -> None:
    member, other = (stage.serve(name, UDP, "127.0.0.1", PORT, reuseport=True) for name in "ab")
    with Modulo(root, size=2) as shared:
        shared.register(0, member)
    named = {"ROOT": root, "ROOT/none": root / "none", "MEMBER": member.fileno(), "OTHER": other.fileno()}
    said = lookup.bare("balance", "modulo", *(named.get(str(word), word) for word in words))
    assert (said.code, said.out) == (1, "")
    assert re.search(reason, one_line(said.err))


def test_object_writes_what_a_peer_loads(lookup: Command, tmp_path: Path) -> None:
    target = tmp_path / "selector.o"
    said = lookup.bare("balance", "object", target)
    assert (said.code, said.out, said.err) == (0, f"wrote {target}\n", "")
    assert target.read_bytes() == bpf.compiled("modulo")
    said = lookup.bare("balance", "object", target)
    assert said.code == 1
    assert one_line(said.err) == f"{target} exists already: remove it, or give another name"
