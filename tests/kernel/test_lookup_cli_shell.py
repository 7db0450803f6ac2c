"""`fastrecv doctor`, `fastrecv completion`, and `fastrecv` as a process: its exit codes and its pipes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from errno import EPERM

import pytest

from fastrecv import features, lookup_life
from fastrecv.features import Feature
from tests.kernel.commands import COMMAND, WEB, Command, one_line
from tests.kernel.steering import UDP, Stage


def missing() -> None:
    raise PermissionError(EPERM, "no")


@pytest.mark.parametrize("broken", [False, True])
def test_the_doctor_says_of_every_feature_whether_it_works_and_what_would_mend_it(
    lookup: Command, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    fine = Feature("all", "a feature", (5, 9), "", lambda: None)
    sick = Feature("all", "a sick one", (5, 9), "CAP_BPF", missing)
    known = [fine, sick] if broken else [fine]
    monkeypatch.setattr(features, "FEATURES", {feature.name: feature for feature in known})
    said = lookup.bare("doctor")
    assert (said.code, said.err) == (77 if broken else 0, "")
    first, header, *table = said.out.splitlines()
    assert first == f"Linux {os.uname().release}, uid 0"
    assert re.split("  +", header) == ["for", "feature", "works", "needs", "what would mend it"]
    expected = [
        ["all", "a feature", "yes", "Linux 5.9"],
        ["all", "a sick one", "no", "Linux 5.9 and CAP_BPF", "run as root, or grant the privilege"],
    ]
    assert [re.split("  +", line) for line in table] == expected[: len(known)]
    said = lookup.bare("doctor", "--json")
    assert said.code == (77 if broken else 0)
    sick_one = {
        "part": "all", "name": "a sick one", "works": False, "requires": "Linux 5.9 and CAP_BPF",
        "mend": "run as root, or grant the privilege",
    }  # fmt: skip
    assert said.json == {
        "kernel": os.uname().release,
        "features": [
            {"part": "all", "name": "a feature", "works": True, "requires": "Linux 5.9", "mend": None},
            *([sick_one] if broken else []),
        ],
    }


def test_the_doctor_tries_every_feature_for_real(lookup: Command) -> None:
    said = lookup.bare("doctor", "--json")
    found = said.json["features"]
    assert [feature["name"] for feature in found] == list(features.FEATURES)
    assert said.code == (0 if all(feature["works"] for feature in found) else 77)
    assert all((feature["mend"] is None) == feature["works"] for feature in found)
    tested = [feature for feature in found if feature["part"] != "bench" and "/sys/fs/bpf" not in feature["name"]]
    assert len(tested) > 5
    assert [feature for feature in tested if not feature["works"]] == [], "every kernel test presumes these"


@pytest.mark.parametrize(("part", "other"), [("steering", "bench"), ("bench", "steering")])
def test_the_doctor_of_a_part_tries_what_that_part_needs_and_no_more(
    lookup: Command, monkeypatch: pytest.MonkeyPatch, part: str, other: str
) -> None:
    known = [
        Feature(part, "needed", (5, 9), "", lambda: None),
        Feature("all", "common", (5, 9), "", lambda: None),
        Feature(other, "no business of it", (5, 9), "CAP_BPF", missing),
    ]
    monkeypatch.setattr(features, "FEATURES", {feature.name: feature for feature in known})
    said = lookup.bare("doctor", part, "--json")
    assert [(row["part"], row["name"]) for row in said.json["features"]] == [(part, "needed"), ("all", "common")]
    assert said.code == 0
    assert lookup.bare("doctor").code == 77
    wrong = lookup.bare("doctor", "nonsense")
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err.startswith("fastrecv doctor: ")
    assert wrong.err.endswith(" (see fastrecv doctor --help)\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_its_completion_script(lookup: Command, shell: str) -> None:
    said = lookup.bare("completion", shell)
    assert (said.code, said.err) == (0, "")
    assert f"_FASTRECV_COMPLETE={shell}_complete" in said.out


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["lookup", "sta"], ["status"]),
        (["lookup", "register-"], ["register-pid"]),
        (["lookup", "unregister", "--bpffs", "{}", ""], ["lonely", "web", "web-2"]),
        (["lookup", "unregister", "--bpffs", "{}", "web"], ["web", "web-2"]),
        (["lookup", "bind", "--bpffs", "{}", "x"], []),
        (["lookup", "bindings", "--bpffs", "{}", "--label", "lo"], ["lonely"]),
        (["lookup", "bindings", "--bpffs", "/nonexistent", "--label", "lo"], []),
        (["lookup", "unregister", "--bpffs", "{}", "web", "--family", ""], ["ipv4", "ipv6"]),
    ],
)
def test_commands_choices_and_the_labels_that_are_loaded_are_completed(
    loaded: Command, stage: Stage, monkeypatch: pytest.MonkeyPatch, words: list[str], offered: list[str]
) -> None:
    loaded.done("bind", *WEB)
    loaded.done("bind", "web-2", "any", "2001:db8::/32", "any")
    loaded.done("bind", "drop", "udp", "2001:db8::/32", "any")
    loaded.done("register", "lonely", "--fd", stage.serve("service", UDP, "198.51.100.2", 8008).fileno())
    typed = ["fastrecv", *(word.format(loaded.bpffs) for word in words)]
    monkeypatch.setenv("_FASTRECV_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(typed))
    monkeypatch.setenv("COMP_CWORD", str(len(typed) - 1))
    said = loaded.exits()
    assert (said.code, said.err) == (0, "")
    assert [line.removeprefix("plain,") for line in said.out.splitlines() if line] == offered


def process(*words: object, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
        text=True, timeout=60, check=False,
    )  # fmt: skip


def test_the_process_exits_with_what_the_command_says(loaded: Command) -> None:
    place = ("--bpffs", loaded.bpffs)
    done = process(*COMMAND, "lookup", "bind", *WEB, *place)
    assert (done.returncode, done.stdout, done.stderr) == (0, "bound web tcp 198.51.100.0/24 80\n", "")
    refused = process(*COMMAND, "lookup", "load", *place)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert one_line(refused.stderr) == "a dispatcher is loaded in this network namespace already"
    misused = process(*COMMAND, "lookup", "bind", *place)
    assert (misused.returncode, misused.stdout) == (2, "")
    assert misused.stderr == "fastrecv lookup bind: Missing argument 'LABEL'. (see fastrecv lookup bind --help)\n"
    powerless = process("setpriv", "--bounding-set=-all", *COMMAND, "lookup", "unbind", *WEB, *place)
    assert (powerless.returncode, powerless.stdout) == (77, "")
    assert one_line(powerless.stderr)
    assert process(*COMMAND, "--version").stdout.startswith("fastrecv ")


@pytest.mark.parametrize(("library", "words"), [("click", []), ("prometheus_client", ["lookup", "status"])])
def test_without_the_libraries_of_the_commands_one_line_says_what_to_install(library: str, words: list[str]) -> None:
    text = f"import sys; sys.modules[{library!r}] = None; from fastrecv.__main__ import main; sys.exit(main())"
    found = process(sys.executable, "-c", text, *words)
    assert (found.returncode, found.stdout) == (77, "")
    assert one_line(found.stderr) == f"the commands need {library}: pip install 'fastrecv[cli]'"


@pytest.mark.parametrize(
    "words", [("bindings",), ("bindings", "--json"), ("status",), ("metrics",), ("bind", "--help")]
)
def test_a_reader_that_has_gone_is_no_reason_for_a_traceback(loaded: Command, words: tuple[str, ...]) -> None:
    loaded.done("bind", *WEB)
    reading, writing = os.pipe()
    os.close(reading)
    try:
        found = process(*COMMAND, "lookup", *words, "--bpffs", loaded.bpffs, stdout=writing)
    finally:
        os.close(writing)
    assert (found.returncode, found.stderr) == (1, "")


def test_bindings_are_piped_from_one_dispatcher_to_another(loaded: Command) -> None:
    loaded.done("bind", *WEB)
    dumped = loaded("bindings", "--json").out
    loaded.done("unbind", *WEB)
    words = [*COMMAND, "lookup", "load-bindings", "/dev/stdin", "--bpffs", str(loaded.bpffs)]
    found = subprocess.run(words, input=dumped, capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == f"+ {' '.join(WEB)}\n1 added, 0 removed, 1 in the file\n"


def test_an_interrupted_command_has_the_exit_code_of_the_signal(
    lookup: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lookup_life, "load", interrupted)
    said = lookup("load")
    assert (said.code, said.out, said.err.strip()) == (130, "", "")
