"""What is said about a feature, whatever the kernel and the privileges are."""

from __future__ import annotations

from collections.abc import Iterator
from errno import ENOSYS, EPERM

import pytest

from fastrecv import features
from fastrecv.errors import NotSupported
from fastrecv.features import Feature


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    features._failure.cache_clear()
    yield
    features._failure.cache_clear()


def put(monkeypatch: pytest.MonkeyPatch, kernel: tuple[int, int], error: OSError | None) -> list[int]:
    calls: list[int] = []

    def probe() -> None:
        calls.append(1)
        if error:
            raise error

    monkeypatch.setitem(features.FEATURES, "x", Feature("all", "x", kernel, "CAP_BPF", probe))
    return calls


def test_an_old_kernel_is_named_and_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = put(monkeypatch, (99, 1), None)
    with pytest.raises(
        NotSupported, match=r"x not available: this is Linux .* \(needs Linux 99.1 and CAP_BPF\)"
    ) as caught:
        features.check("x")
    assert (caught.value.feature, caught.value.errno, calls) == ("x", ENOSYS, [])


def test_a_missing_privilege_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, (2, 6), PermissionError(EPERM, "no"))
    with pytest.raises(NotSupported, match="run as root, or grant the privilege") as caught:
        features.check("x")
    assert caught.value.requires == "Linux 2.6 and CAP_BPF"


def test_any_other_failure_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, (2, 6), OSError(5, "the disk is on fire"))
    with pytest.raises(NotSupported, match="the disk is on fire"):
        features.check("x")


def test_a_probe_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = put(monkeypatch, (2, 6), None)
    features.check("x")
    features.check("x")
    assert calls == [1]


def test_every_feature_says_what_it_needs() -> None:
    for name, feature in features.FEATURES.items():
        assert feature.name == name
        assert feature.requires.startswith(f"Linux {feature.kernel[0]}.{feature.kernel[1]}")


def test_an_unknown_feature_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no feature 'nonsense': choose from network namespaces, "):
        features.check("nonsense")
