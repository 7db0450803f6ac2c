"""What the soak bench makes of its samples."""

from __future__ import annotations

import numpy as np
import pytest

from fastrecv.bench.soak import Sample, leaks, slopes

MIB = 1 << 20


def sample(at: int, *, workers: int = 4, steady: bool = True, descriptors: int = 30, objects: int = 8) -> Sample:
    """Its worker is process 7 for the first third, then process 8, which grows by 36 MiB an hour."""
    return Sample(
        at, workers, steady, 40 * MIB, descriptors, objects, 7 if at < 300 else 8, 30 * MIB + (at - 300) * MIB // 100,
    )  # fmt: skip


def test_a_supervisor_that_has_at_last_what_it_had_at_first_leaks_nothing() -> None:
    samples = [sample(at, workers=4 + at % 2, descriptors=30 + 3 * (at % 2)) for at in range(900)]
    assert leaks(samples) == []


def test_transient_descriptors_are_no_leak() -> None:
    samples = [sample(at, descriptors=30 + (at % 7 > 0) * 5, steady=at % 3 > 0) for at in range(900)]
    assert leaks(samples) == []


@pytest.mark.parametrize("what", ["descriptors", "objects"])
def test_what_is_more_in_the_end_is_told(what: str) -> None:
    samples = [sample(at, **{what: 20 + at // 500}) for at in range(900)]  # type: ignore[arg-type] # a count
    assert leaks(samples) == [f"the supervisor has 21 {what} at 4 workers, and had 20"]


def test_resident_memory_is_followed_in_the_last_worker() -> None:
    noise = np.random.default_rng(1).normal(0, 0.02 * MIB, 900)
    samples = [
        one._replace(resident=one.resident + int(noise[at])) for at, one in enumerate(sample(at) for at in range(900))
    ]
    supervisor, worker = slopes(samples)
    assert supervisor.low < 0 < supervisor.high
    assert abs(supervisor.estimate) < MIB / 4
    assert worker.estimate == pytest.approx(36 * MIB, rel=0.01)
    assert worker.seconds == pytest.approx(539)


def test_too_few_samples_give_no_slope() -> None:
    assert slopes([sample(at) for at in range(30)]) == []
