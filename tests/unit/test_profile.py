"""Reading perf's stacks."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fastrecv.bench import profile

LISTING = """
        ffffffff81 inet_lookup_run_sk_lookup
        ffffffff82 __udp4_lib_lookup
        ffffffff83 __udp4_lib_rcv

        ffffffff84 __udp4_lib_lookup_skb
        ffffffff83 __udp4_lib_rcv

        ffffffff82 __udp4_lib_lookup
        ffffffff82 __udp4_lib_lookup

        ffffffff85 pv_native_safe_halt

"""


def test_a_stack_counts_once_and_only_for_the_symbol_itself() -> None:
    share = profile.count(LISTING, "cpu-clock", "__udp4_lib_lookup")
    assert (share.hits, share.samples) == (2, 4)
    assert share.percent == 50
    assert share.standard_error == pytest.approx(25)  # sqrt(0.5 * 0.5 / 4)


def test_no_sample_is_said() -> None:
    with pytest.raises(profile.ProfileError, match="no sample"):
        profile.count("\n\n", "cycles", "x")


def test_a_missing_perf_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(profile.ProfileError, match="apt install linux-perf"):
        profile.choose_event()


@pytest.mark.parametrize(
    ("refused", "recorded", "expected"),
    [
        ("none", "cycles:P", "cycles"),
        ("none", "cpu-clock:ppp", "cpu-clock"),  # perf 6.1 takes one for the other without a word
        ("cycles", "cpu-clock", "cpu-clock"),
    ],
)
def test_cycles_are_preferred_and_a_silent_substitute_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: str, recorded: str, expected: str
) -> None:
    perf = tmp_path / "perf"
    perf.write_text(f'#!/bin/sh\ncase "$*" in *"-e {refused}"*) exit 1;; evlist*) echo {recorded};; esac\n')
    perf.chmod(perf.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert profile.choose_event() == expected


def test_a_perf_that_refuses_everything_is_said_with_its_own_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    perf = tmp_path / "perf"
    perf.write_text("#!/bin/sh\necho 'perf_event_paranoid is 4' >&2\nexit 1\n")
    perf.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(profile.ProfileError, match="perf_event_paranoid is 4"):
        profile.choose_event()
